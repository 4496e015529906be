"""Aspect buckets: which size a picture is trained at, and how it gets there.

A resolution stands for an area. The buckets are all sizes (w, h) whose sides are multiples of
`bucket_reso_steps`, where one side is as long as the area allows for the other:

    h = floor(area / w), rounded down to a step      and the same with the sides exchanged

from `min_bucket_reso` on, and up to `max_bucket_reso` if that is given (at 1024 pixels a cap of 1024 would
train a 2:3 picture at 704 x 1024, with 69% of the area; without it the bucket is 832 x 1216). A picture goes
to the bucket with the nearest aspect ratio, is resized to just cover it, and what hangs over is cut off
evenly.

With `bucket_no_upscale` a picture that would have to be enlarged gets a bucket of its own instead: its size,
rounded down to steps.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction
from functools import lru_cache

from library.core.errors import DataError
from library.data.items import BucketOptions, Geometry, Size

_LONGEST_SOURCE = 50  # times the bucket's area that a source may cover before it is cut


def geometry(size: Size, options: BucketOptions) -> Geometry:
    """Return where a picture of `size` lands: resized to cover its bucket, cut in the middle.

    Raises:
        DataError: with `bucket_no_upscale`, the picture is too small for any bucket.
    """
    if not options.enable_bucket:
        return cover(size, options.resolution)
    bucket = nearest_bucket(size, options)
    if options.bucket_no_upscale and (bucket[0] > size[0] or bucket[1] > size[1]):
        return _own_bucket(size, options)
    return cover(size, bucket)


def cover(size: Size, bucket: Size) -> Geometry:
    """Return the geometry that keeps proportions, covers `bucket`, and cuts off evenly what hangs over."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    width, height = (max(b, round(s * scale)) for b, s in zip(bucket, size, strict=True))
    return Geometry((width, height), ((width - bucket[0]) // 2, (height - bucket[1]) // 2), bucket)


def source_geometry(source: Size, target: Size, place: Geometry) -> Geometry:
    """Return where the picture lands that a picture of size `target`, which lands at `place`, is an edit of.

    With the same proportions (one could be the other, resized and rounded to whole pixels) it is resized and
    cut exactly like its target, so that what was not edited lies at the same pixels in both. With others it
    covers the bucket, cut in the middle.

    Raises:
        DataError: it is so long and thin that hardly anything of it would be left.
    """
    if abs(source[0] * target[1] - source[1] * target[0]) <= max(*source, *target):
        return place
    own = cover(source, place.bucket)
    if math.prod(own.resized) > _LONGEST_SOURCE * math.prod(own.bucket):
        raise DataError(
            f"it has {source[0]} x {source[1]} pixels, and less than 1/{_LONGEST_SOURCE} would be left "
            f"of it when it is cut to {own.bucket[0]} x {own.bucket[1]}"
        )
    return own


def bucket_sizes(options: BucketOptions) -> tuple[Size, ...]:
    """Return the buckets of a dataset in which pictures may be enlarged, sorted."""
    area, step = math.prod(options.resolution), options.bucket_reso_steps
    square = math.isqrt(area) // step * step
    longest = area // options.min_bucket_reso
    if options.max_bucket_reso is not None:
        longest = min(longest, options.max_bucket_reso)
    sizes = {(square, square)}
    for width in range(options.min_bucket_reso, longest + 1, step):
        height = min(area // width, longest) // step * step
        if height >= options.min_bucket_reso:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, options: BucketOptions) -> Size:
    """Return the bucket with the nearest aspect ratio, as a factor: portrait counts like landscape."""
    ratios, buckets = _by_ratio(options)
    ratio = _log_ratio(size)
    right = bisect_left(ratios, ratio)
    neighbours = buckets[max(0, right - 1) : right + 1]
    return min(neighbours, key=lambda b: (abs(_log_ratio(b) - ratio), -b[0] * b[1], -max(b)))


@lru_cache
def _by_ratio(options: BucketOptions) -> tuple[list[float], list[Size]]:
    """The buckets sorted by aspect ratio; of those with the same one, the largest."""
    largest: dict[Fraction, Size] = {}
    for bucket in sorted(bucket_sizes(options), key=math.prod):
        largest[Fraction(*bucket)] = bucket
    buckets = [largest[ratio] for ratio in sorted(largest)]
    return [_log_ratio(bucket) for bucket in buckets], buckets


def _log_ratio(size: Size) -> float:
    return math.log(size[0]) - math.log(size[1])


def _own_bucket(size: Size, options: BucketOptions) -> Geometry:
    """The picture's own size, shrunk if its area is too large, rounded down to steps."""
    limits = [1.0, math.sqrt(math.prod(options.resolution) / math.prod(size))]
    if options.max_bucket_reso is not None:
        limits.append(options.max_bucket_reso / max(size))
    step, scale = options.bucket_reso_steps, min(limits)
    width, height = (max(1, math.floor(side * scale)) for side in size)
    bucket = (width // step * step, height // step * step)
    if min(bucket) < options.min_bucket_reso:
        raise DataError(
            f"it has {size[0]} x {size[1]} pixels, which without enlarging gives a bucket of {bucket[0]} x "
            f"{bucket[1]}, and min_bucket_reso is {options.min_bucket_reso}: lower that, set "
            f"bucket_no_upscale = false, or remove the picture"
        )
    return Geometry((width, height), ((width - bucket[0]) // 2, (height - bucket[1]) // 2), bucket)
