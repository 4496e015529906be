"""Weights that are stepped during backward: each as soon as its gradient is there, which is then dropped.

    gradients = FusedBackward(optimizer, device, max_grad_norm=1.0, ring=model.runner.ring)
    set_learning_rates(optimizer, schedule, step)
    loss.backward()                  # moves the weights
    gradients.collect(processes)     # those of swapped blocks are home, and all are done
    gradients.norm()                 # of all gradients as they were
    gradients.clear()

Notable facts:
- So the gradients of a whole model are never in memory: on the device there is one, of those weights whose
  backward runs just now, and with block swap those on their way to the computer's memory.
- Where the model is on a GPU, the CPU steps weights of swapped blocks in a thread of its own, so that
  backward goes on queueing work for the GPU. All are done at the end of `collect`.
- A weight's turn comes when all parts of its gradient have been added up, however often it was used. What
  backward still computes then, or computes again for a checkpoint, is what came before the weight in the
  forward pass, which does not hang on it.
- There is no norm of all gradients yet when the first of them is used. So --max_grad_norm limits each by its
  own norm, as sd-scripts does.
- A gradient with NaN or infinite numbers must not reach its weight. On the CPU the weight and what the
  optimizer remembers of it stay as they are. To do so on a GPU the program would have to wait for every
  gradient; there the weight is stepped with a gradient of zeros, so its averages decay a little. In both
  cases `norm` is not finite, which ends the run, or tells of it with --on_nan skip.
- Weights without a gradient in a step are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.core.device import sent
from library.core.dist import Processes
from library.nn.swap.block_swap import BlockSwap
from library.nn.swap.gradient_return import GradientReturn
from library.training.gradients import Gradients, norms_of
from library.training.optim.one_by_one import OneByOne, Workspace

_TINY = 1e-6  # as torch's own clipping has it


class FusedBackward(Gradients):
    """Steps every weight of an optimizer during backward."""

    def __init__(
        self,
        optimizer: OneByOne,
        device: torch.device,
        *,
        max_grad_norm: float = 0.0,
        ring: BlockSwap | None = None,
        beside: bool | None = None,
    ) -> None:
        """Watch the optimizer's weights from here on.

        Args:
            device: the main one, on which norms come together.
            max_grad_norm: each gradient is scaled down to it; 0 for never.
            ring: what swaps blocks of the model. Their weights are stepped where they lie, on the CPU.
            beside: step these in a thread beside backward; see `GradientReturn`.
        """
        self._optimizer, self._device = optimizer, device
        self._max_grad_norm = max_grad_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._returned = ring and GradientReturn(ring, arrived=self._step_at_home, beside=beside)
        self._workspace = Workspace() if self._returned and self._returned.beside else None
        swapped = set() if self._returned is None else set(self._returned.parameters)
        here = [parameter for parameter in self._parameters if parameter not in swapped]
        self._handles = [p.register_post_accumulate_grad_hook(self._take) for p in here]
        self._norms: dict[nn.Parameter, Tensor] = {}  # of the gradients that were there in this step

    @property
    def moves_weights(self) -> bool:
        """Whether weights move during backward: they do."""
        return True

    def collect(self, processes: Processes) -> None:
        """Find that all gradients have been used; only one process can train so."""
        assert processes.world == 1, "weights moved before other processes had their say"
        if self._returned is not None:
            self._returned.collect()
        assert all(parameter.grad is None for parameter in self._parameters), "a gradient was not used"
        self._optimizer.finish()

    def norm(self) -> Tensor:
        """Return the norm of all gradients of the step, before they were limited."""
        norms = [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]
        home = [norm for norm in norms if norm.device.type == "cpu"]
        away = [norm for norm in norms if norm.device.type != "cpu"]
        parts = ([sent(torch.stack(home), self._device)] if home else []) + away
        return torch.linalg.vector_norm(torch.cat([*(part.view(-1) for part in parts), self._no_norm()]))

    def scale(self, factor: float) -> None:
        """Refuse: nothing is left to scale."""
        raise AssertionError("gradients were limited and used during backward")

    def clear(self) -> None:
        """Be ready for the next step, after one that was done or broken off."""
        if self._returned is not None:
            self._returned.clear()
        for parameter in self._parameters:
            parameter.grad = None
        self._norms.clear()
        self._optimizer.finish()

    def close(self) -> None:
        """Watch no more: gradients stay where autograd makes them."""
        for handle in self._handles:
            handle.remove()
        if self._returned is not None:
            self._returned.close()

    def _take(self, parameter: nn.Parameter) -> None:
        """Step a weight on the device, whose gradient is complete, and drop the gradient."""
        gradient, parameter.grad = parameter.grad, None
        self._step(parameter, gradient)

    def _step_at_home(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Step a weight of a swapped block, which is at home, and so is its gradient."""
        self._step(parameter, gradient, self._workspace)

    @torch.no_grad()
    def _step(self, parameter: nn.Parameter, gradient: Tensor, workspace: Workspace | None = None) -> None:
        """Step a weight; the gradient is used up. Two threads come here, with different weights."""
        assert parameter not in self._norms, "a weight has a second gradient in this step, and has moved"
        norm = self._norms[parameter] = norms_of([gradient])[0]
        if norm.device.type != "cpu" or norm.isfinite():
            self._limit(gradient, norm)
            self._optimizer.step_of(parameter, gradient, workspace)

    def _limit(self, gradient: Tensor, norm: Tensor) -> None:
        """Scale a gradient down to the longest that is allowed; make zeros of one that is not finite."""
        if self._max_grad_norm > 0:
            gradient.mul_((self._max_grad_norm / (norm + _TINY)).clamp_max(1.0))
        if gradient.device.type != "cpu":
            gradient.masked_fill_(norm.isfinite().logical_not(), 0.0)

    def _no_norm(self) -> Tensor:
        return torch.zeros(1, device=self._device)
