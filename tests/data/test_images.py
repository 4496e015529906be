"""Pixels are what a viewer would show: upright, in sRGB, white where transparent; masks fit them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from library.core.errors import DataError, MissingPackageError
from library.data.buckets import geometry
from library.data.images import Face, drawn_geometry, face_in_name, is_flipped, load_pixels, read_facts
from library.data.items import BucketOptions, CaptionOptions, Dataset, ImageOptions, Item, Subset

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def make_item(path: Path, size: tuple[int, int], mask: Path | None = None, index: int = 0, **options) -> Item:
    subset = Subset("dreambooth", path.parent, CaptionOptions(), ImageOptions(**options))
    buckets = BucketOptions(size)
    place = geometry(read_facts(path).size, buckets)
    facts = read_facts(path)
    return Item(index, Dataset((subset,), buckets), 0, subset, path, facts.size, place, "", 1, "", mask)


def pixels_of(path: Path, **options) -> np.ndarray:
    """The pixels of a picture at its own size."""
    return load_pixels(make_item(path, read_facts(path).size, **options), None, flip=False)[0]


def corners(size: tuple[int, int] = (32, 16)) -> Image.Image:
    """Red at the top left, green at the top right, blue at the bottom left, white at the bottom right."""
    half = (size[0] // 2, size[1] // 2)
    picture = Image.new("RGB", size, WHITE)
    picture.paste(RED, (0, 0, *half))
    picture.paste(GREEN, (half[0], 0, size[0], half[1]))
    picture.paste(BLUE, (0, half[1], half[0], size[1]))
    return picture


def gradient(size: tuple[int, int] = (64, 48)) -> np.ndarray:
    y, x = np.mgrid[: size[1], : size[0]]
    return np.stack([x * 255 // size[0], y * 255 // size[1], (x + y) % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = corners() if orientation == 1 else corners().transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert read_facts(tmp_path / "x.png").size == (32, 16)
    np.testing.assert_array_equal(pixels_of(tmp_path / "x.png"), np.asarray(corners()))


def test_transparent_becomes_white_in_every_mode_that_has_it(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    rgba.paste((255, 0, 0, 255), (0, 0, 8, 16))
    rgba.paste((0, 0, 0, 128), (8, 8, 16, 16))
    rgba.save(tmp_path / "rgba.png")
    pixels = pixels_of(tmp_path / "rgba.png")
    assert (
        tuple(pixels[0, 0]) == RED
        and tuple(pixels[0, 15]) == WHITE
        and abs(int(pixels[15, 15, 0]) - 127) <= 1
    )

    Image.new("LA", (16, 16), (0, 0)).save(tmp_path / "la.png")
    assert (pixels_of(tmp_path / "la.png") == 255).all()

    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (0, 0, 8, 16))
    palette.save(tmp_path / "p.png", transparency=1)
    pixels = pixels_of(tmp_path / "p.png")
    assert tuple(pixels[0, 0]) == BLUE and tuple(pixels[0, 15]) == WHITE

    corners((16, 16)).save(tmp_path / "key.png", transparency=RED)
    assert tuple(pixels_of(tmp_path / "key.png")[0, 0]) == WHITE


def test_alpha_as_mask_leaves_the_colours_alone(tmp_path: Path) -> None:
    rgba = corners((16, 16)).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 17, (16, 1))))
    rgba.save(tmp_path / "x.png")
    pixels, mask = load_pixels(make_item(tmp_path / "x.png", (16, 16), alpha_mask=True), None, flip=False)
    np.testing.assert_array_equal(pixels, np.asarray(corners((16, 16))))
    np.testing.assert_allclose(mask, np.tile(np.arange(16) / 15, (16, 1)), atol=1e-6)
    assert mask.dtype == np.float32

    corners().save(tmp_path / "opaque.png")
    _, mask = load_pixels(make_item(tmp_path / "opaque.png", (32, 16), alpha_mask=True), None, flip=False)
    assert (mask == 1).all()


def test_grey_cmyk_and_palette(tmp_path: Path) -> None:
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "l.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "l.png")[..., 1].ravel(), np.arange(256))
    corners().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    np.testing.assert_allclose(pixels_of(tmp_path / "cmyk.jpg"), np.asarray(corners()).astype(int), atol=8)
    corners().quantize(8).save(tmp_path / "p.gif")
    np.testing.assert_array_equal(pixels_of(tmp_path / "p.gif"), np.asarray(corners()))
    corners().convert("1").save(tmp_path / "one.png")
    assert set(np.unique(pixels_of(tmp_path / "one.png"))) <= {0, 255}


def test_16_bit_greys_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").mode.startswith("I")
    np.testing.assert_array_equal(pixels_of(tmp_path / "x.png")[..., 0].ravel(), np.arange(256))
    Image.fromarray(values).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(pixels_of(tmp_path / "x.tif")[..., 2].ravel(), np.arange(256))


def test_16_bit_colours_are_scaled(tmp_path: Path) -> None:
    """Pillow cannot write such files, so this one is put together by hand."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + b"".join(struct.pack(">HHH", v, 65535 - v, 32768) for v in range(0, 65536, 4096))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 1, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(data)
    pixels = pixels_of(tmp_path / "x.png")[0].astype(int)
    np.testing.assert_allclose(pixels[:, 0], np.arange(0, 65536, 4096) / 257, atol=1)
    np.testing.assert_allclose(pixels[:, 1], 255 - np.arange(0, 65536, 4096) / 257, atol=1)


def test_an_embedded_profile_is_applied_and_srgb_is_left_alone(tmp_path: Path) -> None:
    grey = Image.new("RGB", (16, 16), (100, 100, 100))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey.save(tmp_path / "srgb.png", icc_profile=srgb)
    assert (pixels_of(tmp_path / "srgb.png") == 100).all()
    grey.save(tmp_path / "other.png", icc_profile=linear_profile(srgb))
    assert (pixels_of(tmp_path / "other.png") > 140).all()


def linear_profile(srgb: bytes) -> bytes:
    """The sRGB profile with its tone curves replaced by straight lines and without its name."""
    count = int.from_bytes(srgb[128:132], "big")
    profile = bytearray(srgb)
    for tag in range(count):
        entry = 132 + 12 * tag
        name, offset = srgb[entry : entry + 4], int.from_bytes(srgb[entry + 4 : entry + 8], "big")
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv" + bytes(8)  # a curve of no points is the identity
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "line".encode("utf-16-be"))


@pytest.mark.parametrize("profile", [b"not a profile", b""])
def test_a_broken_profile_is_ignored_as_in_browsers(tmp_path: Path, profile: bytes) -> None:
    corners().save(tmp_path / "x.png", icc_profile=profile)
    np.testing.assert_array_equal(pixels_of(tmp_path / "x.png"), np.asarray(corners()))


def test_a_profile_of_another_colour_mode_is_ignored(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    corners().save(tmp_path / "x.png", icc_profile=lab)
    np.testing.assert_array_equal(pixels_of(tmp_path / "x.png"), np.asarray(corners()))


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    for name in ("x.gif", "x.png", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert tuple(pixels_of(tmp_path / name)[3, 3]) == RED


def test_bad_pictures_are_named_with_the_reason(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "whole.jpg", quality=95)
    data = (tmp_path / "whole.jpg").read_bytes()
    cases = {
        "empty.png": (b"", "the file is empty"),
        "cut.jpg": (data[: len(data) // 2], "truncated"),
        "text.png": (b"hello", "not a picture"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be decoded: .*{reason}"):
            read_facts(tmp_path / name)
    with pytest.raises(DataError, match="gone.png is not there"):
        read_facts(tmp_path / "gone.png")


def test_jpeg_xl_without_its_plugin_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)  # as if it were not installed
    (tmp_path / "x.jxl").write_bytes(b"")
    with pytest.raises(MissingPackageError, match="pip install pillow-jxl-plugin"):
        read_facts(tmp_path / "x.jxl")


def test_colours_without_a_known_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="colours of kind F"):
        read_facts(tmp_path / "x.tif")


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="bomb.png is too large"):
        read_facts(tmp_path / "bomb.png")


def test_text_chunks_of_a_png_do_no_harm(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat", zip=True)
    corners().save(tmp_path / "x.png", pnginfo=info)
    np.testing.assert_array_equal(pixels_of(tmp_path / "x.png"), np.asarray(corners()))


def test_resizing_is_area_down_and_lanczos_up_unless_said_otherwise(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient())
    picture.save(tmp_path / "x.png")
    for size, resampling, option in (
        ((32, 24), Image.Resampling.BOX, None),
        ((128, 96), Image.Resampling.LANCZOS, None),
        ((32, 24), Image.Resampling.BICUBIC, "cubic"),
        ((128, 96), Image.Resampling.NEAREST, "nearest"),
    ):
        item = make_item(tmp_path / "x.png", size, resize_interpolation=option)
        wanted = np.asarray(picture.resize(size, resampling))
        np.testing.assert_array_equal(load_pixels(item, None, flip=False)[0], wanted)


def test_the_middle_is_cut_out_and_mask_and_flip_follow(tmp_path: Path) -> None:
    picture, mask = gradient((64, 16)), gradient((64, 16))[..., 0]
    Image.fromarray(picture).save(tmp_path / "x.png")
    Image.fromarray(np.stack([mask, 255 - mask, mask * 0], axis=-1)).save(tmp_path / "mask.png")
    item = make_item(tmp_path / "x.png", (32, 16), mask=tmp_path / "mask.png")
    pixels, weights = load_pixels(item, None, flip=False)
    np.testing.assert_array_equal(pixels, picture[:, 16:48])
    np.testing.assert_allclose(weights, mask[:, 16:48] / 255, atol=1e-6)
    flipped, flipped_weights = load_pixels(item, None, flip=True)
    np.testing.assert_array_equal(flipped, pixels[:, ::-1])
    np.testing.assert_array_equal(flipped_weights, weights[:, ::-1])


def test_a_picture_that_changed_since_it_was_measured_is_noticed(tmp_path: Path) -> None:
    corners().save(tmp_path / "x.png")
    item = make_item(tmp_path / "x.png", (32, 16))
    corners((16, 16)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="changed while the program was running"):
        load_pixels(item, None, flip=False)


def test_random_crops_are_functions_of_the_key_and_reach_both_ends(tmp_path: Path) -> None:
    Image.fromarray(gradient((48, 16))).save(tmp_path / "x.png")
    item = make_item(tmp_path / "x.png", (32, 16), random_crop=True)
    lefts = {drawn_geometry(item, (0, epoch, 0, 0)).crop[0] for epoch in range(300)}
    assert min(lefts) == 0 and max(lefts) == 16
    one, same, other = (load_pixels(item, (0, epoch, 0, 0), flip=False)[0] for epoch in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_array_equal(load_pixels(item, None, flip=False)[0], gradient((48, 16))[:, 8:40])


def test_colours_shift_in_a_third_of_the_draws_and_only_a_little(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "x.png")
    item, plain = make_item(tmp_path / "x.png", (64, 48), color_aug=True), gradient().astype(int)
    shown = [load_pixels(item, (0, epoch, 0, 0), flip=False)[0] for epoch in range(120)]
    changed = [pixels for pixels in shown if (pixels != plain).any()]
    assert 20 < len(changed) < 60
    assert max(np.abs(pixels - plain).mean() for pixels in changed) < 40
    np.testing.assert_array_equal(load_pixels(item, None, flip=False)[0], plain)


def test_half_of_the_draws_are_flipped_if_asked(tmp_path: Path) -> None:
    corners().save(tmp_path / "x.png")
    item = make_item(tmp_path / "x.png", (32, 16), flip_aug=True)
    assert 70 < sum(is_flipped(item, (0, epoch, 0, 0)) for epoch in range(200)) < 130
    plain = make_item(tmp_path / "x.png", (32, 16))
    assert not any(is_flipped(plain, (0, epoch, 0, 0)) for epoch in range(50))


def test_faces_are_read_from_names() -> None:
    assert face_in_name(Path("me_at_home_120_80_40_50.png")) == Face(120, 80, 40, 50)
    assert face_in_name(Path("me_120_80_40.png")) is None
    assert face_in_name(Path("120_80_40_50.png")) is None
    assert face_in_name(Path("me_1_2_0_0.png")) is None


def test_face_crops_hold_the_face_at_the_asked_size(tmp_path: Path) -> None:
    Image.fromarray(gradient((400, 300))).save(tmp_path / "x_300_150_40_30.png")
    item = make_item(tmp_path / "x_300_150_40_30.png", (96, 64), face_crop_aug_range=(1.5, 4.0))
    scales = []
    for epoch in range(60):
        place = drawn_geometry(item, (0, epoch, 0, 0))
        scale = place.resized[0] / 400
        scales.append(scale)
        assert 1.4 < 64 / (40 * scale) < 4.1
        for side, start, centre, length in zip(
            place.bucket, place.crop, (300, 150), place.resized, strict=True
        ):
            assert 0 <= start <= length - side
            at_border = start in (0, length - side)
            assert at_border or abs(centre * scale - start - side / 2) <= 40 * scale / 20 + 1
    assert max(scales) > 1.5 * min(scales)
    assert drawn_geometry(item, None) == item.geometry
    assert load_pixels(item, (0, 3, 0, 0), flip=False)[0].shape == (64, 96, 3)
