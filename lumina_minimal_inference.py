"""Draws pictures with Lumina Image 2.0 and LoRAs.

    python lumina_minimal_inference.py --pretrained_model_name_or_path lumina.safetensors \\
        --gemma2_path gemma2.safetensors --ae_path ae.safetensors --prompt "a red fox" --seed 42

Notable facts:
- Prompts come from --prompt, from a file, or from the keyboard; see docs/inference.md.
- The sampler (library/flow) also draws the sample pictures in training: same settings, same picture.
- Options, weight files and prompts are checked before torch is imported, so a mistake is answered at once.
- Every PNG says in its text chunks how it was made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.core.entry import run_script
from library.core.errors import ConfigError, UserError
from library.core.files import require_writable_directory
from library.core.log import logger, setup_logging
from library.data.prompt_files import load_prompts
from library.inference.console import typed_requests
from library.models.gemma2_tokenizer import GemmaTokenizer, format_prompt, load_gemma2_tokenizer
from library.models.lumina2_files import check_models
from library.options.group import parse_options
from library.options.inference import LuminaInferenceOptions
from library.options.request import ImageRequest
from networks.files import inspect_lora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.data.batch import Condition
    from networks.lora import LoRANetwork

_log = logger("inference")


def main() -> None:
    """Check everything that can be checked cheaply, then load and draw."""
    options = parse_options(LuminaInferenceOptions, description="Draw pictures with Lumina Image 2.0.")
    setup_logging("INFO")
    requests = read_requests(options)
    check_files(options)
    chosen = options.models
    tokenizer = load_gemma2_tokenizer(chosen.gemma2_path, chosen.gemma2_tokenizer, chosen.tokenizer_cache_dir)
    models = LuminaModels(options, tokenizer)
    if options.run.interactive:
        draw_typed(models, options)
    else:
        models.prepare(requests)
        for request in requests:
            models.draw(request)


def read_requests(options: LuminaInferenceOptions) -> list[ImageRequest]:
    """Return the pictures that the command line asks for. Raises ConfigError."""
    start = options.picture.request()
    requests = load_prompts(options.run.from_file, start) if options.run.from_file else [start]
    for request in requests:
        check_multipliers(request, options)
    return requests


def check_files(options: LuminaInferenceOptions) -> None:
    """Read the headers of all weight files. Raises UserError for one that cannot be used."""
    models = options.models
    files = (models.pretrained_model_name_or_path, models.gemma2_path, models.ae_path)
    check_models(*files, options.quant)
    for lora in options.models.lora_weights:
        inspect_lora(lora.path)
    require_writable_directory(options.run.output_dir, "--output_dir")


def check_multipliers(request: ImageRequest, options: LuminaInferenceOptions) -> None:
    """Refuse LoRA multipliers that do not fit the LoRAs. Raises ConfigError."""
    given, loras = len(request.lora_multipliers), len(options.models.lora_weights)
    if given and options.models.merge_lora_weights:
        raise ConfigError("--m cannot weigh LoRAs that --merge_lora_weights has merged.")
    if given not in (0, loras):
        raise ConfigError(f"--m gives {given} multipliers, but --lora_weights names {loras} LoRAs.")


def draw_typed(models: LuminaModels, options: LuminaInferenceOptions) -> None:
    """Draw what is typed; a mistake costs one picture."""
    start = options.picture.request()
    for request in typed_requests(start, lambda request: check_multipliers(request, options)):
        try:
            models.draw(request)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


class LuminaModels:
    """The three models and the LoRAs. torch is imported here, after everything has been checked."""

    def __init__(self, options: LuminaInferenceOptions, tokenizer: GemmaTokenizer) -> None:
        from library.core.device import device_named, dtype_named
        from library.flow.generate import ImageModel
        from library.inference.artist import Artist
        from library.models.flux_vae import load_flux_vae
        from library.nn.shelf import Shelf

        chosen = options.models
        device = device_named(chosen.device)
        loaders = {
            "text": self._load_text_encoder,
            "transformer": self._load_transformer,
            "vae": lambda: load_flux_vae(chosen.ae_path, device=device, dtype=dtype_named(chosen.ae_dtype)),
        }
        self._options, self._tokenizer, self._device = options, tokenizer, device
        # Which of the LoRAs change the text encoder too, and how strongly they do at the moment.
        self._text_loras = [
            n for n, lora in enumerate(chosen.lora_weights) if inspect_lora(lora.path).has_text_encoder
        ]
        self._text_multipliers = tuple(chosen.lora_weights[n].multiplier for n in self._text_loras)
        self._shelf = Shelf(loaders, device, offload=chosen.offload)
        self.artist = Artist(ImageModel(self._velocity, self._decode, device), self._texts, self._encode)

    def prepare(self, requests: Sequence[ImageRequest]) -> None:
        """Encode the texts of all pictures at once, unless each may want other LoRAs on the text encoder."""
        if not (self._text_loras and any(request.lora_multipliers for request in requests)):
            self.artist.prepare(requests)

    def draw(self, request: ImageRequest) -> None:
        """Draw one picture and print its path."""
        chosen, run = self._options.models, self._options.run
        multipliers = request.lora_multipliers or tuple(lora.multiplier for lora in chosen.lora_weights)
        self._weigh_text_loras(multipliers)
        self.artist.prepare([request])  # first of all, so that --offload moves each model once a picture
        _, *networks = self._shelf.use("transformer")
        for network, multiplier in zip(networks, multipliers, strict=not chosen.merge_lora_weights):
            network.multiplier = multiplier
        print(self.artist.draw(request, run.output_dir, self._facts(multipliers)), flush=True)

    def _facts(self, multipliers: Sequence[float]) -> dict[str, str]:
        """What a picture's file says beside the request."""
        chosen, system_prompt = self._options.models, self._options.picture.system_prompt
        loras = [f"{w.path.stem}:{m:g}" for w, m in zip(chosen.lora_weights, multipliers, strict=True)]
        facts = {
            "Model": chosen.pretrained_model_name_or_path.stem,
            "LoRA": ", ".join(loras),
            "System prompt": system_prompt,
        }
        return {name: fact for name, fact in facts.items() if fact}

    def _texts(self, request: ImageRequest) -> tuple[str, str]:
        """The texts of prompt and negative prompt as the encoder sees them."""
        picture = self._options.picture
        before_negative = picture.system_prompt if picture.add_system_prompt_to_negative_prompt else ""
        return (
            format_prompt(picture.system_prompt, request.prompt),
            format_prompt(before_negative, request.negative_prompt),
        )

    def _encode(self, texts: Sequence[str]) -> list[Condition]:
        from library.models.gemma2 import encode_prompts

        limit = self._options.models.gemma2_max_token_length
        for text in texts:
            if (count := self._tokenizer.count(text)) > limit:
                _log.warning("only the first %d of %d tokens are used of: %.80s...", limit, count, text)
        # One by one: what a text is encoded with can change the last bits of its features.
        return encode_prompts(self._shelf.use("text")[0], self._tokenizer, texts, limit, batch_size=1)

    def _weigh_text_loras(self, multipliers: Sequence[float]) -> None:
        """Set the strength of LoRAs on the text encoder; what it said at another strength is forgotten."""
        wanted = tuple(multipliers[place] for place in self._text_loras)
        if self._options.models.merge_lora_weights or wanted == self._text_multipliers:
            return
        for network, multiplier in zip(self._shelf.use("text")[1:], wanted, strict=True):
            network.multiplier = multiplier
        self._text_multipliers = wanted
        self.artist.forget()

    def _velocity(self, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
        from library.models.lumina2 import velocity

        return velocity(self._shelf.use("transformer")[0], x_BCHW, sigma_B, conditions)

    def _decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._shelf.use("vae").decode_tiled(latents_BCHW)

    def _load_text_encoder(self) -> nn.ModuleList:
        """Return the text encoder, followed by the LoRAs that are applied to it and not merged."""
        from library.core.device import dtype_named
        from library.models.gemma2 import load_gemma2
        from networks.lora_lumina import create_text_network_from_file, text_model

        chosen = self._options.models
        dtype = dtype_named(chosen.gemma2_dtype)
        encoder = load_gemma2(
            chosen.gemma2_path,
            device=self._device,
            dtype=dtype,
            quant=self._options.quant,
        )
        model, weights = text_model(encoder), [chosen.lora_weights[n] for n in self._text_loras]
        networks = [create_text_network_from_file(model, w.path, w.multiplier) for w in weights]
        return _with_networks(encoder, model, networks, merged=chosen.merge_lora_weights)

    def _load_transformer(self) -> nn.ModuleList:
        """Return the transformer, followed by the LoRAs that are applied and not merged."""
        from library.core.device import dtype_named
        from library.models.lumina2 import load_nextdit
        from networks.lora_lumina import create_network_from_file

        chosen = self._options.models
        model = load_nextdit(
            chosen.pretrained_model_name_or_path,
            device=self._device,
            dtype=dtype_named(chosen.dtype),
            attention=self._options.attention.attention,
            quant=self._options.quant,
        )
        networks = [create_network_from_file(model, w.path, w.multiplier) for w in chosen.lora_weights]
        return _with_networks(model, model, networks, merged=chosen.merge_lora_weights)


def _with_networks(
    whole: nn.Module, model: nn.Module, networks: Sequence[LoRANetwork], *, merged: bool
) -> nn.ModuleList:
    """Merge networks into `model` or apply them to it; return `whole`, followed by those applied."""
    from torch import nn

    from networks.lora import merge

    if merged:
        merge(model, networks)
        return nn.ModuleList([whole])
    for network in networks:
        network.requires_grad_(False).apply_to(model)
    return nn.ModuleList([whole, *networks])


if __name__ == "__main__":
    run_script(main)
