"""Write a LoRA under the names that another tool reads.

    python tools/convert_lora.py --input lora.safetensors --output lora-diffusers.safetensors --to diffusers

    --to        read by                                             the file
    kohya       sd-scripts, musubi-tuner, ComfyUI, flow-scripts     lora_unet_layers_0_... with alphas
    comfyui     ComfyUI, ai-toolkit                                 diffusion_model.layers.0.... with alphas
    diffusers   pipelines of diffusers, Kandinsky's own code        transformer.layers.0...., alpha in lora_B
    peft        PEFT, Kandinsky's own code                          a folder, with adapter_config.json

The input may have any of these names and those of other tools (docs/lora.md); which model it is for is told
from its layers. What it does to a picture stays the same. Networks of LyCORIS can have the first two names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.entry import run_script  # noqa: E402
from library.core.errors import ConfigError  # noqa: E402
from library.core.files import write_text  # noqa: E402
from library.options.group import REQUIRED, OptionGroup, option, parse_options  # noqa: E402
from networks.families.known import family_of  # noqa: E402
from networks.files import LoRAFile, inspect_lora, save_network  # noqa: E402
from networks.names import ALPHA, DORA, DOWN, MAGNITUDE, ON_INPUT, TEXT_ENCODER, UP  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

KOHYA, COMFYUI, DIFFUSERS, PEFT = "kohya", "comfyui", "diffusers", "peft"
_EXACT = (ALPHA, DORA, ON_INPUT, MAGNITUDE)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OptionGroup):
    """Converting a LoRA."""

    input: Path = option(REQUIRED, "the LoRA: a .safetensors file, or an adapter's folder")
    output: Path = option(REQUIRED, "the .safetensors file to write, or the folder with --to peft")
    to: str = option(REQUIRED, "whose names to write", choices=(KOHYA, COMFYUI, DIFFUSERS, PEFT))
    dtype: str | None = option(
        None, "precision of the weights (default: that of the input)", choices=("float", "fp16", "bf16")
    )
    dit_only: bool = option(False, "leave out what is for the text encoder")

    def __post_init__(self) -> None:
        if self.to == PEFT and self.output.suffix:
            raise ConfigError(f"--output is {self.output}; with --to {PEFT} it must name a folder.")
        if self.to != PEFT and self.output.suffix != ".safetensors":
            raise ConfigError(f"--output is {self.output}; it must end in .safetensors.")
        if self.output.exists():
            raise ConfigError(f"--output {self.output} exists already; name a new one.")


@dataclass(frozen=True)
class Options:
    """The options of this tool."""

    convert: ConvertOptions


def main() -> None:
    """Check the file by its header, then convert it."""
    chosen = parse_options(Options, description=__doc__.partition("\n")[0]).convert
    file = inspect_lora(chosen.input)
    names = [name for name in file.ranks if not name.startswith(f"{TEXT_ENCODER}_")]
    if len(names) < len(file.ranks) and chosen.to != KOHYA and not chosen.dit_only:
        raise ConfigError(
            f"{file.path} has a part for the text encoder, for which --to {chosen.to} has no names; add "
            f"--dit_only to leave it out."
        )
    convert(chosen, file, names if chosen.dit_only else list(file.ranks))
    family = family_of(names)
    print(f"wrote {chosen.output}: {len(names)} layers of {family.name if family else 'an unknown model'}")


def convert(chosen: ConvertOptions, file: LoRAFile, names: list[str]) -> None:
    """Write the layers of a file that have these names."""
    from networks.formats import SETTINGS_KEY, to_comfyui, to_diffusers  # this imports torch

    state, source = _read(file, names), str(file.path)
    metadata = {key: text for key, text in file.metadata.items() if key != SETTINGS_KEY}
    if chosen.to in (KOHYA, COMFYUI):
        renamed = state if chosen.to == KOHYA else to_comfyui(state, source)
        save_network(chosen.output, _cast(renamed, chosen.dtype), metadata)
        return
    adapter = to_diffusers(state, source)
    if chosen.to == DIFFUSERS:
        tensors = _cast(adapter.prefixed("transformer"), chosen.dtype)
        save_network(chosen.output, tensors, metadata | adapter.metadata())
        return
    tensors = _cast(adapter.prefixed("base_model.model"), chosen.dtype)
    save_network(chosen.output / "adapter_model.safetensors", tensors, metadata)
    write_text(chosen.output / "adapter_config.json", json.dumps(adapter.settings, indent=2) + "\n")


def _read(file: LoRAFile, names: list[str]) -> dict[str, Tensor]:
    """Return the tensors under kohya's names, all weights in the precision of the file."""
    state = file.read(names)
    for name in names:
        if name + UP in state:  # what was joined of parts of different strength is fp32
            state[name + UP] = state[name + UP].to(state[name + DOWN].dtype)
    return state


def _cast(tensors: Mapping[str, Tensor], precision: str | None) -> dict[str, Tensor]:
    """Return the tensors in another precision, but for those that are exact in every file."""
    if precision is None:
        return dict(tensors)
    from library.core.device import dtype_named

    dtype = dtype_named(precision)
    return {key: tensor if key.endswith(_EXACT) else tensor.to(dtype) for key, tensor in tensors.items()}


if __name__ == "__main__":
    run_script(main)
