"""`--network_args` of `--network_module lycoris.kohya`: the names that the lycoris-lora package has for them.

    algo                     lora (or locon), loha, lokr, full, ia3, diag-oft, boft
    preset                   which layers: a name that the package knows, or a TOML file of its format
    dropout, rank_dropout, module_dropout, rank_dropout_scale
    rs_lora, use_scalar      lora, loha, lokr: alpha over the root of the rank; a trained factor from zero on
    dora_wd, wd_on_output    lora, loha, lokr: the lengths of the weight's rows (or columns) are trained too
    factor, decompose_both, full_matrix, unbalanced_factorization      lokr: sizes of its two matrices
    constraint, rescaled     diag-oft, boft: how far they may turn; a trained factor of each output feature
    train_on_input           ia3: scale what a layer takes in
    loraplus_lr_ratio        lora

Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.core.toml_file import read_config
from networks.network_args import arg, parse_args, to_bool, to_positive, to_probability

ALGOS = ("lora", "locon", "loha", "lokr", "full", "ia3", "diag-oft", "boft")
_UNTESTED = ("dylora", "glora", "tlora")
PRESETS = (
    *("full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only"),
    *("unet-convblock-only", "ia3"),
)

_FACTORED = ("lora", "loha", "lokr")
_MATTERS_FOR: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("rs_lora", "use_scalar", "dora_wd", "wd_on_output"), _FACTORED),
    **dict.fromkeys(("factor", "decompose_both", "full_matrix", "unbalanced_factorization"), ("lokr",)),
    **dict.fromkeys(("constraint", "constrain", "rescaled"), ("diag-oft", "boft")),
    "train_on_input": ("ia3",),
    **dict.fromkeys(
        ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"), ("lora",)
    ),
    "block_size": (),
}
_WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("conv_dim", "conv_alpha", "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp"),
        "the model has no convolutions",
    ),
    **dict.fromkeys(("train_t5xxl", "train_llm_adapter"), "the model has no such part"),
    "bypass_mode": "what the network adds goes to a layer's output here in any case",
    "block_size": "it is for dylora",
}


def to_number(text: str) -> float:
    """Read a number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("a number, 0 or more")
    return value


def to_factor(text: str) -> int:
    """Read lokr's factor."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value == 0 or value < -1:
        raise ValueError("a whole number above 0, or -1 for parts as equal as can be")
    return value


def to_algo(text: str) -> str:
    """Read an algorithm; `locon` is what `lora` is called where there are convolutions."""
    name = text.strip().lower()
    if name in _UNTESTED:
        raise ValueError(f"one of {', '.join(ALGOS)}; {name} is not made here, as nothing tests it")
    if name not in ALGOS:
        raise ValueError(f"one of {', '.join(ALGOS)}")
    return "lora" if name == "locon" else name


@dataclass(frozen=True, kw_only=True)
class LycorisArgs:
    """The arguments as they are meant; defaults are those of the package."""

    algo: str = arg("lora", to_algo)
    preset: str = arg("full", str)
    dropout: float | None = arg(None, to_probability)
    rank_dropout: float = arg(0.0, to_probability)
    module_dropout: float = arg(0.0, to_probability)
    rank_dropout_scale: bool = arg(False, to_bool)
    rs_lora: bool = arg(False, to_bool)
    use_scalar: bool = arg(False, to_bool)
    dora_wd: bool = arg(False, to_bool)
    wd_on_output: bool = arg(True, to_bool)
    factor: int = arg(-1, to_factor)
    decompose_both: bool = arg(False, to_bool)
    full_matrix: bool = arg(False, to_bool)
    unbalanced_factorization: bool = arg(False, to_bool)
    constraint: float = arg(0.0, to_number, "constrain")
    rescaled: bool = arg(False, to_bool)
    train_on_input: bool = arg(False, to_bool)
    train_norm: bool = arg(False, to_bool)
    loraplus_lr_ratio: float | None = arg(None, to_positive)
    loraplus_unet_lr_ratio: float | None = arg(None, to_positive)
    loraplus_text_encoder_lr_ratio: float | None = arg(None, to_positive)
    conv_dim: float = arg(0.0, to_number)
    conv_alpha: float = arg(0.0, to_number)
    use_tucker: bool = arg(False, to_bool)
    use_cp: bool = arg(False, to_bool)
    use_conv_cp: bool = arg(False, to_bool)
    disable_conv_cp: bool = arg(True, to_bool)
    bypass_mode: bool = arg(False, to_bool)
    block_size: float = arg(0.0, to_number)
    train_t5xxl: bool = arg(False, to_bool)
    train_llm_adapter: bool = arg(False, to_bool)

    def lr_ratio(self, *, text_encoder: bool) -> float:
        """Return LoRA+'s ratio for one part."""
        own = self.loraplus_text_encoder_lr_ratio if text_encoder else self.loraplus_unet_lr_ratio
        return own or self.loraplus_lr_ratio or 1.0


def read_args(args: Mapping[str, str]) -> LycorisArgs:
    """Read `--network_args`, and the preset's file where it is one.

    Raises:
        ConfigError: an unknown key, a value that cannot be, or what there is not here.
    """
    chosen = parse_args(LycorisArgs, args, {})
    if chosen.train_norm:
        raise ConfigError(
            "--network_args train_norm=True is not made here: LyCORIS trains layer and group norms, of which "
            "Lumina has none (its norms are RMS norms) and Kandinsky two small ones; leave it out."
        )
    read_preset(chosen.preset)
    return chosen


def read_preset(name: str) -> dict[str, object] | None:
    """Return the content of a preset that is a file; None for one of the package's own.

    Raises:
        ConfigError: there is no such preset, or the file is broken.
    """
    if name in PRESETS:
        return None
    if not Path(name).is_file():
        raise ConfigError(
            f"--network_args preset={name} is no TOML file, and none of the presets {', '.join(PRESETS)}."
        )
    return read_config(Path(name), "--network_args preset")


def without_effect(args: Mapping[str, str], kinds: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each argument that has no say in a network of these kinds."""
    for key in args:
        if key in _WITHOUT_EFFECT:
            yield f"--network_args {key} has no effect: {_WITHOUT_EFFECT[key]}"
        elif key in _MATTERS_FOR and not set(_MATTERS_FOR[key]) & set(kinds):
            yield f"--network_args {key} has no effect: it is for {' and '.join(_MATTERS_FOR[key])}"
