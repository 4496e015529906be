"""Write a transformer with its layers quantised, so that loading need not quantise it again.

    python tools/quantize_model.py --pretrained_model_name_or_path lumina.safetensors \\
        --output lumina-int8.safetensors --base_quant int8

Lumina Image 2.0 or Kandinsky 5.0 Image: which of them it is is seen in the file.
The file is used like any other; the scripts see that it is quantised, and --base_quant need not be given.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.checkpoint_files import open_checkpoint  # noqa: E402
from library.core.entry import run_script  # noqa: E402
from library.core.errors import ConfigError  # noqa: E402
from library.core.log import setup_logging  # noqa: E402
from library.models import kandinsky5_format, lumina2_format  # noqa: E402
from library.models.checkpoint_kind import kind_of  # noqa: E402
from library.models.quant_file import SCHEME_KEY, check_widths  # noqa: E402
from library.options.group import REQUIRED, OptionGroup, option, parse_options  # noqa: E402
from library.options.quant import SCHEMES, QuantOptions  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(OptionGroup):
    """Quantising a transformer."""

    pretrained_model_name_or_path: Path = option(
        REQUIRED, "the transformer: a .safetensors file, an index, or a folder"
    )
    output: Path = option(REQUIRED, "the .safetensors file to write")
    base_quant: str = option(REQUIRED, "the scheme; see docs/memory.md", choices=SCHEMES)

    def __post_init__(self) -> None:
        if self.output.suffix != ".safetensors":
            raise ConfigError(f"--output is {self.output}; it must end in .safetensors.")
        if self.output.exists():
            raise ConfigError(f"--output {self.output} exists already; name a new file.")


@dataclass(frozen=True)
class Options:
    """The options of this tool."""

    quantize: QuantizeOptions


def main() -> None:
    """Check the file by its headers, then quantise it."""
    chosen = parse_options(Options, description=__doc__.partition("\n")[0]).quantize
    setup_logging("INFO")
    path = chosen.pretrained_model_name_or_path
    kind = kind_of(open_checkpoint(path, subfolder="transformer"))
    is_kandinsky = "Kandinsky 5 transformer" in kind
    if not (is_kandinsky or "Lumina Image 2.0" in kind):
        raise ConfigError(
            f"--pretrained_model_name_or_path takes the transformer (DiT) of Lumina Image 2.0 or Kandinsky "
            f"5.0 Image, but {path} looks like {kind}. Qwen2.5-VL and Gemma2 are quantised as they are "
            f"loaded, by --text_encoder_quant."
        )
    family = kandinsky5_format if is_kandinsky else lumina2_format
    found = family.inspect_kandinsky5(path) if is_kandinsky else family.inspect_lumina2(path)
    if found.quant.scheme is not None:
        raise ConfigError(f"{found.checkpoint.path} is quantised already, to {found.quant.scheme}.")
    layers, shapes = family.quantisable_layers(found.params), family.parameter_shapes(found.params)
    check_widths(chosen.base_quant, layers, shapes, found.checkpoint.path)
    import torch
    from safetensors.torch import save

    from library.core.files import write_bytes
    from library.models.kandinsky5 import load_kandinsky5
    from library.models.lumina2 import load_nextdit

    load = load_kandinsky5 if is_kandinsky else load_nextdit
    quant = QuantOptions(base_quant=chosen.base_quant)
    model = load(found, device=torch.device("cpu"), dtype=None, quant=quant)
    metadata = family.settings_of(found.params) | {SCHEME_KEY: chosen.base_quant}
    write_bytes(chosen.output, save(model.state_dict(), metadata))
    print(f"wrote {chosen.output}, {chosen.output.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    run_script(main)
