"""How a network learns: all its thin matrices at once."""

from __future__ import annotations

import torch

from library.options.train import TrainOptions
from library.training.context import RunContext
from library.training.gradients import PlainGradients
from library.training.optim.optimizer import create_optimizer
from library.training.state.contents import optimizer_part, weights_part
from library.training.trainee.kind import Trainee
from library.training.trainee.learner import Learner
from library.training.trainee.norm_limit import NormLimit
from library.training.watch.gauges import WeightNorms
from networks.lora import LoRANetwork


def network_optimizer(network: Trainee, options: TrainOptions) -> torch.optim.Optimizer:
    """Return what steps all matrices of a network."""
    return create_optimizer(network.parameter_groups(options.optimizer.network_lr), options.optimizer)


def network_learner(network: LoRANetwork, context: RunContext) -> Learner:
    """Return what trains a network."""
    options = context.options
    optimizer = network_optimizer(network, options)
    limit = options.trainee.scale_weight_norms
    norm_limit = NormLimit(network, limit, context.device) if limit else None
    return Learner(
        optimizer=optimizer,
        gradients=PlainGradients(network.parameters(), context.device),
        parts={"network": weights_part(network), "optimizer": optimizer_part(optimizer)},
        gauges=[WeightNorms(network), *([norm_limit] if norm_limit else [])],
        norm_limit=norm_limit,
    )
