"""Pictures of an inference script, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Generic

from torch import Tensor

from library.core.device import device_named, dtype_named
from library.data.batch import Condition
from library.flow.generate import ImageModel
from library.inference.artist import Artist, PromptT
from library.inference.models import Models
from library.nn.attention import prepare_kernel
from library.options.request import ImageRequest

if TYPE_CHECKING:
    from library.inference.script import InferenceScript


class Drawing(Generic[PromptT]):
    """The models of a script at work."""

    def __init__(self, script: InferenceScript[PromptT]) -> None:
        """Raises UserError: `--device` names none that is there, or it cannot do what --attn_mode says."""
        self._script, self._options = script, script.options
        where = self._options.where
        device = device_named(where.device)
        prepare_kernel(self._options.attention.attention, device, dtype_named(self._options.models.dtype))
        self._models = Models(script, device)
        model = ImageModel(
            self._velocity,
            self._decode,
            device,
            sigmas=script.sampler_sigmas,
            sequential=where.sequential_cfg,
        )
        self._artist = Artist(model, script.prompts_of, partial(script.encode, self._models))

    def draw_all(self, requests: Sequence[ImageRequest]) -> None:
        """Encode all prompts at once, unless each may want other LoRAs on the text encoder; then draw."""
        if not (self._models.has_text_loras and any(request.lora_multipliers for request in requests)):
            self._artist.prepare(requests)
        for request in requests:
            self.draw(request)

    def draw(self, request: ImageRequest) -> None:
        """Draw one picture and print its path."""
        multipliers = request.lora_multipliers or self._options.loras.multipliers
        if self._models.weigh_text(multipliers):
            self._artist.forget()
        self._artist.prepare([request])  # first of all, so that --offload moves each model once a picture
        self._models.weigh(multipliers)
        facts = self._facts(multipliers)
        print(self._artist.draw(request, self._options.run.output_dir, facts), flush=True)

    def _velocity(self, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return self._script.velocity(self._models.transformer, x_BCHW, sigma_B, conditions)

    def _decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._models.vae.decode_tiled(latents_BCHW)

    def _facts(self, multipliers: Sequence[float]) -> dict[str, str]:
        """What a picture's file says beside the request."""
        weights = self._options.loras.lora_weights
        loras = [f"{w.path.stem}:{m:g}" for w, m in zip(weights, multipliers, strict=True)]
        facts = {
            "Model": self._options.models.pretrained_model_name_or_path.stem,
            "LoRA": ", ".join(loras),
            **self._script.facts(),
        }
        return {name: fact for name, fact in facts.items() if fact}
