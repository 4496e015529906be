"""How a model's own weights learn: by themselves, one after the other, where they are.

    fp32 weights                    a plain step of the optimizer, or one by one with --fused_backward_pass
    bf16 weights                    one by one, each exactly: what bf16 cannot hold of it is kept beside it
    bf16 weights, --full_bf16       one by one, rounded at random

Weights of swapped blocks lie in the computer's memory. Their gradients are brought there, and there they are
stepped, while those of the others are stepped on the device.
"""

from __future__ import annotations

import torch

from library.core.device import keep_freed_memory
from library.nn.swap.gradient_return import GradientReturn
from library.options.train import TrainOptions
from library.training.context import RunContext
from library.training.fused_backward import FusedBackward
from library.training.gradients import Gradients, PlainGradients
from library.training.optim.one_by_one import OneByOne
from library.training.optim.optimizer import check_optimizer, create_optimizer
from library.training.optim.trial import check_one_by_one
from library.training.state.contents import optimizer_part, tensors_part, weights_part
from library.training.swapped_gradients import SwappedGradients
from library.training.trainee.kind import Trainee
from library.training.trainee.learner import Learner
from library.training.trainee.whole_model import WholeModel


def check_weights_optimizer(options: TrainOptions, device: torch.device) -> None:
    """Let the optimizer make its step on weights that lie on a device. Raises ConfigError if it cannot."""
    check_optimizer(options.optimizer, device, vectors=True)
    if _one_by_one(options):
        check_one_by_one(options.optimizer, device)


def weights_optimizer(trainee: Trainee, options: TrainOptions, *, seed: int) -> torch.optim.Optimizer:
    """Return what steps the weights, all together or one by one. `seed`: of rounding at random."""
    groups = trainee.parameter_groups(options.optimizer.network_lr)
    optimizer = create_optimizer(groups, options.optimizer, lean=False)
    if not _one_by_one(options):
        return optimizer
    return OneByOne(optimizer, trainee.named_parameters(), stochastic=options.training.full_bf16, seed=seed)


def weights_learner(trainee: WholeModel, context: RunContext) -> Learner:
    """Return what trains the weights of a model."""
    ring = trainee.model.runner.ring
    optimizer = weights_optimizer(trainee, context.options, seed=context.seed)
    parts = {"network": weights_part(trainee), "optimizer": optimizer_part(optimizer)}
    more = {}
    if ring is not None:
        more["settle"] = ring.bring_home
        keep_freed_memory()  # a weight is stepped in memory that the one before it was stepped in
    if isinstance(optimizer, OneByOne):
        parts["remainders"] = tensors_part(optimizer.export_state, optimizer.import_state)
        more["exact"] = optimizer.exact
    gradients = _gradients(trainee, optimizer, context)
    return Learner(optimizer=optimizer, gradients=gradients, parts=parts, **more)


def _one_by_one(options: TrainOptions) -> bool:
    return options.training.mixed_precision == "bf16" or options.trainee.fused


def _gradients(trainee: WholeModel, optimizer: torch.optim.Optimizer, context: RunContext) -> Gradients:
    options, device, ring = context.options, context.device, trainee.model.runner.ring
    if options.trainee.fused:
        return FusedBackward(optimizer, device, max_grad_norm=options.optimizer.max_grad_norm, ring=ring)
    if ring is None:
        return PlainGradients(trainee.parameters(), device)
    return SwappedGradients(GradientReturn(ring), trainee.parameters(), device)
