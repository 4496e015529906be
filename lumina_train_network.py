"""Train a LoRA for Lumina Image 2.0.

Lumina's own clock runs the other way (t = 1 - sigma) and its network predicts x0 - noise; `velocity` in
`library/models/lumina2.py` turns that into the house convention. Everything else here is a pointer: which
files, which encoders, which model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.entry import run_script
from library.core.hashing import HashLedger
from library.core.weight_layout import WeightLayout
from library.models import lumina2_format, lumina2_identity
from library.models.gemma2_format import inspect_gemma2
from library.models.gemma2_tokenizer import GemmaTokenizer, find_tokenizer, format_prompt
from library.models.lumina2_files import check_models
from library.models.lumina2_format import linear_layers
from library.models.lumina2_identity import file_digests
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from library.training.family import FamilySpec, ModelFiles
from library.training.output.metadata import weight_file
from library.training.trainee.kind import CheckedModel
from library.training.trainer import NetworkTrainer
from networks.module import apply_base_text_weights, base_text_identity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.data.batch import Condition
    from library.data.prompt import Prompt
    from library.models.flux_vae import FluxVAE
    from library.models.gemma2 import Gemma2Encoder
    from library.models.nextdit import NextDiT
    from library.nn.running.routing import Routing

LUMINA2 = FamilySpec(
    name="lumina2",
    architecture="lumina-2",
    implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0",
    latent_channels=16,
    latent_stride=8,
    patch=2,
)


class LuminaTrainer(NetworkTrainer):
    """The hooks of Lumina Image 2.0.

    Models are imported where they are loaded, so a run with warm caches never imports Gemma2.
    """

    family = LUMINA2
    options: LuminaTrainOptions

    def check_files(self) -> CheckedModel:
        """Read the headers of the three weight files."""
        models = self.options.model
        files = (models.pretrained_model_name_or_path, models.gemma2, models.ae)
        found = check_models(*files, self.options.quant)
        params = found.params
        return CheckedModel(found, linear_layers(params), blocks=params.n_blocks, routed=params.n_layers)

    def model_files(self, ledger: HashLedger) -> ModelFiles:
        """Identify the weight files for states, and describe them for the metadata."""
        digests = file_digests(self.options.model, ledger)
        trained = {"pretrained_model_name_or_path"}
        if self.options.trainee.trains_text_encoder:
            trained |= {"gemma2", "gemma2_tokenizer"}
        return ModelFiles(
            described=self._describe(ledger),
            trained_on={flag: digest for flag, digest in digests.items() if flag in trained},
            read_by={flag: digest for flag, digest in digests.items() if flag not in trained},
        )

    def _describe(self, ledger: HashLedger) -> dict[str, str]:
        models = self.options.model
        described = {
            "system_prompt": models.system_prompt,
            "gemma2_max_token_length": str(models.gemma2_max_token_length),
            "max_token_length": str(models.gemma2_max_token_length),
        }
        files = {
            "sd_model": models.pretrained_model_name_or_path,
            "vae": models.ae,
            "gemma2": models.gemma2,
        }
        for kind, path in files.items():
            described |= weight_file(kind, path, ledger.sha256(path) if path.is_file() else None)
        return described

    def latent_identity(self, ledger: HashLedger) -> str:
        """Identify the autoencoder, and how it runs."""
        precision = self.options.training.mixed_precision
        return lumina2_identity.latent_identity(self.options.model, precision, ledger)

    def text_identity(self, ledger: HashLedger) -> str:
        """Identify Gemma2, with what --base_weights make of it, its tokenizer, and how it runs."""
        options = self.options
        return lumina2_identity.text_identity(
            options.model,
            options.training.mixed_precision,
            ledger,
            merged=base_text_identity(options.trainee, ledger.sha256),
            quant=options.quant.text_encoder_quant,
        )

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> FluxVAE:
        """Load the FLUX autoencoder, in fp32 with --no_half_vae."""
        import torch

        from library.models.flux_vae import load_flux_vae

        dtype = torch.float32 if self.options.model.no_half_vae else dtype
        return load_flux_vae(self.options.model.ae, device=device, dtype=dtype)

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> Gemma2Encoder:
        """Load Gemma2, with what --base_weights make of it."""
        from library.models.gemma2 import load_gemma2

        encoder = load_gemma2(
            self.options.model.gemma2,
            device=device,
            dtype=dtype,
            quant=self.options.quant,
        )
        apply_base_text_weights(self.options.trainee, encoder)
        return encoder

    def load_transformer(
        self, device: torch.device, dtype: torch.dtype, *, weights_on: torch.device | None = None
    ) -> NextDiT:
        """Load the NextDiT."""
        from library.models.lumina2 import load_nextdit

        models = self.options.model
        return load_nextdit(
            models.pretrained_model_name_or_path,
            device=device,
            dtype=dtype,
            attention=self.options.compute.attention,
            mmap=not models.disable_mmap_load_safetensors,
            swap=self.options.swap,
            weights_on=weights_on,
            quant=self.options.quant,
        )

    def encode_images(self, vae: FluxVAE, pixels_BCHW: Tensor) -> Tensor:
        """Return the mean of the posterior, scaled; a sample would freeze one random draw in the cache."""
        return vae.encode_mean(pixels_BCHW)

    def decode_latents(self, vae: FluxVAE, latents_BCHW: Tensor) -> Tensor:
        """Return pixels in [-1, 1], decoded in tiles where the picture is large."""
        return vae.decode_tiled(latents_BCHW)

    def format_prompt(self, text: str, *, negative: bool = False) -> str:
        """Put the system prompt before a caption or prompt; negative prompts go without."""
        return text if negative else format_prompt(self.options.model.system_prompt, text)

    @cached_property
    def _tokenizer(self) -> GemmaTokenizer:
        models = self.options.model
        return find_tokenizer(models.gemma2, models.gemma2_tokenizer, models.tokenizer_cache_dir).build()

    def encode_prompts(self, encoders: Gemma2Encoder, prompts: Sequence[Prompt]) -> list[Condition]:
        """Encode formatted texts with Gemma2."""
        from library.models.gemma2 import encode_prompts

        texts = [prompt.text for prompt in prompts]
        limit = self.options.model.gemma2_max_token_length
        return encode_prompts(encoders, self._tokenizer, texts, limit, batch_size=len(texts))

    def count_tokens(self, prompt: Prompt) -> tuple[int, int]:
        """Count Gemma's tokens."""
        return self._tokenizer.count(prompt.text), self.options.model.gemma2_max_token_length

    def text_encoder_bytes(self, encoders: Gemma2Encoder) -> int:
        """Count what is on the device: never the table of words."""
        return encoders.device_bytes()

    def encode_blank(self, encoders: Gemma2Encoder, tokens: int, count: int) -> list[Condition]:
        """Encode texts of Gemma2's token 0."""
        from library.data.batch import Condition

        return [Condition(tokens_LD) for tokens_LD in encoders.encode([[0] * tokens] * count)]

    def blank_condition(self, tokens: int, device: torch.device) -> Condition:
        """Return empty features of Gemma2's width."""
        import torch

        from library.data.batch import Condition

        width = inspect_gemma2(self.options.model.gemma2).params.hidden
        return Condition(torch.empty(tokens, width, device=device))

    def velocities(
        self,
        model: NextDiT,
        x: Sequence[Tensor],
        sigma_B: Tensor,
        conditions: Sequence[Condition],
        routing: Routing | None = None,
    ) -> list[Tensor]:
        """Predict the velocities in the house convention."""
        from library.models.lumina2 import velocities

        return velocities(model, x, sigma_B, conditions, routing)

    def weight_layout(self, params: lumina2_format.NextDiTParams, *, diffusers: bool) -> WeightLayout:
        """Return the layout of a file, or of a folder for diffusers."""
        make = lumina2_format.diffusers_layout if diffusers else lumina2_format.original_layout
        return make(params)


def main() -> None:
    """Read the options, then train."""
    LuminaTrainer(parse_options(LuminaTrainOptions, description=__doc__.partition("\n")[0])).train()


if __name__ == "__main__":
    run_script(main)
