"""What a run will need of the GPU's memory, found out on the meta device, where tensors have no content.

The model is built and asked for a velocity as in training; what autograd keeps for backward is counted. Room
for the gradients of activations, kernels' own work space and fragmentation comes on top: real use is higher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from library.options.optimizer import OptimizerOptions
from library.training.optim.optimizer import create_optimizer, export_state

_SAMPLE = 256  # rows and columns of the matrix that tells an optimizer's memory; constants hardly count


@dataclass
class Kept:
    """Bytes that a forward pass keeps for backward: in all, and with gradient checkpointing."""

    everything: int = 0
    inputs_of_blocks: int = 0
    outside_of_blocks: int = 0
    largest_block: int = 0
    _seen: set[int] = field(default_factory=set, repr=False)
    _storages: list[object] = field(default_factory=list, repr=False)  # alive: no address comes twice

    @property
    def checkpointed(self) -> int:
        """With checkpointing: each block's input, and one block's insides at a time."""
        return self.inputs_of_blocks + self.outside_of_blocks + self.largest_block

    @property
    def offloaded(self) -> int:
        """The same with the inputs of blocks in the computer's memory."""
        return self.outside_of_blocks + self.largest_block

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps, once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen and not _is_scores(tensor):
            self.ignore([tensor])
            self.everything += storage.nbytes()
        return tensor

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these: weights are there anyway."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen.add(storage._cdata)
            self._storages.append(storage)


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def kept_for_backward(
    model: nn.Module, trained: Iterable[nn.Parameter], forward: Callable[[], Tensor]
) -> Kept:
    """Run `forward` of a model on the meta device, without checkpointing, and count what it keeps.

    Weights of the model and those `trained` on it are not counted.
    """
    kept = Kept()
    kept.ignore([*model.parameters(), *trained])
    with _blocks_measured(model, kept), torch.autograd.graph.saved_tensors_hooks(kept.add, lambda t: t):
        forward()
    return kept


def optimizer_bytes(options: OptimizerOptions, device: torch.device) -> float:
    """Return how many bytes the optimizer keeps for each trained number, by letting it make one step."""
    weight = nn.Parameter(torch.zeros(_SAMPLE, _SAMPLE, device=device))
    optimizer = create_optimizer([{"params": [weight], "lr": 1e-4, "name": "sample"}], options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors, _ = export_state(optimizer)
    return sum(t.numel() * t.element_size() for t in tensors.values()) / weight.numel()


@contextmanager
def _blocks_measured(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Count the blocks (members of the model's own lists of modules) one by one."""
    inside: list[int] = []

    def before(block: nn.Module, arguments: tuple[object, ...]) -> None:
        x = arguments[0]
        assert isinstance(x, Tensor)
        kept.inputs_of_blocks += x.numel() * x.element_size()
        inside.append(-kept.everything)

    def after(block: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        inside[-1] += kept.everything

    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    hooks = [block.register_forward_pre_hook(before) for blocks in lists for block in blocks]
    hooks += [block.register_forward_hook(after) for blocks in lists for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        kept.outside_of_blocks = kept.everything - sum(inside)
        kept.largest_block = max(inside, default=0)


def _is_scores(tensor: Tensor) -> bool:
    """Whether this is attention's square table of scores, which only the meta device's kernel keeps."""
    return tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2]
