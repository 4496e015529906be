"""torch's AdamW, called with less ado.

The trained matrices are many and thin, and torch's class looks at each of them several times a step, which
takes longer than the update. Here the lists that its kernel wants are kept from step to step, and all
parameters share one count of steps. The numbers are those of torch's class bit for bit, and so are states.

Where a parameter has no gradient (a LoRA that dropout left out), torch's class leaves it as it is. Such a
step is made by that class, and from there on all are, because parameters differ in their number of steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import unwrap

import torch
from torch import Tensor, nn

SETTINGS = frozenset({"betas", "eps", "weight_decay"})  # that it takes besides groups and lr
_AVERAGES = ("exp_avg", "exp_avg_sq")


class LeanAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`; its update is one operation for each kind of parameter in a group."""

    # torch wraps these to keep them out of compiled code, and the first call of such a wrapper imports the
    # compiler, which takes longer than importing torch. Nothing compiles an optimizer here.
    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    state_dict = unwrap(torch.optim.AdamW.state_dict)

    def __init__(self, groups: Iterable[dict[str, object]], **settings: object) -> None:
        """`settings`: lr and some of `SETTINGS`."""
        super().__init__(groups, fused=True, **settings)
        self._bundles: list[_Bundle] | None = None  # None: to be made at the next step
        self._apart = False  # parameters differ in their number of steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters by their gradients."""
        assert closure is None, "the loss is known before the step"
        if self._bundles is None and not self._apart:
            self._bundle()
        found = [] if self._apart else [bundle.gradients() for bundle in self._bundles]
        if self._apart or any(grad is None for grads in found for grad in grads):
            self._part()
            super().step()
            return
        for bundle, grads in zip(self._bundles, found, strict=True):
            bundle.update(self.param_groups[bundle.group], grads)

    # torch wraps a step without this mark, for its profiler and for hooks, which takes a fifth of the update.
    step.hooked = True

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take over a state, which may be one of torch's class."""
        unwrap(torch.optim.AdamW.load_state_dict)(self, state_dict)
        self._bundles, self._apart = None, False

    def _bundle(self) -> None:
        """Bring together what is updated together, unless the parameters differ in their number of steps."""
        kinds: dict[tuple[int, torch.dtype, torch.device], list[nn.Parameter]] = {}
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                kinds.setdefault((number, parameter.dtype, parameter.device), []).append(parameter)
        counts = [[_steps(self.state.get(p, {})) for p in parameters] for parameters in kinds.values()]
        self._apart = any(_differ(steps) for steps in counts)
        if self._apart:
            return
        self._bundles = [
            _Bundle(number, parameters, steps[0], self.state)
            for (number, *_), parameters, steps in zip(kinds, kinds.values(), counts, strict=True)
        ]

    def _part(self) -> None:
        """Let each parameter count its own steps from here on."""
        for bundle in self._bundles or ():
            bundle.dissolve(self.state)
        self._bundles, self._apart = None, True


class _Bundle:
    """Parameters of one group, dtype and device, which have had as many steps, and their averages."""

    def __init__(
        self,
        group: int,
        parameters: list[nn.Parameter],
        step: Tensor | None,
        states: dict[nn.Parameter, dict[str, Tensor]],
    ) -> None:
        """`states` come to have the one count of steps. `step`: None if there were none yet."""
        self.group = group
        self._parameters = parameters
        self._step = torch.zeros((), device=parameters[0].device) if step is None else step.clone()
        for parameter in parameters:
            state = states[parameter] = states.get(parameter) or {
                "step": self._step,
                **{name: torch.zeros_like(parameter) for name in _AVERAGES},
            }
            state["step"] = self._step
        self._averages = [[states[parameter][name] for parameter in parameters] for name in _AVERAGES]

    def gradients(self) -> list[Tensor | None]:
        """Return the parameters' gradients."""
        return [parameter.grad for parameter in self._parameters]

    def update(self, group: Mapping[str, object], grads: list[Tensor]) -> None:
        """Make a step with the settings of a group."""
        beta1, beta2 = group["betas"]
        self._step.add_(1)
        torch._fused_adamw_(
            self._parameters,
            grads,
            *self._averages,
            [],
            [self._step] * len(grads),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def dissolve(self, states: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """Give every parameter a count of its own; none if there was no step yet, like torch's class."""
        unused = bool(self._step == 0)  # read once: on a GPU that is a wait
        for parameter in self._parameters:
            if unused:
                del states[parameter]
            else:
                states[parameter]["step"] = self._step.clone()


def _steps(state: Mapping[str, Tensor]) -> Tensor | None:
    return state.get("step")


def _differ(steps: list[Tensor | None]) -> bool:
    """Whether not all numbers of steps are the same; None is no step."""
    known = [step for step in steps if step is not None]
    if not known:
        return False
    return len(known) < len(steps) or bool((torch.stack(known) != known[0]).any())
