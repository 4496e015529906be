"""Draws pictures with Kandinsky 5.0 Image and LoRAs, from text or from a picture and text.

    python kandinsky5_minimal_inference.py --dit kandinsky5lite_t2i.safetensors \\
        --text_encoder_qwen qwen_2.5_vl_7b --text_encoder_clip clip_l.safetensors \\
        --vae ae.safetensors --prompt "a red fox" --seed 42

Notable facts:
- What the model can do is read off the DiT's file. A model that edits takes --image, which it sees twice:
  Qwen as a picture beside the prompt, the DiT as latents beside the noise. Without one it draws from text.
- Steps, guidance and the autoencoder's scaling are the official ones; see docs/inference.md.
- Options, weight files, prompts and pictures are checked before torch is imported.
- What is not Kandinsky's own is in library/inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.entry import run_script
from library.core.errors import ConfigError
from library.core.log import logger, setup_logging
from library.data.items import Size
from library.data.prompt import Prompt, SourcePicture
from library.inference.script import InferenceScript
from library.inference.sizes import sized
from library.models.clip_tokenizer import MAX_TOKENS
from library.models.kandinsky5_files import build_tokenizers, check_models, inspect_autoencoder
from library.models.kandinsky5_format import check_patches, linear_layers
from library.models.kandinsky5_prompt import Kandinsky5Tokenizers, count_tokens
from library.options.group import parse_options
from library.options.inference_kandinsky5 import SIZES, Kandinsky5InferenceOptions
from library.options.kandinsky5 import I2I, task_named
from library.options.request import SIZE_STEP, ImageRequest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from library.data.batch import Condition
    from library.inference.models import Models
    from library.models.flux_vae import FluxVAE
    from library.models.kandinsky5_dit import Kandinsky5DiT
    from library.models.kandinsky5_text import Kandinsky5TextEncoders
    from networks.fit import Shapes

_PICTURES_KEPT = 16  # decoded, for Qwen, the negative prompt and the autoencoder
_log = logger("inference")


class Kandinsky5Inference(InferenceScript[Prompt]):
    """The hooks of Kandinsky 5.0 Image."""

    options: Kandinsky5InferenceOptions
    _tokenizers: Kandinsky5Tokenizers
    _edits: bool

    def __init__(self, options: Kandinsky5InferenceOptions) -> None:
        super().__init__(options)
        self._sizes: dict[tuple[Path, int, int], Size] = {}  # by path, and when and how large it was
        self._sources: dict[tuple[Path, Size], SourcePicture] = {}  # by path, and size of what is drawn

    def check_models(self) -> tuple[Shapes, int]:
        """Read the headers of the four weight files, and find the tokenizers."""
        models = self.options.models
        files = (models.text_encoder_qwen, models.text_encoder_clip, models.vae)
        transformer = check_models(
            models.pretrained_model_name_or_path, *files, task=models.task, quant=self.options.quant
        ).params
        self._edits = transformer.task == I2I
        if not self._edits and task_named(models.task) is None:  # with --task, the options tell
            reason = f"{models.pretrained_model_name_or_path} draws from text alone"
            for sentence in models.without_effect(("edit_prompt_crop",), reason):
                _log.warning("%s", sentence)
        self._tokenizers = build_tokenizers(models)
        return linear_layers(transformer), transformer.n_blocks

    def completed(self, request: ImageRequest) -> ImageRequest:
        """Fill in the size, and look at the picture that is edited."""
        from library.data.images import source_picture  # here, because it imports Pillow and numpy

        path = request.source
        if path is not None and not self._edits:
            dit = self.options.models.pretrained_model_name_or_path
            raise ConfigError(
                f"--image or --ci names {path}, but {dit} draws from text alone; leave it out, or name a "
                f"model that edits pictures (I2I)."
            )
        own_size = None if path is None else self._looked_at(path)
        request = sized(request, SIZES, own_size)
        if own_size is not None:
            size = request.width, request.height
            self._sources[path, size] = source_picture(path, size, own_size)
        check_patches(request.height // SIZE_STEP, request.width // SIZE_STEP)
        for prompt in self.prompts_of(request):
            count_tokens(self._tokenizers.qwen, prompt, **self._limits)  # refuses what cannot be encoded
        return request

    def _looked_at(self, path: Path) -> Size:
        """Return the size of a picture, which is decoded for it, but not for every prompt that names it."""
        from library.data.images import read_facts

        try:
            stat = path.stat()
        except OSError:
            return read_facts(path).size  # which says what is wrong
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in self._sizes:
            self._sizes[key] = read_facts(path).size
        return self._sizes[key]

    @property
    def _limits(self) -> dict[str, int]:
        """Where prompts are cut."""
        models = self.options.models
        return {"max_length": models.qwen_max_token_length, "edit_crop": int(models.edit_prompt_crop)}

    def load_text_encoder(self, device: torch.device) -> Kandinsky5TextEncoders:
        """Load Qwen2.5-VL, with eyes for a model that edits, and CLIP."""
        from library.core.device import dtype_named
        from library.models.kandinsky5_text import load_text_encoders

        models = self.options.models
        return load_text_encoders(
            models.text_encoder_qwen,
            models.text_encoder_clip,
            device=device,
            dtype=dtype_named(models.text_encoder_dtype),
            vision=self._edits,
            quant=self.options.quant,
            streamed=models.stream_text_encoder,
        )

    def load_transformer(self, device: torch.device) -> Kandinsky5DiT:
        """Load the DiT."""
        from library.core.device import dtype_named
        from library.models.kandinsky5 import load_kandinsky5

        models = self.options.models
        return load_kandinsky5(
            models.pretrained_model_name_or_path,
            device=device,
            dtype=dtype_named(models.dtype),
            attention=self.options.attention.attention,
            mmap=not models.disable_mmap_load_safetensors,
            swap=self.options.swap,
            quant=self.options.quant,
        )

    def load_vae(self, device: torch.device) -> FluxVAE:
        """Load the FLUX autoencoder, which Kandinsky scales without a shift."""
        from library.core.device import dtype_named
        from library.models.flux_vae import load_flux_vae

        models = self.options.models
        found = inspect_autoencoder(models.vae)
        return load_flux_vae(found, device=device, dtype=dtype_named(models.vae_dtype))

    def prompts_of(self, request: ImageRequest) -> tuple[Prompt, Prompt]:
        """Put the picture that is edited beside the prompt, and beside the negative prompt."""
        source = None
        if request.source is not None:
            source = self._sources[request.source, (request.width, request.height)]
        return Prompt(request.prompt, source), Prompt(request.negative_prompt, source)

    def encode(self, models: Models, prompts: Sequence[Prompt]) -> list[Condition]:
        """Encode texts with Qwen and CLIP, then the pictures that are edited with the autoencoder."""
        from library.data.images import load_source
        from library.models.kandinsky5_text import encode_prompts

        limits, load = self._limits, lru_cache(_PICTURES_KEPT)(load_source)
        for prompt in prompts:
            counts = {
                "Qwen2.5-VL": count_tokens(self._tokenizers.qwen, prompt, **limits),
                "CLIP": (self._tokenizers.clip.count(prompt.text), MAX_TOKENS),
            }
            for encoder, (count, limit) in counts.items():
                if count > limit:
                    _log.warning(
                        "%s takes only the first %d of %d tokens of: %.80s...",
                        *(encoder, limit, count, prompt.text),
                    )
        # One by one: what a text is encoded with can change the last bits of its features.
        conditions = encode_prompts(
            models.text_encoder, self._tokenizers, prompts, batch_size=1, load=load, **limits
        )
        pictures = dict.fromkeys(prompt.source for prompt in prompts if prompt.source is not None)
        latents = {source: _encoded(models.vae, load(source), models.device) for source in pictures}
        return [
            replace(condition, source_Chw=latents.get(prompt.source))
            for condition, prompt in zip(conditions, prompts, strict=True)
        ]

    def velocity(
        self, model: Kandinsky5DiT, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """Predict the velocity."""
        from library.models.kandinsky5 import velocity

        return velocity(model, x_BCHW, sigma_B, conditions)

    def sampler_sigmas(self, steps: int, shift: float) -> list[float]:
        """Return the official steps: even ones, shifted once."""
        from library.flow.solver import shifted_sigmas

        return shifted_sigmas(steps, shift)


def _encoded(vae: FluxVAE, pixels: np.ndarray, device: torch.device) -> Tensor:
    """Return the latents of a picture that is edited, (H, W, 3) uint8."""
    import torch

    pixels_HWC = torch.tensor(pixels, device=device)
    pixels_1CHW = pixels_HWC.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    return vae.encode_mean(pixels_1CHW)[0]


def main() -> None:
    """Read the options, then draw."""
    options = parse_options(Kandinsky5InferenceOptions, description="Draw with Kandinsky 5.0 Image.")
    setup_logging("INFO")
    Kandinsky5Inference(options).run()


if __name__ == "__main__":
    run_script(main)
