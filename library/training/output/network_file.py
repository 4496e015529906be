"""The file of a trained network."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from library.core.device import dtype_named
from library.core.files import require_room, write_bytes
from library.options.saving import DIFFUSERS, SavingOptions
from library.training.events import Moment
from library.training.guards import require_finite
from library.training.output.ema import Ema
from library.training.output.metadata import TrainingFacts
from library.training.output.trainee_file import ADVICE, TraineeFile
from networks.files import save_network
from networks.formats import to_diffusers
from networks.lora import LoRANetwork
from networks.names import MAGNITUDE


class NetworkFile(TraineeFile):
    """Writes a trained network under kohya's names, or those of diffusers."""

    def __init__(
        self, network: LoRANetwork, facts: TrainingFacts, saving: SavingOptions, ema: Ema | None = None
    ) -> None:
        super().__init__(facts, saving.ending, ema)
        self._network = network
        self._format = saving.save_format
        self._dtype = dtype_named(saving.save_precision or "float")  # None: as trained, in fp32

    def _write(self, path: Path, moment: Moment, weights: str) -> None:
        state, settings = self._content()
        require_finite(state, f"the {weights} weights after step {moment.step}")
        require_room(path, sum(tensor.nbytes for tensor in state.values()), ADVICE)
        if path.suffix != ".safetensors":  # a pickle, as torch writes it: it has no place for metadata
            content = BytesIO()  # torch itself would not say what the system has against a write
            torch.save(state, content)
            write_bytes(path, content.getbuffer())
            return
        save_network(path, state, self._metadata(moment, weights) | settings)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the network's tensors under the names of its format, and settings for the metadata."""
        if self._format != DIFFUSERS:
            return self._network.export_state(self._dtype), {}
        adapter = to_diffusers(self._network.export_state(), "the network")  # fp32, to be rounded once
        tensors = adapter.prefixed("transformer")
        exact = {key: t if key.endswith(MAGNITUDE) else t.to(self._dtype) for key, t in tensors.items()}
        return exact, adapter.metadata()
