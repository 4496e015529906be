"""An optimizer for whole models: it steps one weight at a time.

    optimizer = OneByOne(create_optimizer(groups, options, lean=False), model.named_parameters())
    set_learning_rates(optimizer, schedule, step)     # also tells it which step this is
    loss.backward()
    optimizer.step()          # or `step_of(parameter)` for each weight, and then `finish()`

Notable facts:
- The optimizer inside never sees more than one weight: a stand-in for it, in fp32, with its gradient in
  fp32. So there is never an fp32 copy of the model, and the weight itself changes in its memory alone.
- Each step of a weight is made by a copy of the optimizer that has this one weight and what is remembered
  of it. So two threads may step weights at the same time, those on the device and those at home.
- What a bf16 weight cannot hold of it is kept beside it (`optim.rounding`): the weights are exact fp32 ones,
  and training is bit for bit that of fp32 weights with the same gradients. Or, if `stochastic`, it is rounded
  away at random, with noise that is a function of (seed, step, weight's name).
- Some optimizers count steps in their groups. So each weight is stepped with its group's settings as they
  were before the step, and what the last one made of them stays.
- Weights lie where they lie, each with its remainder and what the optimizer remembers of it: those of swapped
  blocks are stepped on the CPU.
- It cannot work with optimizers that keep one record for all weights, as those that find the rate themselves
  do. `check_one_by_one` finds out.
"""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError
from library.core.seeds import derive
from library.core.suggest import shorten
from library.training.optim.rounding import joined, round_randomly, split


class Workspace:
    """Memory of the CPU for the fp32 copies of one weight after the other, for the thread that steps them.

    glibc keeps no freed piece above 64 MiB for threads but the main one: each step of a large weight would
    get its copies from the system anew, page by page.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, Tensor] = {}

    def piece(self, purpose: str, like: Tensor) -> Tensor:
        """Return the piece for a purpose in the shape of a tensor, fp32; what was in it is lost."""
        piece = self._pieces.get(purpose)
        if piece is None or len(piece) < like.numel():
            piece = self._pieces[purpose] = torch.empty(like.numel())
        return piece[: like.numel()].view(like.shape)


class OneByOne(torch.optim.Optimizer):
    """Has another optimizer step each weight by itself; groups and states are that one's.

    `inner`: that one.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        names: Iterable[tuple[str, nn.Parameter]],
        *,
        stochastic: bool = False,
        seed: int = 0,
    ) -> None:
        """Step the weights of `inner`, which are fp32 or bf16.

        Args:
            names: of all its weights, as `named_parameters` returns them.
            stochastic: round bf16 weights at random, and keep nothing beside them.
            seed: of the rounding.
        """
        # Not the constructor of torch's class: all that it would make is the inner optimizer's.
        self.inner = inner
        self._seed = seed
        self._places = {p: n for n, group in enumerate(inner.param_groups) for p in group["params"]}
        self._names = {parameter: name for name, parameter in names if parameter in self._places}
        assert len(self._names) == len(self._places), "every weight needs a name"
        for parameter in self._places:
            assert parameter.dtype in (torch.float32, torch.bfloat16), f"a weight is {parameter.dtype}"
            assert parameter.is_contiguous(), "the parts of a weight are found by counting"
        self._remainders: dict[nn.Parameter, Tensor] = {}
        if not stochastic:
            halved = (p for p in self._places if p.dtype == torch.bfloat16)
            self._remainders = {p: torch.zeros_like(p, dtype=torch.int16) for p in halved}
        self._widen_states()
        self._number: int | None = None  # of the step that comes or is being made
        self._settings: list[dict[str, object]] = []  # of the groups, before this step
        self._reading = threading.Lock()  # of them

    @property
    def param_groups(self) -> list[dict[str, object]]:
        """The groups."""
        return self.inner.param_groups

    @property
    def state(self) -> dict[nn.Parameter, dict[str, object]]:
        """What is remembered of each weight, besides its remainder."""
        return self.inner.state

    # --- steps ---

    def begin(self, number: int) -> None:
        """Say which step comes, from 0: random rounding depends on it."""
        self.finish()  # one that was broken off
        self._number = number

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step all weights that have a gradient. Gradients stay as they are."""
        assert closure is None, "the loss is known before the step"
        for parameter in self._places:
            if parameter.grad is not None:
                self.step_of(parameter)
        self.finish()

    @torch.no_grad()
    def step_of(
        self, parameter: nn.Parameter, gradient: Tensor | None = None, workspace: Workspace | None = None
    ) -> None:
        """Step one weight by a gradient, by default its own. It may happen during backward, and in several
        threads, each with weights and a workspace of its own; `finish` ends the step.
        """
        gradient = parameter.grad if gradient is None else gradient
        stand_in = nn.Parameter(self.exact(parameter, workspace))
        stand_in.grad = _widened(gradient, "gradient", workspace)
        self._step_inner(parameter, stand_in)
        stand_in.grad = None  # before rounding takes memory
        self._take_over(parameter, stand_in.data)

    def finish(self) -> None:
        """End a step after its last weight."""
        self._settings = []
        self._number = None

    def exact(self, parameter: nn.Parameter, workspace: Workspace | None = None) -> Tensor:
        """Return a weight in fp32: a copy, in the workspace if there is one, unless it is fp32 itself."""
        weight, remainder = parameter.data, self._remainders.get(parameter)
        if remainder is None:
            return _widened(weight, "weight", workspace)
        return joined(weight, remainder, workspace and workspace.piece("weight", weight))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        assert set_to_none, "a gradient of zeros would be stepped with"
        for parameter in self._places:
            parameter.grad = None

    def _widen_states(self) -> None:
        """Make fp32 what was made already in the type of bf16 weights: Adagrad makes its record at once."""
        for state in self.inner.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                    state[key] = value.float()

    def _step_inner(self, parameter: nn.Parameter, stand_in: nn.Parameter) -> None:
        """Let the inner optimizer make its step as if it had this one weight, with a stand-in for it."""
        number, remembered = self._places[parameter], self.inner.state
        group = self._settings_before(number) | {"params": [stand_in]}
        state = defaultdict(dict, {stand_in: remembered[parameter]} if parameter in remembered else {})
        alone = object.__new__(type(self.inner))  # `copy` would leave out what a subclass has
        vars(alone).update(vars(self.inner), param_groups=[group], state=state)
        alone.step()
        if stand_in in state:
            remembered[parameter] = state[stand_in]
        del group["params"]
        self.inner.param_groups[number].update(group)

    def _settings_before(self, number: int) -> dict[str, object]:
        """Return the settings of a group as they were before this step."""
        with self._reading:
            if not self._settings:
                self._settings = [_settings_of(group) for group in self.inner.param_groups]
            return copy.deepcopy(self._settings[number])

    def _take_over(self, parameter: nn.Parameter, exact: Tensor) -> None:
        """Write what a step made of a weight, in fp32, to where the weight is kept. `exact` is used up."""
        weight = parameter.data
        if parameter in self._remainders:
            split(exact, weight, self._remainders[parameter])
        elif weight.dtype == torch.bfloat16:
            assert self._number is not None, "`begin` says which step it is, for the noise"
            purpose = ("rounding", self._number, self._names[parameter])
            random = torch.Generator(weight.device).manual_seed(derive(self._seed, *purpose))
            round_randomly(exact, weight, random)
        elif exact.data_ptr() != weight.data_ptr():
            weight.copy_(exact)  # the optimizer put its result into other memory

    # --- state ---

    def state_dict(self) -> dict[str, object]:
        """Return what the inner optimizer remembers. The remainders are a part of a run of their own."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Let the inner optimizer take over a state of it.

        torch gives what it loads the type of its weight. So that fp32 stays fp32, without a copy of it all on
        the way, bf16 weights are meanwhile fp32 ones that take no memory.
        """
        self.zero_grad()  # gradients are of the type that the weights have
        weights = {parameter: parameter.data for parameter in self._places}
        for parameter, weight in weights.items():
            parameter.data = torch.zeros((), device=weight.device).expand(weight.shape)
        try:
            self.inner.load_state_dict(state_dict)
        finally:
            for parameter, weight in weights.items():
                parameter.data = weight

    def export_state(self) -> dict[str, Tensor]:
        """Return the remainders by weight name, int16, as they are and where they are: no copies."""
        return {self._names[parameter]: remainder for parameter, remainder in self._remainders.items()}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over remainders that `export_state` returned, of the same weights.

        Raises:
            CheckpointError: they are of other weights.
        """
        own = self.export_state()
        odd = [name for name in own.keys() | state.keys() if _shape(own, name) != _shape(state, name)]
        if odd:
            raise CheckpointError(
                f"The saved state and this run keep what bf16 cannot hold of other weights "
                f"({shorten(sorted(odd))}). With --mixed_precision bf16 it is kept of all, and with "
                f"--full_bf16 of none: go on with the flags that the run was started with."
            )
        for name, remainder in own.items():
            remainder.copy_(state[name])


def _widened(tensor: Tensor, purpose: str, workspace: Workspace | None) -> Tensor:
    """Return a tensor in fp32: a copy, unless it is fp32 itself."""
    if workspace is None or tensor.dtype == torch.float32:
        return tensor.float()
    return workspace.piece(purpose, tensor).copy_(tensor)


def _settings_of(group: Mapping[str, object]) -> dict[str, object]:
    return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
