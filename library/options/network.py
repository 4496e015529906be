"""Which network is trained, and what its file says about itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.core.errors import ConfigError
from library.options.elsewhere import OF_WHOLE_MODELS, SIMPLETUNER_LORA
from library.options.group import REQUIRED, OptionGroup, inert, option, refused
from library.options.trainee import TraineeOptions


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(TraineeOptions):
    """Network.

    The small network (LoRA) that is trained while the model stays as it is.
    """

    elsewhere = SIMPLETUNER_LORA | OF_WHOLE_MODELS
    new_start: ClassVar[str] = "start a new run from the LoRA file with --network_weights"
    architecture_suffix: ClassVar[str] = "/lora"

    network_module: str = option(
        REQUIRED,
        "kind of the network: networks.lora_lumina or networks.lora_kandinsky5, as the model is, or "
        "lycoris.kohya (docs/lycoris.md)",
    )
    network_dim: int = option(4, "rank of the LoRA: how much it can hold, and how large its file is")
    network_alpha: float = option(1.0, "strength: the LoRA is scaled by alpha / rank; 0 means the rank")
    network_dropout: float | None = option(None, "probability of dropping a hidden feature of the LoRA")
    network_args: tuple[str, ...] = option(
        (), "more settings of the network module, as key=value", nargs="*", metavar="KEY=VALUE"
    )
    network_weights: Path | None = option(
        None, "start from this LoRA file, of the same ranks, alpha and kind"
    )
    dim_from_weights: bool = option(False, "take layers, ranks, alphas and kind from --network_weights")
    scale_weight_norms: float | None = option(
        None,
        "after each step, scale down LoRAs whose norm is above this (max-norm; 1 is a good start); 0: none",
    )
    network_train_unet_only: bool = option(
        False, "train a LoRA on the DiT and none on the text encoder, which is what happens without it too"
    )
    network_train_text_encoder: bool = option(
        False, "train a LoRA on the text encoder too; few programs can use its part of the file"
    )
    network_train_text_encoder_only: bool = option(False, "train a LoRA on the text encoder only")
    text_encoder_lr: tuple[float, ...] = option(
        (),
        "rate of the text encoder (default: --learning_rate); above 0 it is trained, at 0 it is not",
        nargs="*",
        parse=float,
        metavar="NUMBER",
    )
    fused_backward_pass: bool = inert(
        "it saves the memory of a whole model's gradients; those of a network are small, and clipping needs "
        "them together",
        default=False,
    )
    full_fp16: bool = refused(
        "in fp16 the squares that AdamW keeps of small gradients become 0, and the weights infinite in a few "
        "steps; leave it out (--mixed_precision fp16 keeps the network in fp32, a few megabytes more), or "
        "use --full_bf16 with --mixed_precision bf16",
        default=False,
    )

    def __post_init__(self) -> None:
        TraineeOptions.__post_init__(self)
        if self.network_dim < 1:
            raise ConfigError(f"--network_dim is {self.network_dim}; a rank must be 1 or more.")
        if not 0 <= self.network_alpha < float("inf"):
            raise ConfigError(f"--network_alpha is {self.network_alpha}; it must be 0 or more.")
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            raise ConfigError(f"--network_dropout is {self.network_dropout}; it must be from 0 to below 1.")
        if self.scale_weight_norms is not None and not 0 <= self.scale_weight_norms < float("inf"):
            raise ConfigError(f"--scale_weight_norms is {self.scale_weight_norms}; it must be 0 or more.")
        self._check_files()
        self._check_text_encoder()
        self.args_by_key()

    @property
    def trains_dit(self) -> bool:
        """Whether the DiT gets a LoRA."""
        return not self.network_train_text_encoder_only

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder gets a LoRA."""
        asked = self.network_train_text_encoder or self.network_train_text_encoder_only
        return asked or (not self.network_train_unet_only and any(self.text_encoder_lr[:1]))

    @property
    def shaped_by(self) -> Path | None:
        """--network_weights, where ranks come from it."""
        return self.network_weights if self.dim_from_weights else None

    def described(self) -> dict[str, object]:
        """Return `--network_args` by key."""
        return {"network_args": self.args_by_key()}

    def settings(self) -> dict[str, object]:
        """Return arguments, whose order does not matter, and which models have a network on them."""
        return {
            "network_args": sorted(self.network_args),
            "network_train_text_encoder": self.trains_text_encoder,
            "network_train_text_encoder_only": not self.trains_dit,
        }

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that another one overrules or leaves without work."""
        yield from super().adjustments()
        if self.dim_from_weights:
            names = ("network_dim", "network_alpha")
            yield from self.without_effect(names, "--dim_from_weights takes it from --network_weights")
        if self.network_train_unet_only:
            reason = "--network_train_unet_only leaves the text encoder as it is"
            yield from self.without_effect(("text_encoder_lr",), reason)
        elif len(self.text_encoder_lr) > 1:
            others = " ".join(map(str, self.text_encoder_lr[1:]))
            yield (
                f"--text_encoder_lr {others} has no effect: there is one text encoder, and the first rate is "
                "its rate"
            )

    def _check_text_encoder(self) -> None:
        """Raise ConfigError for options about what is trained that do not go together."""
        rates = self.text_encoder_lr
        if not all(0 <= rate < math.inf for rate in rates):
            raise ConfigError(f"--text_encoder_lr is {' '.join(map(str, rates))}; it must be 0 or more.")
        asking = [
            name
            for name in ("network_train_text_encoder", "network_train_text_encoder_only")
            if getattr(self, name)
        ]
        if asking and 0 in rates[:1]:
            raise ConfigError(f"--{asking[0]} and --text_encoder_lr 0 contradict each other.")
        if self.network_train_unet_only and asking:
            raise ConfigError(f"--network_train_unet_only and --{asking[0]} contradict each other.")

    def _check_files(self) -> None:
        """Raise ConfigError for options about files that do not go together."""
        if self.dim_from_weights and self.network_weights is None:
            raise ConfigError("--dim_from_weights needs --network_weights, whose ranks it takes.")

    def args_by_key(self) -> dict[str, str]:
        """Return `--network_args` as texts by key. Raises ConfigError unless each is key=value, once."""
        found: dict[str, str] = {}
        for word in self.network_args:
            key, equals, value = word.partition("=")
            if not key or not equals:
                raise ConfigError(f"--network_args '{word}' must be written key=value, without spaces.")
            if key in found:
                raise ConfigError(f"--network_args has '{key}' twice.")
            found[key] = value
        return found


@dataclass(frozen=True, kw_only=True)
class MetadataOptions(OptionGroup):
    """Metadata of the saved file.

    What was done is recorded by itself; these are the things that only you can say (modelspec.* keys).
    """

    no_metadata: bool = option(False, "record only what is needed to use the file, nothing of the training")
    training_comment: str | None = option(None, "a note for the metadata")
    metadata_title: str | None = option(None, "title (default: --output_name)")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "licence")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "how to use it")
    metadata_thumbnail: str | None = option(None, "a small picture: a file, or a data: URL")
    metadata_merged_from: str | None = option(None, "what it was merged from")
    metadata_trigger_phrase: str | None = option(None, "words in a prompt that call up what was learnt")
    metadata_preprocessor: str | None = option(None, "preprocessor that the input needs")
    metadata_is_negative_embedding: str | None = option(
        None, "whether it belongs into the negative prompt", choices=("true", "false")
    )

    def __post_init__(self) -> None:
        thumbnail = self.metadata_thumbnail
        if thumbnail is not None and not thumbnail.startswith("data:") and not Path(thumbnail).is_file():
            raise ConfigError(f"--metadata_thumbnail {thumbnail} is neither a file nor a data: URL.")
