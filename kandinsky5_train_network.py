"""Train a LoRA for Kandinsky 5.0 Image: text-to-image and image-to-image.

Which of the two is read off the DiT's file. A model that edits pictures takes its sources from
`conditioning_data_dir`; Qwen sees them as pictures, the DiT as latents. Kandinsky's own convention is the
house's: sigma is the share of noise, and the network predicts noise - x0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.entry import run_script
from library.core.hashing import HashLedger
from library.core.weight_layout import WeightLayout
from library.data.items import Manifest, Size
from library.data.prompt import Prompt
from library.models import file_identity, kandinsky5_format, kandinsky5_identity
from library.models.clip_tokenizer import MAX_TOKENS
from library.models.kandinsky5_data import check_data
from library.models.kandinsky5_files import (
    build_tokenizers,
    check_models,
    inspect_autoencoder,
    inspect_transformer,
)
from library.models.kandinsky5_format import Kandinsky5Checkpoint, linear_layers
from library.models.kandinsky5_identity import file_digests
from library.models.kandinsky5_prompt import Kandinsky5Tokenizers, count_tokens
from library.options.group import parse_options
from library.options.kandinsky5 import I2I, task_named
from library.options.request import ImageRequest
from library.options.train_kandinsky5 import Kandinsky5TrainOptions
from library.training.family import FamilySpec, ModelFiles
from library.training.output.metadata import weight_file
from library.training.trainee.kind import CheckedModel
from library.training.trainer import NetworkTrainer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.data.batch import Condition
    from library.models.flux_vae import FluxVAE
    from library.models.kandinsky5_dit import Kandinsky5DiT
    from library.models.kandinsky5_text import Kandinsky5TextEncoders
    from library.nn.running.routing import Routing

KANDINSKY5 = FamilySpec(
    name="kandinsky5_image_lite",
    architecture="kandinsky-5-image-lite",
    implementation="https://github.com/kandinskylab/kandinsky-5",
    latent_channels=16,
    latent_stride=8,
    patch=2,
)
# Texts that a streamed encoder takes at once: its layers come from the computer once for all of them.
_STREAMED_AT_ONCE = 256


class Kandinsky5Trainer(NetworkTrainer):
    """The hooks of Kandinsky 5.0 Image.

    Models are imported where they are loaded, so a run with warm caches never imports the text encoders.
    """

    family = KANDINSKY5
    options: Kandinsky5TrainOptions

    def check_files(self) -> CheckedModel:
        """Read the headers of the four weight files, and the tokenizers."""
        models = self.options.model
        found = check_models(
            models.pretrained_model_name_or_path,
            models.text_encoder_qwen,
            models.text_encoder_clip,
            models.vae,
            task=models.task,
            quant=self.options.quant,
        )
        self._tokenizers = build_tokenizers(models)  # a wrong one is told before an encoder is loaded
        params = found.params
        return CheckedModel(
            found, linear_layers(params), blocks=params.n_blocks, routed=params.n_visual_blocks
        )

    def model_files(self, ledger: HashLedger) -> ModelFiles:
        """Identify the weight files for states, and describe them for the metadata."""
        digests = file_digests(self.options.model, ledger)
        trained = {"pretrained_model_name_or_path"}
        return ModelFiles(
            described=self._describe(ledger),
            trained_on={flag: digest for flag, digest in digests.items() if flag in trained},
            read_by={flag: digest for flag, digest in digests.items() if flag not in trained},
        )

    def latent_identity(self, ledger: HashLedger) -> str:
        """Identify the autoencoder, and how it runs."""
        models, precision = self.options.model, self.options.training.mixed_precision
        precision = "no" if models.no_half_vae else precision
        return file_identity.latent_identity(inspect_autoencoder(models.vae), precision, ledger)

    def text_identity(self, ledger: HashLedger) -> str:
        """Identify Qwen and CLIP, their tokenizers, and how they run."""
        return kandinsky5_identity.text_identity(
            self.options.model,
            self.options.training.mixed_precision,
            ledger,
            vision=self.edits_pictures(),
            quant=self.options.quant.text_encoder_quant,
        )

    def _describe(self, ledger: HashLedger) -> dict[str, str]:
        models = self.options.model
        described = {
            "kandinsky5_task": self._transformer.params.task,
            "qwen_max_token_length": str(models.qwen_max_token_length),
            "max_token_length": str(models.qwen_max_token_length),
        }
        files = {
            "sd_model": models.pretrained_model_name_or_path,
            "vae": models.vae,
            "text_encoder_qwen": models.text_encoder_qwen,
            "text_encoder_clip": models.text_encoder_clip,
        }
        for kind, path in files.items():
            described |= weight_file(kind, path, ledger.sha256(path) if path.is_file() else None)
        return described

    @cached_property
    def _transformer(self) -> Kandinsky5Checkpoint:
        return inspect_transformer(self.options.model.pretrained_model_name_or_path, self.options.model.task)

    def edits_pictures(self) -> bool:
        """Whether the model is one that edits pictures: as --task says, which cache tools may do without the
        model for, or as its file says.
        """
        return (task_named(self.options.model.task) or self._transformer.params.task) == I2I

    def check_data(self, manifest: Manifest, samples: Sequence[ImageRequest]) -> list[str]:
        """Refuse sizes that there are no positions for, and captions with the mark of a picture.

        Returns a sentence for each flag about source pictures, where the model or the data has none.
        """
        check_data(manifest, samples)
        models = self.options.model
        if not self.edits_pictures() and task_named(models.task) is None:  # with --task, the options tell
            dit = models.pretrained_model_name_or_path
            return [*models.without_sources(f"{dit} draws from text alone")]
        if self.edits_pictures() and not any(item.source for item in manifest.items):
            return [*models.without_sources("no picture has a source (conditioning_data_dir)")]
        return []

    def source_dropout(self) -> float:
        """Return what --source_dropout_rate says."""
        return self.options.model.source_dropout_rate

    def texts_at_once(self, batch_size: int) -> int:
        """Return how many texts are encoded in one call: many, where the encoder is streamed for them."""
        return max(batch_size, _STREAMED_AT_ONCE) if self.options.model.stream_text_encoder else batch_size

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> FluxVAE:
        """Load the FLUX autoencoder with Kandinsky's scale and no shift, in fp32 with --no_half_vae."""
        import torch

        from library.models.flux_vae import load_flux_vae

        dtype = torch.float32 if self.options.model.no_half_vae else dtype
        return load_flux_vae(inspect_autoencoder(self.options.model.vae), device=device, dtype=dtype)

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> Kandinsky5TextEncoders:
        """Load Qwen and CLIP; Qwen's eyes only for a model that edits pictures."""
        from library.models.kandinsky5_text import load_text_encoders

        models = self.options.model
        return load_text_encoders(
            models.text_encoder_qwen,
            models.text_encoder_clip,
            device=device,
            dtype=dtype,
            vision=self.edits_pictures(),
            quant=self.options.quant,
            streamed=models.stream_text_encoder,
        )

    def text_encoder_bytes(self, encoders: Kandinsky5TextEncoders) -> int:
        """Count what is on the device: never Qwen's table of words, nor its layers where it is streamed."""
        return encoders.qwen.device_bytes() + super().text_encoder_bytes(encoders.clip)

    def load_transformer(
        self, device: torch.device, dtype: torch.dtype, *, weights_on: torch.device | None = None
    ) -> Kandinsky5DiT:
        """Load the DiT."""
        from library.models.kandinsky5 import load_kandinsky5

        return load_kandinsky5(
            self._transformer,
            device=device,
            dtype=dtype,
            attention=self.options.compute.attention,
            mmap=not self.options.model.disable_mmap_load_safetensors,
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

    @cached_property
    def _tokenizers(self) -> Kandinsky5Tokenizers:
        return build_tokenizers(self.options.model)

    def encode_prompts(self, encoders: Kandinsky5TextEncoders, prompts: Sequence[Prompt]) -> list[Condition]:
        """Encode captions with Qwen, which also sees the source pictures, and with CLIP."""
        from library.models.kandinsky5_text import encode_prompts

        batch_size = min(len(prompts), self.options.caching.text_encoder_batch_size)
        return encode_prompts(encoders, self._tokenizers, prompts, **self._limits, batch_size=batch_size)

    def count_tokens(self, prompt: Prompt) -> tuple[int, int]:
        """Count Qwen's tokens behind the template, those of a source picture too."""
        return count_tokens(self._tokenizers.qwen, prompt, **self._limits)

    def count_of_others(self, prompt: Prompt) -> dict[str, tuple[int, int]]:
        """Count CLIP's tokens."""
        return {"CLIP": (self._tokenizers.clip.count(prompt.text), MAX_TOKENS)}

    @property
    def _limits(self) -> dict[str, int]:
        """Where prompts are cut."""
        models = self.options.model
        return {"max_length": models.qwen_max_token_length, "edit_crop": int(models.edit_prompt_crop)}

    def encode_blank(self, encoders: Kandinsky5TextEncoders, tokens: int, count: int) -> list[Condition]:
        """Encode texts of Qwen's token 0."""
        return encoders.encode_blank(tokens, count)

    def see_blank(self, encoders: Kandinsky5TextEncoders, source: Size, count: int) -> object:
        """Let Qwen's vision tower look at sources of zeros."""
        return encoders.see_blank(source, count)

    def blank_condition(self, tokens: int, device: torch.device) -> Condition:
        """Return features of zeros, as wide as the text encoders'."""
        import torch

        from library.data.batch import Condition

        params = self._transformer.params
        return Condition(
            torch.zeros(tokens, params.text_dim, device=device), torch.zeros(params.pooled_dim, device=device)
        )

    def velocities(
        self,
        model: Kandinsky5DiT,
        x: Sequence[Tensor],
        sigma_B: Tensor,
        conditions: Sequence[Condition],
        routing: Routing | None = None,
    ) -> list[Tensor]:
        """Predict the velocities in the house convention, which is Kandinsky's."""
        from library.models.kandinsky5 import velocities

        return velocities(model, x, sigma_B, conditions, routing)

    def weight_layout(self, params: kandinsky5_format.Kandinsky5Params, *, diffusers: bool) -> WeightLayout:
        """Return the layout of a file, or of a folder for diffusers."""
        make = kandinsky5_format.diffusers_layout if diffusers else kandinsky5_format.original_layout
        return make(params)

    def sample_defaults(self) -> ImageRequest:
        """Return the official settings: 50 steps, guidance 3.5 all the way and not renormalised."""
        scale = self.options.model.scheduler_scale
        return ImageRequest(
            steps=50, guidance_scale=3.5, cfg_trunc_ratio=1.0, renorm_cfg=0.0, discrete_flow_shift=scale
        )

    def sampler_sigmas(self, steps: int, shift: float) -> list[float]:
        """Return the official steps of the sampler."""
        from library.flow.solver import shifted_sigmas

        return shifted_sigmas(steps, shift)


def main() -> None:
    """Read the options, then train."""
    Kandinsky5Trainer(parse_options(Kandinsky5TrainOptions, description=__doc__.partition("\n")[0])).train()


if __name__ == "__main__":
    run_script(main)
