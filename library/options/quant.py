"""In how many bits the frozen models are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option

# The schemes, and what the tensors that stand for a weight are called. The first holds the codes.
STORED = {
    "fp8": ("codes", "scale"),
    "int8": ("codes", "scale"),
    "int4": ("codes", "step", "minimum"),
    "nf4": ("codes", "scale"),
}
SCHEMES = tuple(STORED)
PRODUCTS = ("int8", "fp8")  # schemes whose codes can be multiplied as they are
GROUP = 64  # weights that share a scale in the 4-bit schemes, where the width of the layer allows it
_SMALLEST_GROUP = 16
_FP8_FLAGS = ("fp8_base", "fp8_base_unet", "fp8_scaled")


def check_width(scheme: str, inputs: int, what: str = "A layer") -> None:
    """Raise ConfigError if a scheme cannot keep a weight of so many inputs."""
    if scheme in ("int4", "nf4") and math.gcd(inputs, GROUP) < _SMALLEST_GROUP:
        raise ConfigError(
            f"{what} with {inputs} inputs cannot be quantised to {scheme}: a multiple of {_SMALLEST_GROUP} "
            f"is needed. Use int8 or fp8."
        )


@dataclass(frozen=True, kw_only=True)
class TextQuantOptions(OptionGroup):
    """Quantised text encoder. See docs/memory.md."""

    text_encoder_quant: str | None = option(
        None, "keep the linear layers of the text encoder in 8 or 4 bits", choices=SCHEMES
    )
    quantize_device: str = option(
        "cuda", "where weights are quantised; cuda means the GPU, if there is one", choices=("cuda", "cpu")
    )

    @property
    def quantise_on(self) -> str | None:
        """Where weights are quantised; None: where they go."""
        return "cpu" if self.quantize_device == "cpu" else None

    @property
    def quantises(self) -> bool:
        """Whether anything is quantised."""
        return self.text_encoder_quant is not None

    def adjustments(self) -> Iterator[str]:
        """Tell of a device without anything to quantise there."""
        yield from super().adjustments()
        if not self.quantises:
            yield from self.without_effect(("quantize_device",), "nothing is quantised")


@dataclass(frozen=True, kw_only=True)
class QuantOptions(TextQuantOptions):
    """Quantised models.

    The linear layers of the blocks are kept in 8 or 4 bits and restored for each product; embedders, norms,
    modulation and time stay as they are. See docs/memory.md.
    """

    base_quant: str | None = option(
        None, "keep the linear layers of the transformer's blocks in 8 or 4 bits", choices=SCHEMES
    )
    quant_matmul: bool = option(
        False,
        "with weights in int8 or fp8: multiply their codes as they are, with the other factor in 8 bits too, "
        "where the device can (int8: NVIDIA Ampere or later; fp8: Ada or later)",
    )
    fp8_base: bool = option(False, "the same as --base_quant fp8: scaled, row by row")
    fp8_base_unet: bool = option(False, "the same as --base_quant fp8")
    fp8_scaled: bool = option(False, "the same as --base_quant fp8")

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in _FP8_FLAGS if getattr(self, name)]
        if given and self.base_quant not in (None, "fp8"):
            raise ConfigError(
                f"--base_quant {self.base_quant} and {given[0]} ask for two things; choose one."
            )

    def check_products(self, scheme: str | None) -> None:
        """Raise ConfigError if codes of the transformer's scheme are to be multiplied, and cannot be."""
        if self.quant_matmul and scheme not in PRODUCTS:
            has = "not quantised" if scheme is None else f"in {scheme}"
            raise ConfigError(
                f"--quant_matmul multiplies codes of 8 bits, and the transformer is {has}; give --base_quant "
                f"int8 or fp8, or leave --quant_matmul out."
            )

    @property
    def transformer(self) -> str | None:
        """The scheme of `library.nn.weights.schemes` for the transformer."""
        return "fp8" if any(getattr(self, name) for name in _FP8_FLAGS) else self.base_quant

    @property
    def quantises(self) -> bool:
        """Whether anything is quantised."""
        return super().quantises or self.transformer is not None
