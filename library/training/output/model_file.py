"""The file of a model whose own weights were trained: tensor by tensor, in the layout of its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.core.device import dtype_named
from library.core.weight_layout import WeightLayout
from library.nn.transformer import Transformer
from library.nn.weights.writer import WeightFile
from library.options.saving import ModelSavingOptions
from library.training.events import Moment
from library.training.guards import require_finite
from library.training.output.ema import Ema
from library.training.output.metadata import TrainingFacts
from library.training.output.trainee_file import ADVICE, AVERAGE, TraineeFile


class ModelFile(TraineeFile):
    """Writes the weights, and their running average from where it is kept."""

    def __init__(
        self,
        model: Transformer,
        layout: WeightLayout,
        facts: TrainingFacts,
        saving: ModelSavingOptions,
        *,
        ema: Ema | None = None,
        exact: Callable[[nn.Parameter], Tensor],
    ) -> None:
        """`exact`: returns all that is known of a weight, which may be more than the model computes with."""
        super().__init__(facts, saving.ending, ema)
        self._parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
        self._layout, self._exact = layout, exact
        self._dtype = None if saving.save_precision is None else dtype_named(saving.save_precision)

    def _write(self, path: Path, moment: Moment, weights: str) -> None:
        self._write_weights(path, moment, weights, self._weight)

    def _write_average(self, path: Path, moment: Moment, ema: Ema) -> None:
        self._write_weights(path, moment, AVERAGE, ema.average)

    def _write_weights(
        self, path: Path, moment: Moment, weights: str, weight_of: Callable[[str], Tensor]
    ) -> None:
        def check(name: str, tensor: Tensor) -> None:
            require_finite({name: tensor}, f"the {weights} weights after step {moment.step}")

        file = WeightFile(self._layout, weight_of, self._dtype_of)
        file.write(path, self._metadata(moment, weights), check=check, advice=ADVICE)

    def _weight(self, name: str) -> Tensor:
        """Return a weight as the model computes with it, where the file has room for no more than that."""
        parameter = self._parameters[name]
        return parameter if parameter.dtype == self._dtype_of(name) else self._exact(parameter)

    def _dtype_of(self, name: str) -> torch.dtype:
        return self._dtype or self._parameters[name].dtype
