"""A training step on the meta device, where tensors have no content: what would it take of a GPU's memory?

The same code runs as in training, and chooses what it would choose on a GPU; a `Meter` watches. So memory is
counted at every moment of the step, and not estimated from a formula. What comes on top on a real device are
its driver's own memory and what its allocator loses between tensors: see `library.training.look.planner`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from library.data.batch import Condition
from library.data.items import Size
from library.nn.routing import Routing, kept_count
from library.nn.stand_in import meta_standing_for
from library.nn.transformer import Transformer
from library.options.tread import Route, resolved
from library.training.look.meter import Meter, Speeds
from networks.lora import LoRANetwork

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
class Step:
    """What a step takes.

    peak: most bytes that are alive at once, of all that was not there before it; gradients are among them.
    kept: bytes that are alive between forward and backward. forward, backward: seconds, if they were asked
    for.
    """

    peak: int
    kept: int
    forward: float = 0.0
    backward: float = 0.0


class Simulation:
    """A trainer's model with a network on it, on some device, and a step of the loss on it.

    On the meta device it stands for a GPU, or for another `kind` of device.
    """

    def __init__(
        self,
        trainer: NetworkTrainer,
        model: Transformer,
        network: LoRANetwork,
        device: torch.device = META,
        kind: str = "cuda",
    ) -> None:
        self.trainer, self.model, self.network = trainer, model, network
        self.device, self.kind = device, kind

    def step(
        self,
        work: Work,
        *,
        gradients_there: bool = False,
        speeds: Speeds | None = None,
        metered: bool = True,
    ) -> Step:
        """Make a step, forward and backward. The gradients are gone afterwards.

        Args:
            gradients_there: as in the second batch of a step that adds up several.
            metered: False to make it and count nothing, so that it runs at its own pace.
        """
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        meter = Meter(self._counted_kinds(), speeds)
        x, sigma_B, conditions = self._inputs(work)
        routing = self._routing(work)
        if gradients_there:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            meter.add(parameter.grad for parameter in parameters)
        with self._standing(), meter if metered else nullcontext():
            predicted = self.trainer.velocities(self.model, x, sigma_B, conditions, routing)
            loss = torch.stack([velocity.square().mean() for velocity in predicted]).sum()
            del predicted
            kept, forward = meter.live, meter.seconds
            loss.backward()
        for parameter in parameters:
            parameter.grad = None
        return Step(meter.peak, kept, forward, meter.seconds - forward)

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
            condition.tokens_LD.requires_grad_(self.trainer.options.network.trains_text_encoder)
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
