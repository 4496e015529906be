"""Loading a transformer from its weight file: what all families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from library.core.checkpoint_files import Checkpoint
from library.core.device import keep_freed_memory
from library.core.errors import ConfigError
from library.core.log import logger
from library.models.quant_file import QuantFile
from library.nn.attention import prepare_kernel
from library.nn.swap.block_swap import chosen_blocks, device_of_weights, make_ring
from library.nn.transformer import Transformer
from library.nn.weights.eight_bit import check_device
from library.nn.weights.loading import Source, load_module
from library.nn.weights.quant import multiply_in_8_bits, stored_names, use_quant_layers
from library.options.quant import QuantOptions
from library.options.swap import SwapOptions

NO_SWAP, WHOLE = SwapOptions(), QuantOptions()
_log = logger("model")


Model = TypeVar("Model", bound=Transformer)


class Found(Protocol):
    """A transformer's weight file whose headers were checked."""

    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def sources(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def quant(self) -> QuantFile: ...


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a transformer is loaded.

    dtype: of weights and activations, but for the few layers that a family keeps in fp32. None: each weight's
        own, to be saved.
    attention: a kernel of `library.nn.attention`; on the meta device one that is nearest to it.
    mmap: map the files into memory; else read them.
    swap: how many blocks wait in the computer's memory until it is their turn.
    weights_on: where the weights go, if not to `device`; the caller takes them there.
    quant: in how many bits the linear layers of the blocks are kept, but for modulation. A file whose layers
        are quantised already keeps them as they are.
    """

    device: torch.device
    dtype: torch.dtype | None
    attention: str = "auto"
    mmap: bool = True
    swap: SwapOptions = NO_SWAP
    weights_on: torch.device | None = None
    quant: QuantOptions = WHOLE

    @property
    def kernel(self) -> str:
        """The attention kernel, as it is called on the device."""
        if torch.device(self.device).type != "meta":
            return self.attention
        return "auto" if self.attention in ("auto", "varlen", "flash") else "torch"

    def check(self) -> None:
        """Raise ConfigError or MissingPackageError if the attention kernel cannot be used here."""
        prepare_kernel(self.kernel, torch.device(self.device), self.dtype)


def load_transformer(
    build: Callable[[], Model],
    found: Found,
    options: LoadOptions,
    *,
    quantisable: Sequence[str],
    in_fp32: str,
) -> Model:
    """Load a transformer, frozen and in eval mode.

    Args:
        build: makes the network.
        quantisable: paths of the layers that `options.quant` is about.
        in_fp32: what the names of those weights begin with that stay fp32.

    Raises:
        ConfigError: the model has fewer blocks than are to be swapped, or layers that the scheme cannot
            quantise, or the device does not multiply codes.
    """
    device, dtype, quant = torch.device(options.device), options.dtype, options.quant
    with torch.device("meta"):
        model = build()
    if found.quant.scheme is not None:
        use_quant_layers(model, found.quant.layers, found.quant.scheme)
    elif quant.transformer is not None:
        use_quant_layers(model, quantisable, quant.transformer)
    if quant.quant_matmul:
        check_device(found.quant.scheme or quant.transformer, device)
    swapped = [] if device.type == "meta" else chosen_blocks(model.runner.blocks, options.swap)
    stored = set(stored_names(model))

    def dtype_of(name: str) -> torch.dtype | None:
        if name in stored:
            return None
        return torch.float32 if name.startswith(in_fp32) else dtype

    load_module(
        model,
        found.checkpoint,
        {name: Source(names) for name, names in found.sources.items()},
        device=options.weights_on or device_of_weights(model, swapped, device),
        dtype=dtype_of,
        mmap=options.mmap,
        quantise_on=quant.quantise_on or device,  # faster there, also for blocks that wait elsewhere
    )
    if device.type == "cpu":
        keep_freed_memory()  # of steps; what loading frees is given back
    if quant.quant_matmul:
        _multiply_in_8_bits(model, tell=device.type != "meta")
    model.runner.ring = make_ring(swapped, device, options.swap)
    model.use_attention(options.kernel)
    return model.eval()


def _multiply_in_8_bits(model: Transformer, *, tell: bool) -> None:
    """Raise ConfigError if no layer can multiply its codes."""
    found = multiply_in_8_bits(model)
    if not found.layers:
        raise ConfigError(
            "--quant_matmul multiplies with layers whose widths are multiples of 16, and this model has "
            "none; leave it out."
        )
    if tell:
        others = f"; {found.others} are not, because of their widths" if found.others else ""
        _log.info(
            "%d layers are multiplied in 8 bits%s; of normally distributed numbers, products are %.1f %% "
            "from those with restored weights",
            *(found.layers, others, 100 * found.error),
        )
