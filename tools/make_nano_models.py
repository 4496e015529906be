"""Write small random checkpoints in exactly the formats of the real models.

    python tools/make_nano_models.py --output_dir nano
    python tools/make_nano_models.py --output_dir nano --family kandinsky5

They serve the quickstart and the tests: transformers and text encoders are noise of sane size, autoencoders
really bring back a soft picture (see tools/nano/autoencoder.py). A seed gives the same numbers in every
layout.
"""

from __future__ import annotations

import sys
from dataclasses import astuple, dataclass
from pathlib import Path

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.entry import run_script  # noqa: E402
from library.core.errors import ConfigError  # noqa: E402
from library.core.files import require_writable_directory  # noqa: E402
from library.options.group import REQUIRED, OptionGroup, option, parse_options  # noqa: E402

LAYOUT_NAMES = ("original", "comfyui", "all_in_one", "diffusers", "sharded")
FAMILIES = ("lumina", "kandinsky5")


@dataclass(frozen=True, kw_only=True)
class NanoOptions(OptionGroup):
    """What to write."""

    output_dir: Path = option(REQUIRED, "folder for the checkpoints; made if it is not there")
    family: str = option("lumina", "Lumina Image 2.0, or Kandinsky 5.0 Image", choices=FAMILIES)
    seed: int = option(0, "another seed gives other weights")
    layout: str = option("original", "file layout and tensor names", choices=LAYOUT_NAMES)

    def __post_init__(self) -> None:
        if (self.family, self.layout) == ("kandinsky5", "all_in_one"):
            raise ConfigError("--layout all_in_one is one of Lumina; nobody keeps Kandinsky's models so.")


@dataclass(frozen=True)
class Options:
    """The options of this tool."""

    nano: NanoOptions


def make_nano_models(output_dir: Path, seed: int = 0, layout: str = "original"):
    """Write the three nano models and return their paths as `tools.nano.layouts.NanoPaths`.

    layout: "original" (lumina, gemma2 and ae.safetensors), "comfyui" (the same with ComfyUI's prefixes and
        bf16), "all_in_one" (one file), "diffusers" (a pipeline folder), "sharded" (the same in several files
        with indexes).
    """
    from tools.nano.autoencoder import autoencoder_tensors
    from tools.nano.gemma2 import gemma2_tensors, sentencepiece_model
    from tools.nano.layouts import LAYOUTS, NanoModels
    from tools.nano.nextdit import nextdit_tensors

    models = NanoModels(
        dit=nextdit_tensors(seed),
        gemma2=gemma2_tensors(seed),
        autoencoder=autoencoder_tensors(seed),
        spiece=sentencepiece_model(seed),
    )
    return LAYOUTS[layout](models, Path(output_dir))


def make_nano_kandinsky5(output_dir: Path, seed: int = 0, layout: str = "original"):
    """Write the nano models of Kandinsky 5.0 Image, with transformers for both tasks.

    Returns their paths as `tools.nano.kandinsky5_layouts.NanoKandinsky5Paths`. layout: as `make_nano_models`,
    but "all_in_one".
    """
    from tools.nano.autoencoder import autoencoder_tensors
    from tools.nano.kandinsky5_dit import I2I_PARAMS, T2I_PARAMS, transformer_tensors
    from tools.nano.kandinsky5_layouts import LAYOUTS, NanoKandinsky5
    from tools.nano.kandinsky5_qwen import qwen_tensors
    from tools.nano.kandinsky5_text import clip_tensors

    models = NanoKandinsky5(
        t2i=transformer_tensors(seed, T2I_PARAMS),
        i2i=transformer_tensors(seed, I2I_PARAMS),
        qwen=qwen_tensors(seed),
        clip=clip_tensors(seed),
        autoencoder=autoencoder_tensors(seed),
    )
    return LAYOUTS[layout](models, Path(output_dir))


_MAKERS = {"lumina": make_nano_models, "kandinsky5": make_nano_kandinsky5}


def main() -> None:
    """Parse the options, write the models, say where they are."""
    options = parse_options(Options, description=__doc__.partition("\n")[0]).nano
    require_writable_directory(options.output_dir, "--output_dir")
    paths = _MAKERS[options.family](options.output_dir, options.seed, options.layout)
    for path in dict.fromkeys(path for path in astuple(paths) if path is not None):
        print(path)


if __name__ == "__main__":
    run_script(main)
