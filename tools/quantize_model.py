"""Write a transformer with its layers quantised, so that loading need not quantise it again.

    python tools/quantize_model.py --pretrained_model_name_or_path lumina.safetensors \\
        --output lumina-int8.safetensors --base_quant int8

The file is used like any other; the scripts see that it is quantised, and --base_quant need not be given.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.entry import run_script  # noqa: E402
from library.core.errors import ConfigError  # noqa: E402
from library.core.log import setup_logging  # noqa: E402
from library.models.lumina2_format import (  # noqa: E402
    inspect_lumina2,
    parameter_shapes,
    quantisable_layers,
)
from library.models.quant_file import SCHEME_KEY, check_widths  # noqa: E402
from library.options.group import REQUIRED, OptionGroup, option, parse_options  # noqa: E402
from library.options.quant import SCHEMES, QuantOptions  # noqa: E402

# What the loader cannot read off shapes.
_SETTINGS = ("axes_dims", "patch_size", "rope_theta", "norm_eps", "qk_norm_eps")


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
    found = inspect_lumina2(chosen.pretrained_model_name_or_path)
    if found.quant.scheme is not None:
        raise ConfigError(f"{found.checkpoint.path} is quantised already, to {found.quant.scheme}.")
    layers, shapes = quantisable_layers(found.params), parameter_shapes(found.params)
    check_widths(chosen.base_quant, layers, shapes, found.checkpoint.path)
    import torch
    from safetensors.torch import save

    from library.core.files import write_bytes
    from library.models.lumina2 import load_nextdit

    quant = QuantOptions(base_quant=chosen.base_quant)
    model = load_nextdit(found, device=torch.device("cpu"), dtype=torch.bfloat16, quant=quant)
    settings = {key: json.dumps(value) for key, value in asdict(found.params).items() if key in _SETTINGS}
    write_bytes(chosen.output, save(model.state_dict(), settings | {SCHEME_KEY: chosen.base_quant}))
    print(f"wrote {chosen.output}, {chosen.output.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    run_script(main)
