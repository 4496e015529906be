"""A frozen model that no process has whole: each keeps a part, and blocks come together when they run.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. Only the frozen weights are spread, by torch's
FSDP2, block by block; the network that is trained is thin, lies on every process, and its gradients are
summed as always. The numbers are those of the unsharded model, bit for bit.

Whenever one process runs the model, all must, or the one waits for parts for ever. `Lockstep` sees to it:
a process that has nothing to do runs the model on next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.core.dist import Processes, Sharding
from library.core.errors import ConfigError
from library.core.log import logger
from library.nn.weights.quant import quant_layers
from library.options.train import TrainOptions
from library.training.objective import Uniform

_log = logger("sharding")

_NO_QUANT = (
    "A quantised transformer and FSDP (accelerate's --use_fsdp) do not go together: FSDP spreads whole "
    "weights. Leave out --base_quant and its like, or --use_fsdp."
)


def check_sharding(options: TrainOptions) -> None:
    """Raise ConfigError for what does not go together with a sharded model."""
    if options.swap.blocks_to_swap:
        raise ConfigError(
            "--blocks_to_swap and FSDP (accelerate's --use_fsdp) both keep weights elsewhere until they are "
            "needed: use one of them."
        )
    if options.quant.transformer is not None:
        raise ConfigError(_NO_QUANT)


def shard(model: nn.Module, sharding: Sharding, processes: Processes) -> None:
    """Spread the weights of `model` over all processes, and move them to the processes' devices.

    `model.runner.blocks` are gathered one at a time; what belongs to none of them, once for the whole pass.
    The weights may lie in the computer's memory: each block goes to the device alone, and most of it leaves.

    Raises:
        ConfigError: the weights are quantised.
    """
    if quant_layers(model):
        raise ConfigError(_NO_QUANT)
    # Imported here, because they take a second that other runs need not wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    whole = sum(parameter.nbytes for parameter in model.parameters())
    for block in model.runner.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    part = sum(parameter.to_local().nbytes for parameter in model.parameters())
    _log.info(
        "the model's %.1f MiB are spread over %d processes by FSDP2, %.1f MiB on this one",
        *(whole / 2**20, processes.world, part / 2**20),
    )


class Lockstep:
    """Lets every process run a sharded model whenever one does. Does nothing for a model that is not sharded.

    `idle`: runs the model on as little as possible and returns its output.
    """

    def __init__(
        self,
        model: nn.Module,
        processes: Processes,
        idle: Callable[[], Tensor],
        uniform: Uniform | None,
    ) -> None:
        """`uniform`: what every batch does; None for a model that is not sharded."""
        self._model, self._processes, self._idle, self._uniform = model, processes, idle, uniform
        self._inside = False  # a pass has begun and not ended

    def idle_step(self, step: int, micro: int) -> None:
        """Keep step with the others in a micro-batch of which this process has no picture."""
        if self._uniform is None:
            return
        with torch.no_grad():
            for _ in range(self._uniform.passes(step, micro) + self._uniform.preserves):
                self._idle()
        (self._idle() * 0).sum().backward()

    @contextmanager
    def free(self) -> Iterator[None]:
        """Let each process run the model without gradients as often as it likes, or not at all.

        All processes enter and leave. They may not exchange anything else in between.
        """
        if self._uniform is None:
            yield
            return
        before = self._model.register_forward_pre_hook(lambda *_: self._announce(), prepend=True)
        after = self._model.register_forward_hook(lambda *_: self._passed())
        try:
            yield
        finally:
            before.remove()
            after.remove()
            with torch.no_grad():
                while self._vote(False):
                    self._idle()

    def _announce(self) -> None:
        self._vote(True)
        self._inside = True

    def _passed(self) -> None:
        self._inside = False

    def _vote(self, wish: bool) -> bool:
        """Return whether a process is about to run the model; every process asks at the same time."""
        if self._inside:
            raise RuntimeError("a pass of the sharded model broke off, so the processes are out of step")
        return self._processes.any(wish)
