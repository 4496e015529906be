"""What a saved network says about itself: complete, true, and nothing private."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from library.data.items import (
    BucketOptions,
    CaptionOptions,
    Dataset,
    Geometry,
    ImageOptions,
    Item,
    Manifest,
    Subset,
)
from library.options.group import OptionGroup, option
from library.options.network import MetadataOptions, NetworkOptions
from library.training.family import FamilySpec
from library.training.output.metadata import TrainingFacts, build_metadata, weight_file

FAMILY = FamilySpec("lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", 16, 8, 2)

# The reference's keys, but those that come from recorded option groups and from the family.
REFERENCE_KEYS = """
    session_id training_started_at training_finished_at output_name text_encoder_lr unet_lr
    num_train_images num_validation_images num_reg_images num_batches_per_epoch num_epochs epoch steps
    max_train_steps network_module network_dim network_alpha network_dropout network_args full_fp16 v2
    base_model_version clip_skip max_token_length seed lowram noise_offset noise_offset_random_strength
    multires_noise_iterations multires_noise_discount adaptive_noise_scale zero_terminal_snr
    training_comment sd_scripts_commit_hash optimizer caption_dropout_rate caption_dropout_every_n_epochs
    caption_tag_dropout_rate face_crop_aug_range min_snr_gamma scale_weight_norms ip_noise_gamma
    ip_noise_gamma_random_strength debiased_estimation fp8_base fp8_base_unet validation_seed
    validation_split resize_interpolation datasets tag_frequency dataset_dirs
""".split()


@dataclass(frozen=True, kw_only=True)
class SomeOptions(OptionGroup):
    """Options like those of a trainer."""

    learning_rate: float = option(1e-4, "")
    mixed_precision: str = option("bf16", "")
    max_train_steps: int = option(1600, "")
    seed: int | None = option(None, "")
    cache_directory: Path | None = option(Path("/home/someone/cache"), "")


def subset(name: str, *, rate: float = 0.0, is_reg: bool = False, repeats: int = 2) -> Subset:
    captions = CaptionOptions(caption_dropout_rate=rate)
    folder = Path("/home/someone/pictures") / name
    return Subset(
        "dreambooth", folder, captions, ImageOptions(), num_repeats=repeats, is_reg=is_reg, class_tokens="cat"
    )


def make_manifest() -> Manifest:
    """Two datasets; three training pictures, one held out, one for regularisation."""
    cats, dogs, reg = subset("cats"), subset("dogs", rate=0.1, repeats=1), subset("reg", is_reg=True)
    small = Dataset((cats, reg), BucketOptions((64, 64), enable_bucket=True), batch_size=2)
    large = Dataset((dogs,), BucketOptions((96, 128)))
    texts = [
        (small, 0, cats, "a cat, Sitting, a cat"),
        (small, 0, cats, "sitting,\nasleep"),
        (small, 0, reg, "any cat"),
        (large, 1, dogs, "a dog"),
        (large, 1, dogs, "held out"),
    ]
    items = tuple(
        Item(
            index=i,
            dataset=dataset,
            dataset_index=number,
            subset=own,
            path=own.image_dir / f"{i}.png",
            size=(100, 50),
            geometry=Geometry((96, 48), (0, 0), (64, 48) if own is dogs else (96, 48)),
            text=text,
            repeats=own.num_repeats,
            digest=str(i),
        )
        for i, (dataset, number, own, text) in enumerate(texts)
    )
    return Manifest((small, large), items, train=(0, 1, 2, 3), validation=(4,))


def make_facts(**changes: object) -> TrainingFacts:
    facts = TrainingFacts(
        family=FAMILY,
        described={
            "sd_model_name": "lumina.safetensors",
            "system_prompt": "You are",
            "max_token_length": "256",
        },
        manifest=make_manifest(),
        trainee=NetworkOptions(
            network_module="networks.lora_lumina", network_dim=8, network_args=("attn_dim=4",)
        ),
        metadata=MetadataOptions(training_comment="a note"),
        recorded=(SomeOptions(),),
        output_name="my_lora",
        optimizer="torch.optim.adamw.AdamW(weight_decay=0.1)",
        seed=42,
        session_id="123",
        started_at=1_700_000_000.5,
        total_steps=100,
        total_epochs=10,
        batches_per_epoch=12,
    )
    return replace(facts, **changes)


@pytest.fixture
def metadata() -> dict[str, str]:
    return build_metadata(make_facts(), step=50, epoch=5, now=1_700_000_100.0)


def test_has_every_key_of_the_reference(metadata: dict[str, str]) -> None:
    assert not {f"ss_{key}" for key in REFERENCE_KEYS} - metadata.keys()
    assert all(isinstance(value, str) for value in metadata.values())
    assert all(key.startswith(("ss_", "modelspec.")) for key in metadata)


def test_a_cache_on_disk_is_a_cache() -> None:
    from library.options.group import parse_options
    from library.options.train import LuminaTrainOptions
    from lumina_train_network import LuminaTrainer

    needed = ("pretrained_model_name_or_path", "gemma2", "ae", "output_dir", "train_data_dir")
    words = [*(f"--{name}=x" for name in needed), "--network_module=networks.lora_lumina"]
    for word, latents, texts in (
        ("--cache_latents_to_disk", "True", "False"),
        ("--cache_text_encoder_outputs_to_disk", "False", "True"),
    ):
        trainer = LuminaTrainer(parse_options(LuminaTrainOptions, [*words, word]))
        found = build_metadata(make_facts(recorded=trainer.recorded_options()), step=1, epoch=1, now=0.0)
        assert (found["ss_cache_latents"], found["ss_cache_text_encoder_outputs"]) == (latents, texts)
        assert found[f"ss_{word.removeprefix('--')}"] == "True"


def test_tells_the_run(metadata: dict[str, str]) -> None:
    expected = {
        "steps": "50",
        "epoch": "5",
        "max_train_steps": "100",  # what is trained, not the flag's default
        "seed": "42",  # the one in use, not the None that was asked for
        "learning_rate": "0.0001",
        "mixed_precision": "bf16",
        "network_dim": "8",
        "network_alpha": "1.0",
        "network_dropout": "None",
        "network_args": '{"attn_dim": "4"}',
        "base_model_version": "lumina2",
        "optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "training_started_at": "1700000000.5",
        "training_finished_at": "1700000100.0",
        "training_comment": "a note",
        "system_prompt": "You are",
        "sd_model_name": "lumina.safetensors",
        "num_train_images": "5",
        "num_reg_images": "2",
        "num_validation_images": "1",
        "caption_dropout_rate": "[0.0, 0.0, 0.1]",
        "caption_tag_dropout_rate": "0.0",
    }
    assert {key: metadata[f"ss_{key}"] for key in expected} == expected


def test_tells_no_path(metadata: dict[str, str]) -> None:
    assert "someone" not in json.dumps(metadata)
    assert metadata["ss_cache_directory"] == "cache"


def test_tells_the_datasets(metadata: dict[str, str]) -> None:
    small, large = json.loads(metadata["ss_datasets"])
    assert small["resolution"] == [64, 64] and large["resolution"] == [96, 128]
    assert (small["num_train_images"], small["num_reg_images"], small["batch_size_per_device"]) == (4, 2, 2)
    assert small["bucket_info"]["buckets"] == {"0": {"resolution": [96, 48], "count": 6}}
    assert small["bucket_info"]["mean_img_ar_error"] == 0
    assert large["bucket_info"]["mean_img_ar_error"] == pytest.approx(2 - 64 / 48)
    assert [s["image_dir"] for s in small["subsets"]] == ["cats", "reg"]
    assert [s["img_count"] for s in small["subsets"]] == [2, 1]
    assert large["subsets"][0]["img_count"] == 1  # the held-out picture is not trained on
    assert large["subsets"][0]["caption_dropout_rate"] == 0.1
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "cats": {"n_repeats": 2, "img_count": 2},
        "dogs": {"n_repeats": 1, "img_count": 1},
    }


def test_counts_tags_once_a_picture(metadata: dict[str, str]) -> None:
    assert json.loads(metadata["ss_tag_frequency"]) == {
        "cats": {"a cat": 2, "sitting": 2, "asleep": 1},
        "reg": {"any cat": 1},
        "dogs": {"a dog": 1},
    }
    manifest = make_manifest()
    again = replace(manifest.items[0], dataset_index=1, dataset=manifest.datasets[1])
    doubled = replace(manifest, items=(*manifest.items, again), train=(0, 1, 2, 3, 5))
    built = build_metadata(make_facts(manifest=doubled), step=1, epoch=1, now=0.0)
    assert built["ss_tag_frequency"] == metadata["ss_tag_frequency"]


def test_folders_of_one_name_are_told_apart() -> None:
    manifest = make_manifest()
    twice = replace(manifest, datasets=(*manifest.datasets, manifest.datasets[1]))
    built = build_metadata(make_facts(manifest=twice), step=1, epoch=1, now=0.0)
    assert list(json.loads(built["ss_dataset_dirs"])) == ["cats", "dogs", "dogs (2)"]


def test_modelspec_is_true_of_a_flow_model(metadata: dict[str, str]) -> None:
    spec = {k.removeprefix("modelspec."): v for k, v in metadata.items() if k.startswith("modelspec.")}
    assert spec["sai_model_spec"] == "1.0.1"
    assert spec["architecture"] == "lumina-2/lora"
    assert spec["implementation"] == FAMILY.implementation
    assert spec["title"] == "my_lora"
    assert spec["resolution"] == "96x128"
    assert spec["date"] == "2023-11-14T22:15:00+00:00"
    assert "epsilon" not in spec["prediction_type"]
    assert "author" not in spec


def test_modelspec_takes_what_the_user_says(tmp_path: Path) -> None:
    (tmp_path / "thumb.png").write_bytes(b"a picture")
    options = MetadataOptions(
        metadata_title="My LoRA", metadata_author="Me", metadata_thumbnail=str(tmp_path / "thumb.png")
    )
    built = build_metadata(make_facts(metadata=options), step=1, epoch=1, now=0.0)
    assert built["modelspec.title"] == "My LoRA" and built["modelspec.author"] == "Me"
    head, _, body = built["modelspec.thumbnail"].partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == b"a picture"


def test_no_metadata_keeps_what_is_needed_to_use_the_file() -> None:
    facts = make_facts(metadata=MetadataOptions(no_metadata=True, training_comment="a note"))
    built = build_metadata(facts, step=1, epoch=1, now=0.0)
    assert {key for key in built if key.startswith("ss_")} == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }
    assert built["modelspec.architecture"] == "lumina-2/lora"


def test_weight_file_has_kohyas_hashes(tmp_path: Path) -> None:
    path = tmp_path / "lumina.safetensors"
    path.write_bytes(bytes(range(256)) * 5000)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert weight_file("sd_model", path, digest) == {
        "sd_model_name": "lumina.safetensors",
        "sd_model_hash": hashlib.sha256(content[2**20 : 2**20 + 2**16]).hexdigest()[:8],
        "new_sd_model_hash": digest,
    }
    assert weight_file("gemma2", tmp_path / "folder", None) == {"gemma2_name": "folder"}
