"""All options of kandinsky5_train_network.py and kandinsky5_train.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.group import option
from library.options.kandinsky5 import Kandinsky5ModelOptions
from library.options.legacy import Kandinsky5LegacyOptions
from library.options.network import NetworkOptions
from library.options.timesteps import TimestepOptions
from library.options.train import FinetuneOptions, TrainOptions

_READ_SHIFT = ("shift", "sigma")


@dataclass(frozen=True, kw_only=True)
class Kandinsky5TimestepOptions(TimestepOptions):
    """Noise levels in training.

    sigma is the share of noise, from 0 (the picture) to 1 (noise only).
    """

    discrete_flow_shift: float = option(
        3.0, "shift towards noise of the samplings 'shift' and 'sigma'; 3 is what the model was trained with"
    )

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for the shift too, where neither training nor, as ever, the sampler reads it."""
        yield from super().adjustments()
        if self.timestep_sampling not in _READ_SHIFT:
            reason = f"only --timestep_sampling {' or '.join(_READ_SHIFT)} reads it"
            yield from self.without_effect(("discrete_flow_shift",), reason)


@dataclass(frozen=True)
class _Kandinsky5Options(TrainOptions):
    """What both training scripts of Kandinsky 5 can be told."""

    timesteps: Kandinsky5TimestepOptions
    model: Kandinsky5ModelOptions
    legacy: Kandinsky5LegacyOptions

    def _across_groups(self) -> Iterator[str]:
        yield from super()._across_groups()
        if not self.sampling.scheduled:
            yield from self.model.without_effect(("scheduler_scale",), "no sample pictures are drawn")


@dataclass(frozen=True)
class Kandinsky5TrainOptions(_Kandinsky5Options):
    """The options of kandinsky5_train_network.py."""

    trainee: NetworkOptions


@dataclass(frozen=True)
class Kandinsky5FinetuneOptions(_Kandinsky5Options, FinetuneOptions):
    """The options of kandinsky5_train.py."""
