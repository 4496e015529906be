"""How noisy a training picture is: sigma as a function of one uniform number.

Every sampling is written as a map from u in (0, 1) to sigma, so a draw is reproducible from its key
alone, and a fixed grid of u gives a fixed grid of sigma. All of it is double precision; sigma is handed
on as fp32.

    sampling        sigma
    uniform         u
    sigmoid         s = sigmoid(sigmoid_scale * N)                       N: standard normal
    shift           s shifted by discrete_flow_shift
    nextdit_shift   u shifted by the resolution's shift                  the recipe of Lumina Image 2.0
    flux_shift      s shifted by the resolution's shift                  the recipe of FLUX
    sigma           a row of the shifted table of 1000 sigmas, drawn from weighting_scheme's density

min_timestep and max_timestep cut a density off at both ends: between them it keeps its form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

from library.core import seeds
from library.options.timesteps import TimestepOptions

TABLE_SIZE = 1000
_NORMAL = NormalDist()
_BISECTIONS = 53
_TINY = 2.0**-53  # keeps u inside (0, 1), where the normal quantile is finite


def draw_sigma(options: TimestepOptions, tokens: int, seed: int, *key: int) -> float:
    """Return the sigma of one sample, a function of (seed, key).

    Args:
        tokens: image tokens of the sample, for the shifts that depend on resolution.
        key: what the draw is for: (step, micro, slot).
    """
    return sigma_at(options, tokens, seeds.unit(seed, "sigma", *key))


def sigma_at(options: TimestepOptions, tokens: int, u: float) -> float:
    """Return the sigma in [0, 1] that the options' sampling gives to the uniform number `u`."""
    low, high = options.sigma_range
    if (low, high) == (0, 1):
        return _uncut_sigma(options, tokens, u)
    first, last = _range_of_u(options, tokens)
    return min(max(_uncut_sigma(options, tokens, first + (last - first) * u), low), high)


def _uncut_sigma(options: TimestepOptions, tokens: int, u: float) -> float:
    return _SAMPLINGS[options.timestep_sampling](options, tokens, min(max(u, _TINY), 1 - _TINY))


@lru_cache(maxsize=1024)
def _range_of_u(options: TimestepOptions, tokens: int) -> tuple[float, float]:
    """Return the u of the least and of the greatest sigma that is allowed; every sampling is monotonic."""
    rises = _uncut_sigma(options, tokens, 1) > _uncut_sigma(options, tokens, 0)
    low, high = (_place_of(options, tokens, bound, rises) for bound in options.sigma_range)
    return low, high


def _place_of(options: TimestepOptions, tokens: int, sigma: float, rises: bool) -> float:
    """Find by bisection the u from which on (rising), or up to which (falling), sigma is at least `sigma`."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if (_uncut_sigma(options, tokens, middle) < sigma) == rises:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def shift(sigma: float, factor: float) -> float:
    """Move sigma towards noise (factor > 1) or towards the picture; 0 and 1 stay: SD3 paper, equation 23."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def resolution_shift(tokens: int) -> float:
    """Return the shift factor e^mu of so many image tokens; mu is linear: 0.5 at 256, 1.15 at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def _sigmoid_normal(u: float, mean: float = 0.0, std: float = 1.0) -> float:
    """sigmoid of a normal number, from its quantile u."""
    return 1 / (1 + math.exp(-(mean + std * _NORMAL.inv_cdf(u))))


def _uniform(options: TimestepOptions, tokens: int, u: float) -> float:
    return u


def _sigmoid(options: TimestepOptions, tokens: int, u: float) -> float:
    return _sigmoid_normal(u, std=options.sigmoid_scale)


def _shift(options: TimestepOptions, tokens: int, u: float) -> float:
    return shift(_sigmoid(options, tokens, u), options.discrete_flow_shift)


def _nextdit_shift(options: TimestepOptions, tokens: int, u: float) -> float:
    return shift(u, resolution_shift(tokens))


def _flux_shift(options: TimestepOptions, tokens: int, u: float) -> float:
    return shift(_sigmoid(options, tokens, u), resolution_shift(tokens))


def _table_row(options: TimestepOptions, tokens: int, u: float) -> float:
    """Row 0 of the table is pure noise, so the density's 0 is the noise end."""
    row = min(int(_density(options, u) * TABLE_SIZE), TABLE_SIZE - 1)
    return shift((TABLE_SIZE - row) / TABLE_SIZE, options.discrete_flow_shift)


def _density(options: TimestepOptions, u: float) -> float:
    """Bend a uniform number into the density of weighting_scheme: SD3 paper, section 3.1."""
    if options.weighting_scheme == "logit_normal":
        return _sigmoid_normal(u, options.logit_mean, options.logit_std)
    if options.weighting_scheme == "mode":
        return 1 - u - options.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


_SAMPLINGS: dict[str, Callable[[TimestepOptions, int, float], float]] = {
    "sigma": _table_row,
    "uniform": _uniform,
    "sigmoid": _sigmoid,
    "shift": _shift,
    "nextdit_shift": _nextdit_shift,
    "flux_shift": _flux_shift,
}
