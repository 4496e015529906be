"""What networks must know of a family of models: its layers, by the names that tools have for them.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from library.core.errors import ConfigError
from library.options.network import NetworkOptions
from networks.families.args import LoRAArgs
from networks.names import DIT, kohya_name

_OF_BLOCK = re.compile(r"(.+?)_(\d+)_(.+)")
_BLOCK_PATH = re.compile(r"(.+?)\.(\d+)\.(.+)")


class Place(NamedTuple):
    """A linear layer of the model. `part`: 0, 1 or 2 if the name is of q, k or v only, which it makes."""

    path: str
    part: int | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models.

    Attributes:
        name: as messages call it. module: what `--network_module` calls its LoRAs.
        args: what `--network_args` may say. refused: keys that are turned down, with the reason.
        layers: the model's linear layers, each with what diffusers calls it, or the parts that it has there;
            * is the number of a block.
        aliases: more names, each with the name in diffusers that it stands for.
        classes: what the original code calls the classes of modules, by path; LyCORIS' presets name these.
        preset_classes: which of those are meant by a class that LyCORIS' own presets name.
        no_text_encoder: why its text encoders have no LoRAs; None if there can be one.
    """

    name: str
    module: str
    args: type[LoRAArgs]
    layers: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    preset_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    no_text_encoder: str | None = None

    def place(self, name: str) -> Place | None:
        """Return the layer that a name is of, written with dots or underscores, without a prefix."""
        words = name.replace(".", "_")
        if (found := self._places.get(words)) is not None:
            return found
        if (match := _OF_BLOCK.fullmatch(words)) is None:
            return None
        found = self._places.get(f"{match[1]}_*_{match[3]}")
        return found and Place(found.path.replace("*", match[2]), found.part)

    def path_of(self, kohya: str) -> str | None:
        """Return the path of the layer that a name in kohya's files is of; None if it is of none."""
        place = self.place(kohya.removeprefix(f"{DIT}_"))
        return None if place is None or kohya_name(place.path) != kohya else place.path

    def diffusers_names(self, path: str) -> tuple[str, ...]:
        """Return what diffusers calls the layer at `path`: one name, or those of q, k and v."""
        if path in self.layers:
            return self.layers[path]
        blocks, number, rest = _BLOCK_PATH.fullmatch(path).groups()
        return tuple(name.replace("*", number) for name in self.layers[f"{blocks}.*.{rest}"])

    def class_of(self, path: str) -> str | None:
        """Return what the original code calls the class of the module at `path`; presets can name it."""
        return self.classes.get(re.sub(r"\.\d+(?=\.|$)", ".*", path, count=1))

    def check_text_encoder(self, options: NetworkOptions) -> None:
        """Raise ConfigError if a LoRA on a text encoder is asked for, and this family has none."""
        if options.trains_text_encoder and self.no_text_encoder is not None:
            raise ConfigError(
                f"{self.no_text_encoder}; leave out what asks for that LoRA: --network_train_text_encoder, "
                f"--network_train_text_encoder_only, --text_encoder_lr."
            )

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Return the layers by all their names, dots as underscores."""
        found = {path: Place(path) for path in self.layers}
        for path, names in self.layers.items():
            parts: Iterable[int | None] = (None,) if len(names) == 1 else range(len(names))
            found |= {name: Place(path, part) for name, part in zip(names, parts, strict=True)}
        found |= {alias: found[name] for alias, name in self.aliases.items()}
        return {name.replace(".", "_"): place for name, place in found.items()}
