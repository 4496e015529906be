"""Which network is trained, and what its file says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.options.group import REQUIRED, OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(OptionGroup):
    """Network.

    The small network (LoRA) that is trained while the model stays as it is.
    """

    network_module: str = option(REQUIRED, "module of the network, for instance networks.lora_lumina")
    network_dim: int = option(4, "rank of the LoRA: how much it can hold, and how large its file is")
    network_alpha: float = option(1.0, "strength: the LoRA is scaled by alpha / rank; 0 means the rank")
    network_dropout: float | None = option(None, "probability of dropping a hidden feature of the LoRA")
    network_args: tuple[str, ...] = option(
        (), "more settings of the network module, as key=value", nargs="*", metavar="KEY=VALUE"
    )
    network_weights: Path | None = option(None, "start from this LoRA file, of the same ranks and alpha")
    network_train_unet_only: bool = option(
        False, "train a LoRA on the DiT and none on the text encoder, which is what happens without it too"
    )

    def __post_init__(self) -> None:
        if self.network_dim < 1:
            raise ConfigError(f"--network_dim is {self.network_dim}; a rank must be 1 or more.")
        if not 0 <= self.network_alpha < float("inf"):
            raise ConfigError(f"--network_alpha is {self.network_alpha}; it must be 0 or more.")
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            raise ConfigError(f"--network_dropout is {self.network_dropout}; it must be from 0 to below 1.")
        self.args_by_key()

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
    """Metadata of the saved network.

    What was done is recorded by itself; these are the things that only you can say (modelspec.* keys).
    """

    no_metadata: bool = option(False, "record only what is needed to use the file, nothing of the training")
    training_comment: str | None = option(None, "a note for the metadata")
    metadata_title: str | None = option(None, "title (default: --output_name)")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "licence")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "how to use the network")
    metadata_thumbnail: str | None = option(None, "a small picture: a file, or a data: URL")
    metadata_merged_from: str | None = option(None, "what the network was merged from")
    metadata_trigger_phrase: str | None = option(None, "words in a prompt that call up what was learnt")
    metadata_preprocessor: str | None = option(None, "preprocessor that the input needs")
    metadata_is_negative_embedding: str | None = option(
        None, "whether it belongs into the negative prompt", choices=("true", "false")
    )

    def __post_init__(self) -> None:
        thumbnail = self.metadata_thumbnail
        if thumbnail is not None and not thumbnail.startswith("data:") and not Path(thumbnail).is_file():
            raise ConfigError(f"--metadata_thumbnail {thumbnail} is neither a file nor a data: URL.")
