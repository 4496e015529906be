"""From a batch to losses: what is not cached is encoded and given its noise, the model is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.data.batch import Batch, Condition
from library.flow.loss import velocity_loss
from library.flow.rollout import Bias, ReflexFlow
from library.nn.running.routing import Routing
from library.training.inputs import Inputs
from library.training.modes import eval_mode, switched_off
from library.training.noising import Noising, NoisyLatents
from library.training.rollout import RolloutGauge, passes_of, roll_out
from library.training.trainee.kind import Trainee

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer


@dataclass(frozen=True)
class Uniform:
    """What is done for every batch of a sharded model: it goes backward through all blocks, and if
    `preserves`, it asks the untrained model first.

    passes: how often the model runs before, for walks, in a micro-batch of a step.
    """

    preserves: bool
    passes: Callable[[int, int], int] = lambda step, micro: 0


class Objective:
    """The losses of a trainer's model."""

    def __init__(
        self,
        trainer: NetworkTrainer,
        model: nn.Module,
        trainee: Trainee,
        inputs: Inputs,
        noising: Noising,
        *,
        on_losses: Callable[[Sequence[float], Tensor], None] | None = None,
        uniform: Uniform | None = None,
        rollouts: RolloutGauge | None = None,
    ) -> None:
        """`on_losses` is called with the sigmas and losses_B of every training batch.

        `uniform`: what every batch must do, whatever is in it, so that processes with a sharded model keep
        step. `rollouts` is told of what is rolled out.
        """
        self._trainer = trainer
        self._loss, self._rollout = trainer.options.loss, trainer.options.rollout
        self._model = model
        self._trainee = trainee
        self._inputs = inputs
        self._noising = noising
        self._on_losses = on_losses
        self._uniform = uniform
        self._rollouts = rollouts

    def training_losses(self, batch: Batch) -> Tensor:
        """Return the weighted training loss of each picture of a batch, fp32 (B,).

        The batch is one of `Noising.add_to`.
        """
        noisy, conditions = self._noisy(batch), self.conditions(batch)
        noisy, biases = self._roll_out(batch, noisy, conditions)
        noisy = self._preserve(batch, noisy, conditions)
        weights_B = batch.weights_B.to(noisy.sigma_B.device, non_blocking=True)
        losses_B = self.losses_at(batch, noisy, conditions, self._noising.routing(batch), biases) * weights_B
        if self._on_losses is not None:
            self._on_losses(batch.sigmas, losses_B)
        return losses_B

    def conditions(self, batch: Batch) -> list[Condition]:
        """Return a batch's conditions, as the network makes them if it is on the text encoder too."""
        self._set_multiplier(batch.network_multiplier)
        return self._inputs.conditions(batch)

    def sigmas(self, batch: Batch) -> Tensor:
        """Return the sigma at which each picture of a batch is trained, fp32 (B,) on the CPU."""
        return self._noising.sigmas(batch)

    def losses_at(
        self,
        batch: Batch,
        noisy: NoisyLatents,
        conditions: Sequence[Condition],
        routing: Routing | None = None,
        biases: Sequence[Bias | None] = (),
    ) -> Tensor:
        """Return the loss of each picture at given noise, before weights, fp32 (B,).

        `biases`: of each picture, what its loss is corrected by; () where none is.
        """
        self._set_multiplier(batch.network_multiplier)
        predicted = self.velocities(noisy.x, noisy.sigma_B, conditions, routing)
        nothing = [None] * len(predicted)
        pictures = zip(
            *(predicted, noisy.target, noisy.sigma_B.split(1)),
            *(nothing if batch.masks is None else batch.masks, biases or nothing),
            strict=True,
        )
        return torch.cat([self._picture_loss(*picture) for picture in pictures])

    def velocities(
        self,
        x: Sequence[Tensor],
        sigma_B: Tensor,
        conditions: Sequence[Condition],
        routing: Routing | None = None,
    ) -> list[Tensor]:
        """Return the model's velocities in the house convention, (C, h, w) a picture.

        `routing`: which tokens skip which blocks; None, unless it is trained with them.
        """
        if self._uniform is not None and torch.is_grad_enabled():
            x, conditions = _wanting_gradients(x, conditions)
        routing = None if routing is None else routing.to(sigma_B.device)
        return self._trainer.velocities(self._model, x, sigma_B, conditions, routing)

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Return the velocities of pictures of one size."""
        return torch.stack(self.velocities(x_BCHW.unbind(0), sigma_B, conditions))

    def idle(self) -> Tensor:
        """Run the model on as little as it takes, with the network on it, and return its output."""
        family, device = self._trainer.family, self._inputs.device
        x_BCHW = torch.zeros(1, family.latent_channels, family.patch, family.patch, device=device)
        blank = self._trainer.blank_condition(1, device)
        self._trainee.multiplier = 1.0
        return self.velocity(
            x_BCHW, torch.full((1,), 0.5, device=device), [replace(blank, tokens_LD=blank.tokens_LD.zero_())]
        )

    def _picture_loss(
        self, predicted: Tensor, target: Tensor, sigma_1: Tensor, mask: Tensor | None, bias: Bias | None
    ) -> Tensor:
        """Return the loss of a picture, (1,)."""
        mask = None if mask is None else mask.to(predicted.device, non_blocking=True)
        if bias is not None:
            return ReflexFlow(self._rollout, self._loss).loss(predicted, target, sigma_1, bias, mask)
        mask = None if mask is None else mask[None, None]
        return velocity_loss(predicted[None], target[None], sigma_1, self._loss, mask)

    def _set_multiplier(self, multiplier: float) -> None:
        if self._trainee.multiplier != multiplier:  # every LoRA is told, which takes longer than to look
            self._trainee.multiplier = multiplier

    def _noisy(self, batch: Batch) -> NoisyLatents:
        """Return what the model is given and should predict, on this process's device."""
        if batch.noisy is None:
            return self._noising.noisy(batch, self._inputs.latents(batch))
        assert batch.targets is not None and batch.sigma_B is not None
        device = self._inputs.device

        def there(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.to(device, non_blocking=True) for tensor in tensors]

        return NoisyLatents(there(batch.noisy), there(batch.targets), *there([batch.sigma_B]))

    def _roll_out(
        self, batch: Batch, noisy: NoisyLatents, conditions: Sequence[Condition]
    ) -> tuple[NoisyLatents, Sequence[Bias | None]]:
        """Let the model walk to where pictures are trained, if it should; return what losses need of that."""
        if self._rollouts is None:
            return noisy, ()
        self._rollouts.add(batch.walks)
        own, draw = passes_of(batch.walks), batch.draws[0]  # all draws are of one micro-batch
        passes = own if self._uniform is None else self._uniform.passes(draw.step, draw.micro)
        if passes == 0:
            return noisy, ()
        reflexive = self._rollout.scheduled_sampling_reflexflow
        with eval_mode([self._trainee]), torch.no_grad():
            rolled = roll_out(noisy, batch.walks, conditions, self.velocities, reflexive=reflexive)
            for _ in range(passes - own):
                self.idle()
        return rolled.noisy, rolled.biases

    def _preserve(self, batch: Batch, noisy: NoisyLatents, conditions: Sequence[Condition]) -> NoisyLatents:
        """Where a subset says diff_output_preservation, make the untrained model's own output the target."""
        always = self._uniform is not None and self._uniform.preserves
        if not always and not any(batch.preserved):
            return noisy
        with switched_off(self._trainee), torch.no_grad():
            if self._trainer.options.trainee.trains_text_encoder:
                conditions = self._inputs.conditions(batch)
            base = self.velocities(noisy.x, noisy.sigma_B, conditions)
        triples = zip(base, noisy.target, batch.preserved, strict=True)
        return replace(noisy, target=[own if preserved else target for own, target, preserved in triples])


def _wanting_gradients(
    x: Sequence[Tensor], conditions: Sequence[Condition]
) -> tuple[list[Tensor], list[Condition]]:
    """Return the model's inputs so that backward goes through every block, wherever the first LoRA is."""

    def wanting(tensor: Tensor) -> Tensor:
        return tensor if tensor.requires_grad else tensor.detach().requires_grad_()

    return [wanting(each) for each in x], [replace(c, tokens_LD=wanting(c.tokens_LD)) for c in conditions]
