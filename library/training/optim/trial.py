"""Whether an optimizer can step the weights of a model one by one: it is tried, on two small matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.core.errors import ConfigError
from library.options.optimizer import OptimizerOptions
from library.training.optim.one_by_one import OneByOne
from library.training.optim.optimizer import TRIAL_SIZE, Averaging, make_optimizer

_STEPS = 3
_TOLERANCE = 0.01  # of the largest movement; kernels for many may round otherwise than those for one
_WAY_OUT = (
    "Use AdamW, AdamW8bit, Lion, Adafactor or another one that treats each weight by itself, or "
    "--mixed_precision no without --fused_backward_pass, where all weights are stepped together."
)


def check_one_by_one(options: OptimizerOptions, device: torch.device) -> None:
    """Let the optimizer train two small matrices, together and one by one, which must come to the same.

    For full fine-tuning, in place of `check_optimizer`, and for each device on which weights will lie.

    Raises:
        ConfigError: as `create_optimizer`; or it does not come to the same, or it cannot step there.
    """
    together, apart = (_Trial(options, device, one_by_one=one_by_one) for one_by_one in (False, True))
    try:
        shared = not all(apart.step() for _ in range(_STEPS))
        for _ in range(_STEPS):
            together.step()
        movements = zip(together.movements(), apart.movements(), strict=True)
        shared = shared or any((a - b).abs().max() > _TOLERANCE * a.abs().max() for a, b in movements)
    except Exception as error:  # libraries raise what they like
        raise ConfigError(
            f"--optimizer_type {options.optimizer_name} cannot step weights one by one that lie on {device}: "
            f"{error}"
        ) from error
    if shared:
        raise ConfigError(
            f"--optimizer_type {options.optimizer_name} keeps one record for all weights, and full "
            f"fine-tuning steps them one by one. {_WAY_OUT}"
        )


class _Trial:
    """Two small matrices and an optimizer for them: fp32 ones, or bf16 ones that are stepped one by one."""

    def __init__(self, options: OptimizerOptions, device: torch.device, *, one_by_one: bool) -> None:
        self._random = torch.Generator().manual_seed(0)
        starts = [0.001 * torch.randn(TRIAL_SIZE, generator=self._random) for _ in range(2)]
        self._starts = [start.bfloat16().to(device) for start in starts]
        self._matrices = [nn.Parameter(s.clone() if one_by_one else s.float()) for s in self._starts]
        rate = None if options.relative_step else options.learning_rate
        optimizer = make_optimizer([{"params": self._matrices, "lr": rate}], options, lean=False)
        if isinstance(optimizer, Averaging):
            raise ConfigError(
                f"--optimizer_type {options.optimizer_name} trains one set of weights and means another, "
                f"their average, and full fine-tuning has room for one. {_WAY_OUT}"
            )
        self._optimizer = optimizer
        self._stepper = OneByOne(optimizer, [(str(n), matrix) for n, matrix in enumerate(self._matrices)])
        self._one_by_one = one_by_one

    def step(self) -> bool:
        """Make a step; return whether the group's settings came to be the same for each matrix."""
        steady, erratic = torch.rand(2, *TRIAL_SIZE, generator=self._random).bfloat16()
        for matrix, gradient in zip(self._matrices, (steady, 100 * (erratic - 0.5)), strict=True):
            matrix.grad = gradient.to(matrix.device, matrix.dtype)
        if not self._one_by_one:
            self._optimizer.step()
            return True
        settings = []
        for matrix in self._matrices:
            self._stepper.step_of(matrix)
            (group,) = self._optimizer.param_groups
            plain = {
                key: value.tolist() if isinstance(value, Tensor) else value for key, value in group.items()
            }
            settings.append(plain | {"params": None})
        self._stepper.finish()
        return settings[0] == settings[1]

    def movements(self) -> list[Tensor]:
        """Return by how much the matrices were moved."""
        exact = [self._stepper.exact(matrix).detach() for matrix in self._matrices]
        return [now - start.float() for now, start in zip(exact, self._starts, strict=True)]
