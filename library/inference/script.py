"""The template of an inference script: what a family must say, and the order in which pictures are made.

This module does not import torch, so options, weight files and prompts are checked before the slow imports.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, final

from library.core.errors import ConfigError, UserError
from library.core.files import require_writable_directory
from library.core.log import logger
from library.core.versions import require_torch
from library.data.prompt_files import load_prompts, parse_line, sources_of
from library.inference.console import typed_requests
from library.options.inference import InferenceOptions
from library.options.request import ImageRequest
from networks.files import inspect_lora
from networks.fit import Shapes, check_widths

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.data.batch import Condition
    from library.inference.drawing import Drawing
    from library.inference.models import Models

PromptT = TypeVar("PromptT")  # what the text encoder is given: hashable
_log = logger("inference")


class InferenceScript(ABC, Generic[PromptT]):
    """Draws what the command line asks for. A family writes the hooks; nothing else may be overridden.

    Conventions are those of training: sigma 0 clean and 1 noise, velocity = noise - x0, scaled latents.
    """

    def __init__(self, options: InferenceOptions) -> None:
        self.options = options

    # --- what a family must write ---

    @abstractmethod
    def check_models(self) -> tuple[Shapes, int]:
        """Check the weight files by their headers; return the DiT's linear layers, and how many blocks it
        has. Torch-free; raises UserError."""

    @abstractmethod
    def load_text_encoder(self, device: torch.device) -> nn.Module:
        """Load what `encode` needs of text encoders."""

    @abstractmethod
    def load_transformer(self, device: torch.device) -> nn.Module:
        """Load the frozen DiT, with a `runner` for its blocks."""

    @abstractmethod
    def load_vae(self, device: torch.device) -> nn.Module:
        """Load the autoencoder, which has `decode_tiled`."""

    @abstractmethod
    def prompts_of(self, request: ImageRequest) -> tuple[PromptT, PromptT]:
        """Return prompt and negative prompt as they are encoded."""

    @abstractmethod
    def encode(self, models: Models, prompts: Sequence[PromptT]) -> list[Condition]:
        """Encode different prompts with the models that this needs, so that each is used once."""

    @abstractmethod
    def velocity(
        self, model: nn.Module, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """Return the DiT's velocity in the house convention, fp32."""

    # --- what a family may write ---

    def completed(self, request: ImageRequest) -> ImageRequest:
        """Return a request with all that it leaves open but the seed; refuse one that the model cannot draw.

        Torch-free; raises UserError.
        """
        sources_of([request], edits=False)
        return request

    def facts(self) -> Mapping[str, str]:
        """Return what a picture's file says beside request, model and LoRAs."""
        return {}

    def sampler_sigmas(self, steps: int, shift: float) -> list[float]:
        """Return the steps + 1 sigmas of the sampler, from 1 to 0."""
        from library.flow.solver import sampler_sigmas

        return sampler_sigmas(steps, shift)

    # --- the same for every family ---

    @final
    def run(self) -> None:
        """Check everything that can be checked cheaply, then load and draw."""
        require_torch()
        run = self.options.run
        layers, blocks = self.check_models()
        self._check_loras(layers)
        self.options.swap.check(blocks)
        start = self.options.picture.request()
        requests = load_prompts(run.from_file, start) if run.from_file else [start]
        requests = [self._checked(request) for request in requests]
        require_writable_directory(run.output_dir, "--output_dir")
        for sentence in (*self.options.adjustments(), *_options_as_text(start.prompt)):
            _log.warning("%s", sentence)
        from library.inference.drawing import Drawing  # here, because it imports torch

        drawing = Drawing(self)
        if run.interactive:
            self._draw_typed(drawing)
        else:
            drawing.draw_all(requests)

    def _check_loras(self, layers: Shapes) -> None:
        """Check by their headers that all LoRAs are for this DiT, or for its text encoder."""
        for lora in self.options.loras.lora_weights:
            check_widths(inspect_lora(lora.path), layers)

    def _checked(self, request: ImageRequest) -> ImageRequest:
        """Return a completed request. Raises UserError for one that cannot be drawn with these models."""
        given, loras = len(request.lora_multipliers), len(self.options.loras.lora_weights)
        if given and self.options.loras.merge_lora_weights:
            raise ConfigError("--m cannot weigh LoRAs that --merge_lora_weights has merged.")
        if given not in (0, loras):
            raise ConfigError(f"--m gives {given} multipliers, but --lora_weights names {loras} LoRAs.")
        return self.completed(request)

    def _draw_typed(self, drawing: Drawing[PromptT]) -> None:
        """Draw what is typed; a mistake costs one picture."""
        for request in typed_requests(self.options.picture.request(), self._checked):
            try:
                drawing.draw(request)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)


def _options_as_text(prompt: str) -> Iterator[str]:
    """Yield a sentence if a prompt of the command line has options in it, as the lines of a file may."""
    try:
        text = parse_line(prompt, ImageRequest()).prompt
    except ConfigError:
        return  # no line of a file either
    if text != prompt.strip():
        yield (
            f"--prompt is one text, options in it too: only {text!r} is the text of such a line in a file. "
            f"Draw the line with --from_file or --interactive, or give its options as flags of their own."
        )
