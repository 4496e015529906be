"""Whether the networks in files fit a model, and the network that is to be trained. Torch-free.

So a file that does not fit is told from its header, before a run has written or encoded anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from library.core.checkpoint_files import open_checkpoint
from library.core.errors import CheckpointError
from library.core.suggest import shorten
from networks.file_layers import Content
from networks.files import LoRAFile
from networks.from_file import dit_paths
from networks.names import TEXT_ENCODER, kohya_name

Shapes = Mapping[str, tuple[int, int]]  # (out, in) of linear layers, by path
TAKE_SIZES = (
    "the sizes must be those that the file was trained with. --dim_from_weights takes them from it: give "
    "that in place of --network_dim, --network_alpha and arguments about layers, ranks and alphas."
)
OTHER_WIDTH = (
    "the layer has another width in the model that the file was made for, which may be the one for another "
    "task: name a file for this model."
)
_NEAR = 2**-7  # alphas in bf16 are rounded


@dataclass(frozen=True)
class Size:
    """The LoRA of a layer as a file has it. `dora`: of which features it has magnitudes, if it is a DoRA."""

    rank: int
    alpha: float
    dora: str | None = None

    def difference(self, found: Size) -> str | None:
        """Say what is otherwise in a file; None if nothing is."""
        if found.rank != self.rank:
            return f"has rank {found.rank}, but {self.rank} is wanted"
        if found.dora != self.dora:
            return f"is {_kind(found.dora)}, but {_kind(self.dora)} is wanted"
        if not math.isclose(found.alpha, self.alpha, rel_tol=_NEAR):
            return f"has alpha {found.alpha:g}, but {self.alpha:g} is wanted"
        return None


def check_widths(file: LoRAFile, layers: Shapes) -> None:
    """Check the part of a file that is for the DiT against the linear layers of that.

    Raises:
        CheckpointError: the model lacks some of its layers, or has them in other widths.
    """
    for name, path in dit_paths(file, layers).items():
        found, (rows, columns) = file.layers[name], layers[path]
        theirs = (found.out_features or rows, found.in_features or columns)
        if theirs != (rows, columns):
            raise CheckpointError(
                f"{file.path}: '{name}' is for a layer of {theirs[1]} to {theirs[0]} features, but in this "
                f"model it has {columns} to {rows}; {OTHER_WIDTH}"
            )


def check_sizes(
    file: LoRAFile, layers: Shapes, wanted: Mapping[str, Size], for_text: Size | None = None
) -> None:
    """Check that what a file has is what is to be trained.

    Args:
        layers: the DiT's. wanted: LoRAs on them, by path. for_text: the LoRA of every layer of the text
            encoder; None: that is not looked at.

    Raises:
        CheckpointError: there are LoRAs for other layers, or of another rank, alpha or kind.
    """
    needed = {kohya_name(path): size for path, size in wanted.items()}
    names, of_text = dit_paths(file, layers).keys(), f"{TEXT_ENCODER}_"
    unknown, missing = sorted(names - needed.keys()), sorted(needed.keys() - names)
    source = f"--network_weights {file.path}"
    if unknown or missing:
        what = "has LoRAs for {} layers that would get none" if unknown else "lacks LoRAs for {} layers"
        differing = unknown or missing
        raise CheckpointError(f"{source} {what.format(len(differing))}: {shorten(differing)}; {TAKE_SIZES}")
    if for_text is not None:
        needed |= {name: for_text for name in file.ranks if name.startswith(of_text)}
    content = Content(open_checkpoint(file.path))
    for name, size in needed.items():
        found = Size(file.ranks[name], file.layers[name].alpha(content), file.doras.get(name))
        if (difference := size.difference(found)) is not None:
            raise CheckpointError(f"{source}: '{name}' {difference}; {TAKE_SIZES}")


def _kind(dora: str | None) -> str:
    return "a plain LoRA" if dora is None else f"a DoRA of {dora} features"
