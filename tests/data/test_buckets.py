"""Every picture lands in one bucket, covers it, and the bucket has the area that was asked for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.core.errors import DataError
from library.data.buckets import bucket_sizes, geometry, nearest_bucket
from library.data.items import BucketOptions

sides = st.integers(1, 12_000)
sizes = st.tuples(sides, sides)


@st.composite
def bucket_options(draw: st.DrawFn, no_upscale: bool = False) -> BucketOptions:
    step = draw(st.sampled_from([16, 32, 64]))
    width, height = (16 * draw(st.integers(-(-step // 16), 100)) for _ in range(2))
    least = draw(st.integers(1, min(width, height) // step)) * step
    longest = draw(st.none() | st.integers(-(-max(width, height) // step), 300).map(lambda n: n * step))
    return BucketOptions((width, height), True, least, longest, step, no_upscale)


@given(sizes, bucket_options())
def test_picture_covers_its_bucket_and_little_is_cut_off(
    size: tuple[int, int], options: BucketOptions
) -> None:
    place = geometry(size, options)
    for resized, start, side in zip(place.resized, place.crop, place.bucket, strict=True):
        assert 0 <= start <= resized - side
        assert abs((resized - side) - 2 * start) <= 1
    assert min(r - b for r, b in zip(place.resized, place.bucket, strict=True)) == 0
    scale = max(b / s for b, s in zip(place.bucket, size, strict=True))
    for resized, side in zip(place.resized, size, strict=True):
        assert abs(resized - side * scale) <= 1


@given(bucket_options())
def test_bucket_sides_are_steps_within_limits_and_areas_are_near_the_resolution(
    options: BucketOptions,
) -> None:
    area, step = math.prod(options.resolution), options.bucket_reso_steps
    longest = options.max_bucket_reso or area
    sizes = bucket_sizes(options)
    assert sizes
    for width, height in sizes:
        assert width % step == height % step == 0
        assert options.min_bucket_reso <= min(width, height) and max(width, height) <= longest
        assert width * height <= area
        missing = step * max(width, height) if width != height else step * (2 * width + step)
        capped = max(width, height) + step > longest
        assert capped or area - width * height < missing


@given(sizes, bucket_options())
def test_turned_picture_gets_the_turned_bucket(size: tuple[int, int], options: BucketOptions) -> None:
    assert nearest_bucket(size[::-1], options) == nearest_bucket(size, options)[::-1]


@given(sizes, bucket_options())
def test_no_other_bucket_is_nearer_in_aspect_ratio(size: tuple[int, int], options: BucketOptions) -> None:
    def error(bucket: tuple[int, int]) -> float:
        return abs(math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1]))

    chosen = nearest_bucket(size, options)
    assert error(chosen) <= min(map(error, bucket_sizes(options))) + 1e-9


@given(sizes, bucket_options(no_upscale=True))
def test_without_upscaling_no_picture_is_enlarged(size: tuple[int, int], options: BucketOptions) -> None:
    try:
        place = geometry(size, options)
    except DataError:
        assert min(size) < 2 * options.min_bucket_reso or max(size) > 4 * min(size)
        return
    assert all(r <= s for r, s in zip(place.resized, size, strict=True))
    assert all(b % options.bucket_reso_steps == 0 and b > 0 for b in place.bucket)
    assert math.prod(place.bucket) <= math.prod(options.resolution)
    assert max(place.bucket) <= (options.max_bucket_reso or max(place.bucket))


@pytest.mark.parametrize(
    ("size", "longest", "step", "bucket"),
    [
        ((2000, 3000), None, 64, (832, 1216)),
        ((2000, 3000), None, 16, (832, 1248)),
        ((2000, 3000), 1024, 64, (704, 1024)),
        ((3000, 3000), None, 64, (1024, 1024)),
        ((1920, 1080), None, 64, (1344, 768)),
    ],
)
def test_well_known_buckets_at_1024(
    size: tuple[int, int], longest: int | None, step: int, bucket: tuple[int, int]
) -> None:
    assert geometry(size, BucketOptions((1024, 1024), True, 256, longest, step)).bucket == bucket


def test_without_buckets_everything_is_cut_to_the_resolution() -> None:
    place = geometry((640, 427), BucketOptions((512, 256)))
    assert place.bucket == (512, 256) and place.resized == (512, 342) and place.crop == (0, 43)


def test_small_picture_gets_a_bucket_of_its_own_and_a_tiny_one_is_refused() -> None:
    options = BucketOptions((1024, 1024), True, 256, None, 64, bucket_no_upscale=True)
    assert geometry((500, 333), options).bucket == (448, 320)
    with pytest.raises(DataError, match="min_bucket_reso is 256"):
        geometry((300, 200), options)
