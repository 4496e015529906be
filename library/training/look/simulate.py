"""A training step on the meta device, where tensors have no content: what would it take of a GPU's memory?

The same code runs as in training, and chooses what it would choose on a GPU; a `Meter` watches. So memory is
counted at every moment of the step, and not estimated from a formula. What comes on top on a real device are
its driver's own memory and what its allocator loses between tensors: see `library.training.look.budget`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from library.data.batch import Condition
from library.data.items import Size
from library.nn.running.routing import Routing, kept_count
from library.nn.stand_in import meta_standing_for
from library.nn.transformer import Transformer
from library.options.tread import Route, resolved
from library.training.look.meter import Meter, Speeds
from library.training.trainee.kind import Trainee

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

META = torch.device("meta")


@dataclass(frozen=True)
class Work:
    """What a step is made on: pictures of these sizes, in pixels, each with a caption of so many tokens.

    routes: by which tokens skip blocks in training.
    """

    sizes: tuple[Size, ...]
    tokens: int
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True)
class Arrival:
    """A gradient that is there, in a backward that forgets each of them at once.

    parameter: which one's, by its place among the trained ones. size: its bytes. peak: most bytes that were
    alive since the one before, or since the step began; live: those alive now. Both with this gradient, and
    without earlier ones.
    """

    parameter: int
    size: int
    peak: int
    live: int


@dataclass(frozen=True)
class GradientRules:
    """What becomes of gradients, by the places of their parameters; those that no rule is about stay.

    leaving: go to the computer's memory, and up to `queue` bytes of them are still on their way.
    used: bytes that an update takes, of a parameter whose gradient is used at once, and forgotten.
    there: from an earlier batch, all those that stay are there when the step begins.
    """

    leaving: Set[int] = frozenset()
    queue: int = 0
    used: Mapping[int, int] = field(default_factory=dict)
    there: bool = False

    def stays(self, parameter: int) -> bool:
        """Whether the gradient of a parameter is on the device at the end of the step."""
        return parameter not in self.leaving and parameter not in self.used


ALL_STAY = GradientRules()


@dataclass(frozen=True)
class Step:
    """What a step takes.

    arrivals: of the gradients, in the order in which they come. after: most bytes that are alive at once from
    the last one on, of all that was not there before the step but gradients. kept: bytes that are alive
    between forward and backward. forward, backward: seconds, if they were asked for.
    """

    arrivals: tuple[Arrival, ...]
    after: int
    kept: int
    forward: float = 0.0
    backward: float = 0.0

    @property
    def peak(self) -> int:
        """Most bytes that are alive at once, if all gradients stay."""
        return self.peak_with(ALL_STAY)

    def staying_with(self, rules: GradientRules) -> int:
        """Return the bytes of those gradients that rules leave on the device to the end of a step."""
        return sum(a.size for a in self.arrivals if rules.stays(a.parameter))

    def peak_with(self, rules: GradientRules) -> int:
        """Return the most bytes that are alive at once, with what rules leave of gradients."""
        staying = self.staying_with(rules) if rules.there else 0
        queue: deque[int] = deque()
        peak = 0
        for arrival in self.arrivals:
            peak = max(peak, staying + sum(queue) + arrival.peak)
            if arrival.parameter in rules.used:
                peak = max(peak, staying + sum(queue) + arrival.live + rules.used[arrival.parameter])
            elif arrival.parameter in rules.leaving:
                while queue and sum(queue) + arrival.size > rules.queue:
                    queue.popleft()
                queue.append(arrival.size)
            elif not rules.there:
                staying += arrival.size
        return max(peak, staying + sum(queue) + self.after)


class Simulation:
    """A trainer's model with what is trained, on some device, and a step of the loss on it.

    On the meta device it stands for a GPU, or for another `kind` of device.
    """

    def __init__(
        self,
        trainer: NetworkTrainer,
        model: Transformer,
        trainee: Trainee,
        device: torch.device = META,
        kind: str = "cuda",
    ) -> None:
        self.trainer, self.model, self.trainee = trainer, model, trainee
        self.device, self.kind = device, kind

    def step(self, work: Work, *, speeds: Speeds | None = None) -> Step:
        """Make a step, forward and backward. The gradients are gone afterwards."""
        meter = Meter(self._counted_kinds(), speeds)
        with _Arrivals(meter, self.trainee) as arrivals, self._standing():
            inputs = (*self._inputs(work), self._routing(work))
            with meter:
                loss = self._loss(*inputs)
                kept, forward = meter.live, meter.seconds
                loss.backward()
        return Step(tuple(arrivals.found), meter.peak, kept, forward, meter.seconds - forward)

    def backward(self, work: Work) -> None:
        """Make a step, forward and backward, and leave gradients to whoever looks after them."""
        with self._standing():
            self._loss(*self._inputs(work), self._routing(work)).backward()

    def _loss(
        self, x: list[Tensor], sigma_B: Tensor, conditions: list[Condition], routing: Routing | None
    ) -> Tensor:
        predicted = self.trainer.velocities(self.model, x, sigma_B, conditions, routing)
        return torch.stack([velocity.square().mean() for velocity in predicted]).sum()

    def forward(self, work: Work) -> int:
        """Return the most bytes that the model takes beside its weights when it is asked for a picture."""
        x, sigma_B, conditions = self._inputs(work)
        with self._standing(), torch.no_grad(), Meter(self._counted_kinds()) as meter:
            self.trainer.velocities(self.model, x, sigma_B, conditions)
        return meter.peak

    def _inputs(self, work: Work) -> tuple[list[Tensor], Tensor, list[Condition]]:
        family = self.trainer.family
        stride = family.latent_stride
        grids = [(height // stride, width // stride) for width, height in work.sizes]
        x = [torch.zeros(family.latent_channels, *grid, device=self.device) for grid in grids]
        conditions = [self.trainer.blank_condition(work.tokens, self.device) for _ in grids]
        for condition in conditions:
            condition.tokens_LD.zero_()
            condition.tokens_LD.requires_grad_(self.trainer.options.trainee.trains_text_encoder)
        return x, torch.full((len(x),), 0.5, device=self.device), conditions

    def _routing(self, work: Work) -> Routing | None:
        """Drop as many tokens as training does; it does not matter which."""
        if not work.routes:
            return None
        tokens = [self.trainer.family.image_tokens(size) for size in work.sizes]
        routes = resolved(work.routes, len(self.model.routed_blocks))
        kept = tuple(
            tuple(torch.arange(kept_count(count, route.share), device=self.device) for count in tokens)
            for route in routes
        )
        return Routing(routes, kept)

    def _counted_kinds(self) -> set[str]:
        # What is parked in the computer's memory does not count, unless that is the device.
        return {self.device.type} | ({"cpu"} if self.kind == "cpu" else set())

    def _standing(self) -> AbstractContextManager[object]:
        return meta_standing_for(self.kind)


class _Arrivals:
    """Watches gradients come, and forgets each of them at once, while it is entered."""

    def __init__(self, meter: Meter, trainee: Trainee) -> None:
        self.found: list[Arrival] = []
        self._meter, self._trainee = meter, trainee
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Arrivals:
        trained = trained_weights(self._trainee)
        self._handles = [
            weight.register_post_accumulate_grad_hook(partial(self._take, number))
            for number, weight in enumerate(trained)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _take(self, number: int, weight: nn.Parameter) -> None:
        gradient = weight.grad
        assert gradient is not None
        peak = self._meter.take_peak()
        self.found.append(Arrival(number, gradient.nbytes, peak, self._meter.live))
        weight.grad = None
        del gradient
        self._meter.take_peak()  # from here on, without it


def trained_weights(trainee: Trainee) -> list[nn.Parameter]:
    """Return what is trained, in the order by which `Arrival` counts."""
    return [parameter for parameter in trainee.parameters() if parameter.requires_grad]


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of modules' parameters and buffers, each storage once."""
    meter = Meter(())
    for module in modules:
        meter.add((*module.parameters(), *module.buffers()))
    return meter.live


def peak_of(
    action: Callable[[], object], *modules: nn.Module, looks_at_values: bool = True
) -> tuple[int, int]:
    """Return the most bytes that `action` takes, and how many its result keeps alive. Weights of `modules`,
    on the meta device, do not count.

    Text encoders of transformers look at values, which meta tensors do not have; fake ones say what they are.
    With `looks_at_values` False there are none of those, so that tensors on the CPU have their values.
    """
    if not looks_at_values:
        with meta_standing_for("cuda"), _AttentionOnGPU(), Meter() as meter:
            result = action()
            kept = meter.live
            del result
        return meter.peak, kept
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    weights += [fake.from_tensor(tensor) for tensor in weights]
    with meta_standing_for("cuda"), _AttentionOnGPU(), fake, Meter() as meter:
        meter.ignore(weights)
        result = action()
        kept = meter.live
        del result
    return meter.peak, kept


class _AttentionOnGPU(TorchFunctionMode):
    """Takes for the meta device attention as torch has it for GPUs, which makes no table of scores."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tables = kwargs.get("attn_mask") is not None or kwargs.get("dropout_p")  # these are made after all
        if func is F.scaled_dot_product_attention and len(args) == 3 and not tables:
            how = (0.0, bool(kwargs.get("is_causal")))
            attend = torch.ops.aten._scaled_dot_product_efficient_attention
            return attend(*args, None, False, *how, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)
