"""Pictures: from a file to the pixels that are trained on.

A picture is turned as its EXIF orientation says, brought to 8-bit sRGB (16-bit is scaled, CMYK and palettes
are converted, an embedded ICC profile is applied), and what is transparent becomes white, unless the alpha
channel is the mask. Then it is resized, cut, and augmented as a function of the draw's key. Of an animation
the first frame counts.

The source of a picture, for models that edit, is augmented with it: cut at the same place, mirrored, and with
the same change of colours, because what differs between the two is what is to be learnt.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from library.core.errors import DataError, MissingPackageError
from library.core.files import explain
from library.core.hashing import sha256_file
from library.core.seeds import rng, unit
from library.data.buckets import cover, source_geometry
from library.data.items import DrawKey, Geometry, ImageOptions, Item, Size
from library.data.prompt import SourcePicture

_LANCZOS, _BOX = Image.Resampling.LANCZOS, Image.Resampling.BOX
_BICUBIC, _BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
_RESAMPLING = {
    "lanczos": _LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": _BILINEAR,
    "linear": _BILINEAR,
    "bicubic": _BICUBIC,
    "cubic": _BICUBIC,
    "area": _BOX,
    "box": _BOX,
}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "I;16L", "I;16N"}
# What Pillow's decoders raise for damaged files, found by feeding them mutated ones.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class PictureFacts:
    """What planning must know of a picture: its size after orientation, and whether it has transparency."""

    size: Size
    has_alpha: bool


@dataclass(frozen=True)
class Face:
    """A face in a picture, in its pixels: centre, width and height."""

    x: int
    y: int
    width: int
    height: int


def read_facts(path: Path) -> PictureFacts:
    """Decode a picture completely and return its facts.

    Raises:
        DataError: it cannot be decoded, or Pillow takes it for a decompression bomb.
        MissingPackageError: it is a JPEG XL file, and the plug-in for them is not installed.
    """
    picture = _open(path)
    return PictureFacts(picture.size, picture.has_transparency_data)


def load_pixels(item: Item, draw_key: DrawKey | None, *, flip: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return an item's pixels (H, W, 3) uint8 and its mask (H, W) float32 in 0..1, or None if it has no mask.

    Args:
        draw_key: decides random crop and colour; None takes the middle and leaves the colours alone.
        flip: mirror it. `is_flipped` decides that for a draw.

    Raises:
        DataError: the picture or its mask has gone bad since it was scanned.
    """
    options = item.subset.images
    picture = _open(item.path)
    if picture.size != item.size:
        raise DataError(f"{item.path} changed while the program was running; start it again.")
    colours, alpha = _to_srgb(picture)
    mask = _mask(item, alpha)
    if not options.alpha_mask:
        colours = _on_white(colours, alpha)
    geometry = drawn_geometry(item, draw_key)
    pixels = np.asarray(_cut(colours, geometry, options.resize_interpolation))
    weights = None if mask is None else np.asarray(_cut(mask, geometry, "area"), np.float32) / 255
    if draw_key and options.color_aug:
        pixels = _shift_colours(pixels, draw_key)
    if flip:
        pixels, weights = pixels[:, ::-1], None if weights is None else weights[:, ::-1]
    return np.ascontiguousarray(pixels), None if weights is None else np.ascontiguousarray(weights)


def load_source(source: SourcePicture) -> np.ndarray:
    """Return the pixels of a source picture, (H, W, 3) uint8. What is transparent in it is white.

    Raises:
        DataError: the picture has gone bad since it was looked at.
    """
    picture = _open(source.path)
    if source.size is not None and picture.size != source.size:
        raise DataError(f"{source.path} changed while the program was running; start it again.")
    pixels = np.asarray(_cut(_on_white(*_to_srgb(picture)), source.geometry, source.interpolation))
    if source.colours is not None:
        pixels = _shift_colours(pixels, source.colours)
    return np.ascontiguousarray(pixels[:, ::-1] if source.flipped else pixels)


def drawn_source(
    item: Item, draw_key: DrawKey | None, *, flip: bool, dropout: float = 0.0
) -> SourcePicture | None:
    """Return an item's source as a draw shows it; None if it has none, or the draw goes without.

    Args:
        draw_key: as for `load_pixels`; None never goes without.
        dropout: share of the draws that go without.
    """
    source, options = item.source, item.subset.images
    if source is None or (draw_key is not None and unit(*draw_key, "source dropout") < dropout):
        return None
    moves_along = source.geometry == item.geometry
    return SourcePicture(
        source.path,
        drawn_geometry(item, draw_key) if moves_along else source.geometry,
        source.digest,
        options.resize_interpolation,
        flipped=flip,
        size=source.size,
        colours=draw_key if options.color_aug else None,
    )


def source_variants(item: Item, dropout: float) -> tuple[SourcePicture | None, ...]:
    """Return an item's source in every way that draws show it, if neither crops nor colours are drawn anew.

    None is among them if draws may go without, and alone if there is no source.
    """
    plain = drawn_source(item, None, flip=False)
    if plain is None or item.held_out:
        return (plain,)
    flipped = [drawn_source(item, None, flip=True)] if item.subset.images.flip_aug else []
    return (plain, *flipped, *([None] if dropout > 0 else []))


def source_picture(path: Path, size: Size, own_size: Size | None = None) -> SourcePicture:
    """Return a picture as what is edited into one of `size`: it covers that, cut in the middle.

    Args:
        own_size: what `read_facts` says of it, where that was asked already; else it is decoded for this.

    Raises:
        DataError: it is not there, cannot be decoded, or is so long and thin that hardly anything would be
            left of it.
    """
    own_size = own_size or read_facts(path).size
    try:
        geometry = source_geometry(own_size, size, cover(size, size))
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error
    return SourcePicture(path, geometry, sha256_file(path), size=own_size)


def is_flipped(item: Item, draw_key: DrawKey) -> bool:
    """Whether a draw shows the picture mirrored."""
    return item.subset.images.flip_aug and unit(*draw_key, "flip") < 0.5


def drawn_geometry(item: Item, draw_key: DrawKey | None) -> Geometry:
    """Return the geometry of a draw: the item's own, unless it is cropped at random or around a face."""
    options = item.subset.images
    if draw_key is None:
        return item.geometry
    if options.face_crop_aug_range:
        face = face_in_name(item.path)
        if face:
            return _face_geometry(item, face, draw_key)
    if not options.random_crop:
        return item.geometry
    source, geometry = rng(*draw_key, "crop"), item.geometry
    left, top = (source.randint(0, r - b) for r, b in zip(geometry.resized, geometry.bucket, strict=True))
    return Geometry(geometry.resized, (left, top), geometry.bucket)


def face_in_name(path: Path) -> Face | None:
    """Return the face told at the end of a file name, `..._<centre x>_<centre y>_<width>_<height>.png`."""
    words = path.stem.split("_")[1:][-4:]
    if len(words) < 4 or not all(word.isdecimal() for word in words):
        return None
    face = Face(*map(int, words))
    return face if face.width > 0 and face.height > 0 else None


def _open(path: Path) -> Image.Image:
    """Decode the first frame of a picture, turned upright."""
    if path.suffix.lower() == ".jxl":
        _register_jpeg_xl()
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError as error:
        reason = f"is too large to be decoded safely ({error})"
        raise DataError(f"{path} {reason}; make it smaller, or leave it out.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there; correct its name, or put the picture back.") from error
    except _DAMAGE as error:
        raise DataError(f"{path} cannot be decoded: {_reason(path, error)}.") from error
    if picture.mode not in _MODES:
        raise DataError(
            f"{path} has colours of kind {picture.mode}, which cannot be read; save it as PNG in RGB."
        )
    return picture


def _register_jpeg_xl() -> None:
    try:
        import pillow_jxl  # noqa: F401  (importing it teaches Pillow the format)
    except ImportError as error:
        raise MissingPackageError("pillow_jxl", "a .jxl picture", "pillow-jxl-plugin") from error


def _reason(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not a picture of a known format"
    reason = explain(error) if isinstance(error, OSError) else str(error)
    return reason.rstrip(".") or type(error).__name__


def _to_srgb(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours of a picture as 8-bit sRGB, and its alpha channel (mode "L") or None."""
    profile, alpha = picture.info.get("icc_profile"), None
    if picture.mode.startswith("I"):
        picture = _to_8_bit(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    if picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("RGB")
    if profile:
        picture = _apply_profile(picture, profile)
    return picture.convert("RGB"), alpha


def _on_white(colours: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None:
        return colours
    return Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit greys, which Pillow's own conversion would clip at 255."""
    values = np.asarray(picture, dtype=np.uint32)
    return Image.fromarray(((values.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))


def _apply_profile(picture: Image.Image, profile: bytes) -> Image.Image:
    """Convert to sRGB. A profile that is damaged or of another colour mode is ignored, as in browsers."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return picture
        converted = ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    return converted or picture


def _mask(item: Item, alpha: Image.Image | None) -> Image.Image | None:
    """The loss mask (mode "L"): the red channel of the mask file, or the alpha channel."""
    if item.mask_path:
        mask, _ = _to_srgb(_open(item.mask_path))
        if mask.size != item.size:
            raise DataError(f"{item.mask_path} changed while the program was running; start it again.")
        return mask.getchannel("R")
    if item.subset.images.alpha_mask:
        return alpha or Image.new("L", item.size, 255)
    return None


def _cut(picture: Image.Image, geometry: Geometry, interpolation: str | None) -> Image.Image:
    (left, top), (width, height) = geometry.crop, geometry.bucket
    return _resize(picture, geometry.resized, interpolation).crop((left, top, left + width, top + height))


def _resize(picture: Image.Image, size: Size, interpolation: str | None) -> Image.Image:
    if picture.size == size:
        return picture
    shrinks = size[0] * size[1] < picture.width * picture.height
    return picture.resize(size, _RESAMPLING[interpolation or ("area" if shrinks else "lanczos")])


def _shift_colours(pixels: np.ndarray, draw_key: DrawKey) -> np.ndarray:
    """Every third draw: half of them turn the hue by up to 16 degrees, half have a gamma of 0.95 to 1.05."""
    source = rng(*draw_key, "colour")
    if source.random() >= 1 / 3:
        return pixels
    if source.random() < 0.5:
        hsv = np.array(Image.fromarray(pixels).convert("HSV"))
        hsv[..., 0] += np.uint8(round(source.uniform(-16, 16) * 256 / 360) % 256)  # wraps around, as hues do
        return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    curve = np.linspace(0, 1, 256) ** source.uniform(0.95, 1.05)
    return np.round(curve * 255).astype(np.uint8)[pixels]


def _face_geometry(item: Item, face: Face, draw_key: DrawKey) -> Geometry:
    """Scale so that the short side of the cut is between LOW and HIGH face sizes, and cut around the face."""
    options, bucket = item.subset.images, item.geometry.bucket
    source, least = rng(*draw_key, "face"), cover(item.size, bucket)
    face_size = max(face.width, face.height)
    low, high = (min(bucket) / (face_size * ratio) for ratio in reversed(options.face_crop_aug_range))
    smallest = max(b / s for b, s in zip(bucket, item.size, strict=True))
    low = max(smallest, min(low, 1.0))
    high = max(low, min(high, 1.0))
    scale = source.uniform(low, high)
    resized = tuple(max(r, round(s * scale)) for r, s in zip(least.resized, item.size, strict=True))
    crop = []
    for length, side, centre in zip(resized, bucket, (face.x, face.y), strict=True):
        centre = round(centre * scale)
        start = (
            centre
            - side // 2
            + _face_jitter(options, source, face_size * scale, max(length - centre, centre))
        )
        crop.append(min(max(start, 0), length - side))
    return Geometry(resized, (crop[0], crop[1]), bucket)


def _face_jitter(options: ImageOptions, source: random.Random, face_size: float, reach: int) -> int:
    """How far the face is off the middle: with random_crop up to `reach`, else a little."""
    if options.random_crop:
        return source.randint(0, reach) + source.randint(0, reach) - reach
    low, high = options.face_crop_aug_range
    amount = int(face_size / 20) if low != high else 0
    return source.randint(-amount, amount)
