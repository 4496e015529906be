"""Which folder an entry is in, and what is refused to be cached."""

from dataclasses import replace
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.data.cache_keys import cache_directory, check_latents_cacheable, latents_key, text_key
from library.data.items import BucketOptions, CaptionOptions, Dataset, Geometry, ImageOptions, Item, Subset
from library.data.prompt import Prompt


def item_with(**subset):
    subset = Subset(
        "dreambooth", subset.pop("image_dir", Path("p")), CaptionOptions(), ImageOptions(), **subset
    )
    dataset = Dataset((subset,), BucketOptions((64, 64)))
    geometry = Geometry((70, 64), (3, 0), (64, 64))
    return Item(0, dataset, 0, subset, Path("p/sub/a.png"), (140, 128), geometry, "text", 1, "digest")


def test_the_nearest_choice_of_folder_wins():
    flag = Path("flag")
    assert cache_directory(item_with(), None) == Path("p/.flow-cache")
    assert cache_directory(item_with(), flag) == flag
    assert cache_directory(item_with(cache_directory=Path("own")), flag) == Path("own")
    of_metadata = item_with(image_dir=None, metadata_file=Path("m/meta.json"))
    assert cache_directory(of_metadata, None) == Path("m/.flow-cache")
    assert cache_directory(item_with(image_dir=None), None) == Path("p/sub/.flow-cache")


def test_all_that_decides_latents_is_in_the_key():
    item = item_with()
    images = {"flip_aug": True, "alpha_mask": True, "resize_interpolation": "area"}
    others = [
        replace(item, digest="another"),
        replace(item, mask_path=Path("mask.png")),
        *(
            replace(item, geometry=replace(item.geometry, **{name: (1, 2)}))
            for name in ("resized", "crop", "bucket")
        ),
        *(
            replace(item, subset=replace(item.subset, images=ImageOptions(**{k: v})))
            for k, v in images.items()
        ),
    ]
    keys = {latents_key(i, "ae", "bf16") for i in [item, *others]}
    keys |= {latents_key(item, "ae 2", "bf16"), latents_key(item, "ae", "fp32")}
    assert len(keys) == len(others) + 3


def test_what_does_not_decide_latents_is_not_in_the_key():
    item = item_with()
    for other in (
        replace(item, index=7, path=Path("elsewhere.jpg"), text="another", repeats=5),
        replace(item, subset=replace(item.subset, captions=CaptionOptions(shuffle_caption=True))),
    ):
        assert latents_key(other, "ae", "bf16") == latents_key(item, "ae", "bf16")


def test_text_identity_and_dtype_are_kept_apart():
    parts = [("a", "bc", "d"), ("ab", "c", "d"), ("a", "b", "cd")]
    assert len({text_key(Prompt(text), *rest) for text, *rest in parts}) == 3


@pytest.mark.parametrize(
    "options", [{"random_crop": True}, {"color_aug": True}, {"face_crop_aug_range": (1.0, 2.0)}]
)
def test_pixels_that_change_from_epoch_to_epoch_are_refused(options):
    subset = replace(item_with().subset, images=ImageOptions(flip_aug=True, **options))
    good = item_with().dataset
    with pytest.raises(ConfigError, match=rf"{next(iter(options))} of p .*--cache_latents"):
        check_latents_cacheable([good, replace(good, subsets=(*good.subsets, subset))])
    check_latents_cacheable([good])
