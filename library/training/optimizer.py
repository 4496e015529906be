"""Optimizers for the trained parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from library.options.optimizer import OptimizerOptions

_FUSED_DEVICES = {"cpu", "cuda"}


def create_optimizer(groups: Iterable[dict[str, object]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Make the optimizer for parameter groups with `params` and a peak `lr`.

    Each group remembers its peak rate as `initial_lr`, for `set_lr`. The update is fused into one kernel
    where torch has one for the device, unless `--optimizer_args` says otherwise.
    """
    groups = [dict(group) for group in groups]
    settings = options.optimizer_settings()
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if devices <= _FUSED_DEVICES and not settings.keys() & {"fused", "foreach"}:
        settings["fused"] = True
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, lr=options.learning_rate, **settings)


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set each group's rate to `multiplier` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def describe_optimizer(optimizer: torch.optim.Optimizer, options: OptimizerOptions) -> str:
    """Return the optimizer's class and the settings that were given, as kohya's metadata writes them."""
    kind = type(optimizer)
    settings = ",".join(f"{name}={value}" for name, value in options.optimizer_settings().items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({settings})" if settings else "")
