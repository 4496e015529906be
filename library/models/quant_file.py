"""Weight files with layers that are quantised already, as `tools/quantize_model.py` writes them. No torch.

Such a file has `<layer>.codes` and its companions (see library/nn/weights/schemes.py) in place of
`<layer>.weight`, and names the scheme in its metadata. To whoever inspects the model it shall look as any
other file, so the weights are put back by name and shape, for its inspection only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError, ConfigError
from library.options.quant import SCHEMES, STORED, QuantOptions, check_width

SCHEME_KEY = "flow_scripts.quant"
# How many weights a number of the codes stands for.
_WEIGHTS_A_CODE = {"fp8": 1, "int8": 1, "int4": 2, "nf4": 2}


@dataclass(frozen=True)
class QuantFile:
    """What a file has quantised: the scheme, and the layers' paths. Without a scheme: nothing."""

    scheme: str | None = None
    layers: tuple[str, ...] = ()

    def check(self, options: QuantOptions) -> None:
        """Raise ConfigError if another scheme is wanted than the file has, or does not go with the rest."""
        wanted = options.transformer
        options.check_products(self.scheme or wanted)
        if self.scheme is not None and wanted not in (None, self.scheme):
            raise ConfigError(
                f"--base_quant {wanted} does not fit the transformer's file, which is quantised to "
                f"{self.scheme}: leave it out, or give the file that this one was made from."
            )

    def sources(self, plain: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """Return where parameters come from: `plain`, but for the stored tensors of quantised layers."""
        weights = {f"{layer}.weight" for layer in self.layers}
        stored = [f"{layer}.{part}" for layer in self.layers for part in STORED[self.scheme]]
        kept = {name: names for name, names in plain.items() if name not in weights}
        return kept | {name: (name,) for name in stored}


def check_widths(
    scheme: str | None,
    layers: Collection[str],
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    file: Path,
) -> None:
    """Raise ConfigError if one of the layers that are to be quantised is of a width that the scheme cannot
    group. `shapes`: of the parameters of `file`, by name."""
    if scheme is None:
        return
    weights = {f"{layer}.weight" for layer in layers}
    for name, shape in shapes:
        if name in weights:
            check_width(scheme, shape[1], f"{file}: '{name}'")


def read_quantised(checkpoint: Checkpoint) -> tuple[Checkpoint, QuantFile]:
    """Return the checkpoint as it would be without quantisation, and what is quantised in it.

    Raises:
        CheckpointError: a scheme that is not known here, or a layer that is not whole.
    """
    scheme = checkpoint.metadata.get(SCHEME_KEY)
    if scheme is None:
        return checkpoint, QuantFile()
    if scheme not in SCHEMES:
        raise CheckpointError(f"{checkpoint.path} is quantised as '{scheme}', which is not known here.")
    layers = tuple(n.removesuffix(".codes") for n in checkpoint.tensors if n.endswith(".codes"))
    stored = [f"{layer}.{part}" for layer in layers for part in STORED[scheme]]
    missing = [name for name in stored if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{checkpoint.path} is incomplete: it lacks '{missing[0]}'.")
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in set(stored)}
    for layer in layers:
        codes = checkpoint.tensors[f"{layer}.codes"]
        rows, columns = codes.shape
        tensors[f"{layer}.weight"] = replace(codes, shape=(rows, columns * _WEIGHTS_A_CODE[scheme]))
    return replace(checkpoint, tensors=tensors), QuantFile(scheme, layers)
