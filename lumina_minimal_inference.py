"""Draws pictures with Lumina Image 2.0 and LoRAs.

    python lumina_minimal_inference.py --pretrained_model_name_or_path lumina.safetensors \\
        --gemma2_path gemma2.safetensors --ae_path ae.safetensors --prompt "a red fox" --seed 42

Notable facts:
- Prompts come from --prompt, from a file, or from the keyboard; see docs/inference.md.
- The sampler (library/flow) also draws the sample pictures in training: same settings, same picture.
- Options, weight files and prompts are checked before torch is imported, so a mistake is answered at once.
- Every PNG says in its text chunks how it was made.
- What is not Lumina's own is in library/inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from library.core.entry import run_script
from library.core.log import logger, setup_logging
from library.inference.script import InferenceScript
from library.models.gemma2_tokenizer import GemmaTokenizer, format_prompt, load_gemma2_tokenizer
from library.models.lumina2_files import check_models
from library.models.lumina2_format import linear_layers
from library.options.group import parse_options
from library.options.inference_lumina import LuminaInferenceOptions
from library.options.request import ImageRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.data.batch import Condition
    from library.inference.models import Models
    from library.models.flux_vae import FluxVAE
    from library.models.gemma2 import Gemma2Encoder
    from library.models.nextdit import NextDiT
    from networks.fit import Shapes

_log = logger("inference")


class LuminaInference(InferenceScript[str]):
    """The hooks of Lumina Image 2.0."""

    options: LuminaInferenceOptions
    _tokenizer: GemmaTokenizer

    def check_models(self) -> tuple[Shapes, int]:
        """Read the headers of the three weight files, and find the tokenizer."""
        models = self.options.models
        files = (models.pretrained_model_name_or_path, models.gemma2_path, models.ae_path)
        transformer = check_models(*files, self.options.quant).params
        self._tokenizer = load_gemma2_tokenizer(
            models.gemma2_path, models.gemma2_tokenizer, models.tokenizer_cache_dir
        )
        return linear_layers(transformer), transformer.n_blocks

    def load_text_encoder(self, device: torch.device) -> Gemma2Encoder:
        """Load Gemma2."""
        from library.core.device import dtype_named
        from library.models.gemma2 import load_gemma2

        models = self.options.models
        dtype = dtype_named(models.gemma2_dtype)
        return load_gemma2(models.gemma2_path, device=device, dtype=dtype, quant=self.options.quant)

    def load_transformer(self, device: torch.device) -> NextDiT:
        """Load the NextDiT."""
        from library.core.device import dtype_named
        from library.models.lumina2 import load_nextdit

        return load_nextdit(
            self.options.models.pretrained_model_name_or_path,
            device=device,
            dtype=dtype_named(self.options.models.dtype),
            attention=self.options.attention.attention,
            swap=self.options.swap,
            quant=self.options.quant,
        )

    def load_vae(self, device: torch.device) -> FluxVAE:
        """Load the FLUX autoencoder."""
        from library.core.device import dtype_named
        from library.models.flux_vae import load_flux_vae

        models = self.options.models
        return load_flux_vae(models.ae_path, device=device, dtype=dtype_named(models.ae_dtype))

    def prompts_of(self, request: ImageRequest) -> tuple[str, str]:
        """Put the system prompt before the prompt, and if asked for before the negative prompt."""
        picture = self.options.picture
        before_negative = picture.system_prompt if picture.add_system_prompt_to_negative_prompt else ""
        return (
            format_prompt(picture.system_prompt, request.prompt),
            format_prompt(before_negative, request.negative_prompt),
        )

    def encode(self, models: Models, prompts: Sequence[str]) -> list[Condition]:
        """Encode texts with Gemma2."""
        from library.models.gemma2 import encode_prompts

        limit = self.options.models.gemma2_max_token_length
        for text in prompts:
            if (count := self._tokenizer.count(text)) > limit:
                _log.warning("only the first %d of %d tokens are used of: %.80s...", limit, count, text)
        # One by one: what a text is encoded with can change the last bits of its features.
        return encode_prompts(models.text_encoder, self._tokenizer, prompts, limit, batch_size=1)

    def velocity(
        self, model: NextDiT, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """Predict the velocity in the house convention."""
        from library.models.lumina2 import velocity

        return velocity(model, x_BCHW, sigma_B, conditions)

    def facts(self) -> Mapping[str, str]:
        """Return the system prompt."""
        return {"System prompt": self.options.picture.system_prompt}


def main() -> None:
    """Read the options, then draw."""
    options = parse_options(LuminaInferenceOptions, description="Draw pictures with Lumina Image 2.0.")
    setup_logging("INFO")
    LuminaInference(options).run()


if __name__ == "__main__":
    run_script(main)
