"""Optimizers for the trained parameters: making them, setting their rates, their averages, their state."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError, ConfigError
from library.core.log import logger
from library.core.suggest import did_you_mean
from library.options.optimizer import OptimizerOptions
from library.training.optim.adamw import SETTINGS, LeanAdamW
from library.training.optim.one_by_one import OneByOne

_FUSED_DEVICES = {"cpu", "cuda"}
TRIAL_SIZE = (64, 65)  # bitsandbytes keeps 8-bit states from 4096 numbers on
_LOWEST_USUAL_FACTOR = 0.1  # of optimizers that find the rate themselves; 1 is what their authors advise

_log = logger("optimizer")

Kind = TypeVar("Kind")


@runtime_checkable
class Averaging(Protocol):
    """An optimizer that trains one set of weights and means another, their average (schedule-free)."""

    def train(self) -> None:
        """Put the weights to train into the parameters."""

    def eval(self) -> None:
        """Put the weights to use into the parameters."""


# --- making one ---


def create_optimizer(
    groups: Iterable[dict[str, object]], options: OptimizerOptions, *, lean: bool = True
) -> torch.optim.Optimizer:
    """Make the optimizer for parameter groups with `params` and a peak `lr`.

    Each group remembers its peak rate as `initial_lr`, for `set_learning_rates`. AdamW's update is fused into
    one kernel where torch has one for the device, unless `--optimizer_args` ask for more than it does.

    Args:
        lean: AdamW in the form for many thin matrices; otherwise that for single large weights.

    Raises:
        ConfigError: the class is not there, does not take its settings, or cannot have several rates.
    """
    groups = [dict(group) for group in groups]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["initial_lr"] = group["lr"]
    if options.optimizer_kind.finds_its_rate:
        _check_factor(options, rates)
    if options.relative_step:
        _log.warning(
            "Adafactor finds its rate from the step and the size of the weights: --learning_rate has no part "
            "in it. For a rate of your own: --optimizer_args relative_step=False scale_parameter=False"
        )
        for group in groups:
            group["lr"] = group["initial_lr"] = None
    if options.optimizer_name == "SGDNesterov8bit":
        _log.warning("bitsandbytes has no Nesterov step in 8 bit: SGDNesterov8bit is SGD with momentum")
    optimizer = make_optimizer(groups, options, lean=lean)
    if isinstance(optimizer, Averaging):
        optimizer.train()
    return optimizer


def check_optimizer(options: OptimizerOptions, device: torch.device, *, vectors: bool = False) -> None:
    """Let the optimizer make a step on a small matrix, so that a mistake shows before the caches are filled.

    Args:
        vectors: it will have such too, as whole models do.

    Raises:
        ConfigError: as `create_optimizer`, and if it cannot make a plain step on the device.
    """
    sizes = [TRIAL_SIZE, TRIAL_SIZE[1:]] if vectors else [TRIAL_SIZE]
    weights = [nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
    rate = None if options.relative_step else options.learning_rate
    optimizer = make_optimizer([{"params": weights, "lr": rate}], options)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    try:
        if isinstance(optimizer, Averaging):
            optimizer.train()
        optimizer.step()
    except Exception as error:  # libraries raise what they like
        name = options.optimizer_name
        raise ConfigError(f"--optimizer_type {name} cannot train on {device}: {error}") from error


def import_class(path: str, base: type[Kind], flag: str) -> type[Kind]:
    """Import `package.module.Class`. Raises ConfigError, naming `flag`, unless it is a kind of `base`."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{flag} {path}: {module_name} cannot be imported: {error}.") from error
    found = vars(module).get(name)
    if not (isinstance(found, type) and issubclass(found, base)):
        kinds = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, base)]
        what = f"{module_name} has no {base.__name__} of the name '{name}'"
        raise ConfigError(f"{flag}: {what}{did_you_mean(name, kinds) or '.'}")
    return found


def settings_of_class(kind: type) -> Mapping[str, inspect.Parameter]:
    """Return what the class's constructor takes, by name."""
    return inspect.signature(kind).parameters


def check_settings(kind: type, settings: Iterable[str], flag: str) -> None:
    """Raise ConfigError for a setting that the constructor of `kind` does not take."""
    known = settings_of_class(kind)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    names = list(known)[1:]  # the first is what it works on
    for name in settings:
        if name not in names:
            near = did_you_mean(name, names) or f"; there are {', '.join(names)}."
            raise ConfigError(f"{flag}: {kind.__name__} has no setting '{name}'{near}")


def describe_optimizer(optimizer: torch.optim.Optimizer, options: OptimizerOptions) -> str:
    """Return the optimizer's class and the settings that were given, as kohya's metadata writes them."""
    settings = ",".join(f"{name}={value}" for name, value in options.optimizer_settings().items())
    return _class_path(optimizer) + (f"({settings})" if settings else "")


def make_optimizer(
    groups: Sequence[dict[str, object]], options: OptimizerOptions, *, lean: bool = True
) -> torch.optim.Optimizer:
    """Do the one part of `create_optimizer`: make it, whatever its rates are."""
    name = options.optimizer_name
    kind = import_class(options.optimizer_kind.path, torch.optim.Optimizer, "--optimizer_type")
    settings = options.optimizer_settings()
    check_settings(kind, settings, "--optimizer_args")
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if kind is torch.optim.AdamW and devices <= _FUSED_DEVICES and settings.keys() <= SETTINGS:
        kind, settings = (LeanAdamW, settings) if lean else (kind, settings | {"fused": True})
    try:
        optimizer = kind(groups, lr=None if options.relative_step else options.learning_rate, **settings)
    except (TypeError, ValueError) as error:
        what = "does not take its settings" if settings else "cannot be made for these weights"
        raise ConfigError(f"--optimizer_type {name} {what}: {error}") from error
    if kind.__module__.startswith("bitsandbytes."):
        _let_run_ahead(paged=optimizer.is_paged)
    return optimizer


def _let_run_ahead(*, paged: bool) -> None:
    """Keep bitsandbytes from waiting for the whole GPU after each weight, in the middle of backward with
    --fused_backward_pass. It must for states in paged memory; for others the GPU's own order is enough."""
    from bitsandbytes import utils
    from bitsandbytes.optim import optimizer as steps

    steps.sync_gpu = utils.sync_gpu if paged else _go_on


def _go_on(weight: Tensor) -> None:
    """Do not wait."""


def _check_factor(options: OptimizerOptions, rates: Sequence[float]) -> None:
    """Such an optimizer multiplies its own estimate with one rate, which is a factor of about 1."""
    name = options.optimizer_name
    if len(set(rates)) > 1:
        shown = ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
        raise ConfigError(
            f"--optimizer_type {name} finds one rate for all parameters, but they are given several "
            f"({shown}). Leave out what sets them apart: LoRA+, rates of blocks or components, "
            "--text_encoder_lr."
        )
    if rates[0] < _LOWEST_USUAL_FACTOR:
        _log.warning(
            "--optimizer_type %s finds the rate itself, and --learning_rate is a factor on it: %g will "
            "hardly train. Its authors advise 1.",
            *(name, rates[0]),
        )


# --- rates ---


def set_learning_rates(
    optimizer: torch.optim.Optimizer, schedule: Callable[[int, Sequence[float]], Sequence[float]], step: int
) -> None:
    """Set each group's rate to what the schedule makes of the peak rates at `step` (the first is 0).

    An optimizer that steps weights one by one is told which step it is.
    """
    if isinstance(optimizer, OneByOne):
        optimizer.begin(step)
    peaks = [group["initial_lr"] for group in optimizer.param_groups]
    if None in peaks:
        return  # Adafactor with relative steps
    for group, rate in zip(optimizer.param_groups, schedule(step, peaks), strict=True):
        group["lr"] = rate


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the rates of the last step, for the log: `lr/<group>`.

    Optimizers that find the rate themselves have `lr/d*lr/<group>` too, the rate that they arrived at.
    """
    rates: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        name = group.get("name", f"group{number}")
        relative = group["lr"] is None
        rates[f"lr/{name}"] = _relative_rate(group, optimizer.state) if relative else float(group["lr"])
        if not relative and isinstance(group.get("d"), float | Tensor):
            rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
    return rates


def _relative_rate(group: Mapping[str, object], state: Mapping[nn.Parameter, dict]) -> float:
    """Adafactor's rate for the group's first parameter (Shazeer and Stern 2018, algorithm 5)."""
    first = state[group["params"][0]]
    if not first:
        return 0.0  # no step yet
    step = first["step"]
    highest = 1e-6 * step if group["warmup_init"] else 1e-2
    size = max(group["eps"][1], float(first["RMS"])) if group["scale_parameter"] else 1.0
    return size * min(highest, 1 / math.sqrt(step))


# --- averages ---


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have the weights to use in the parameters: to save, preview or validate them.

    They are others than those in training for schedule-free optimizers only. Afterwards the weights in
    training are back bit for bit: the optimizer's own way back rounds, and looking must not change training.
    """
    if not isinstance(optimizer, Averaging):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, weights in zip(parameters, trained, strict=True):
                parameter.copy_(weights)


# --- state ---


def export_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return all that the optimizer remembers: its tensors by name, and a JSON record.

    They are the tensors themselves, where they are, since those of whole models are large: to be written
    before training goes on. Only memory that several of them share is copied, because files cannot tell.

    To be called with the weights in training in the parameters, not within `evaluating`.

    Raises:
        CheckpointError: it remembers something that is neither a tensor nor a plain value.
    """
    assert all(group.get("train_mode", True) for group in optimizer.param_groups), (
        "export outside evaluating()"
    )
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    groups = [
        _pack({key: value for key, value in group.items() if key != "params"}, f"group{number}", tensors)
        for number, group in enumerate(whole["param_groups"])
    ]
    record = {
        "class": _class_path(optimizer),
        "sizes": [len(group["params"]) for group in whole["param_groups"]],
        "groups": groups,
        "state": _pack(whole["state"], "state", tensors),
    }
    return _unshared(tensors), record


def import_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, object]
) -> None:
    """Give a fresh optimizer what `export_state` returned; it then goes on bit for bit.

    Settings that its constructor takes stay those of the fresh optimizer: they may be changed at a resume.

    Raises:
        CheckpointError: the state is another optimizer's, or that of other parameters.
    """
    if record["class"] != _class_path(optimizer):
        raise CheckpointError(
            f"The saved optimizer is {record['class']}, and this run's is {_class_path(optimizer)}. Keep "
            "--optimizer_type, or start a new run from the saved file."
        )
    whole = optimizer.state_dict()
    sizes = [len(group["params"]) for group in whole["param_groups"]]
    if record["sizes"] != sizes:
        raise CheckpointError(
            f"The saved optimizer has groups of {record['sizes']} parameters, and this run's has {sizes}."
        )
    device = optimizer.param_groups[0]["params"][0].device
    state = _unpack(record["state"], tensors, device)
    settings = settings_of_class(_class_of(optimizer)).keys() | {"lr", "initial_lr", "name"}
    groups = []
    for fresh, packed in zip(whole["param_groups"], record["groups"], strict=True):
        saved = _unpack(packed, tensors, device)
        groups.append(fresh | {key: value for key, value in saved.items() if key not in settings})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _restore_dtypes(optimizer, state)


def _restore_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[int, dict]) -> None:
    """torch casts what it loads to the parameter's dtype; the state of bf16 weights may be fp32."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, remembered in state.items():
        loaded = optimizer.state[parameters[number]]
        for key, value in remembered.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def _class_path(optimizer: torch.optim.Optimizer) -> str:
    kind = _class_of(optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"


def _class_of(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """Return the class whose settings and states an optimizer has."""
    if isinstance(optimizer, OneByOne):
        return _class_of(optimizer.inner)
    return torch.optim.AdamW if isinstance(optimizer, LeanAdamW) else type(optimizer)


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """Return `value` as JSON keeps it; its tensors go into `tensors`, under names that start with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(part, f"{name}.{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, tuple | list):
        parts = [_pack(part, f"{name}.{number}", tensors) for number, part in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"The optimizer keeps a {type(value).__name__} ({name}) in its state, which cannot be saved exactly. "
        "Use another --optimizer_type, or leave out the flags that save states."
    )


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which no two share memory."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return apart


def _unpack(packed: object, tensors: Mapping[str, Tensor], device: torch.device) -> object:
    """Undo `_pack`; tensors that were not on the CPU go to `device`."""
    if isinstance(packed, list):
        return [_unpack(part, tensors, device) for part in packed]
    if not isinstance(packed, Mapping):
        return packed
    if "tensor" in packed:
        tensor = tensors[packed["tensor"]]
        return tensor.clone() if packed["on_cpu"] else tensor.to(device, copy=True)
    if "dict" in packed:
        return {key: _unpack(part, tensors, device) for key, part in packed["dict"]}
    if "tuple" in packed:
        return tuple(_unpack(part, tensors, device) for part in packed["tuple"])
    return float(packed["float"])
