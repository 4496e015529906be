"""Which optimizer, how fast, and how the rate changes over the run."""

from __future__ import annotations

import ast
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.core.suggest import did_you_mean
from library.options.group import OptionGroup, option

# By scheduler, the flags that mean something to it besides --learning_rate. transformers also has
# reduce_lr_on_plateau and greedy; they follow the loss, so the rate would not be a function of the step.
SCHEDULERS: dict[str, frozenset[str]] = {
    "constant": frozenset(),
    "constant_with_warmup": frozenset({"lr_warmup_steps"}),
    "linear": frozenset({"lr_warmup_steps"}),
    "cosine": frozenset({"lr_warmup_steps"}),
    "cosine_with_restarts": frozenset({"lr_warmup_steps", "lr_scheduler_num_cycles"}),
    "polynomial": frozenset({"lr_warmup_steps", "lr_scheduler_power"}),
    "inverse_sqrt": frozenset({"lr_warmup_steps", "lr_scheduler_timescale"}),
    "cosine_with_min_lr": frozenset(
        {"lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"}
    ),
    "cosine_warmup_with_min_lr": frozenset(
        {"lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"}
    ),
    "warmup_stable_decay": frozenset(
        {"lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"}
    ),
}
NEEDS_MIN_RATIO = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")


def steps_or_share(text: str) -> int | float:
    """Read a number of steps (100) as an int, or a share of all steps (0.05, 5%) as a float from 0 to 1."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if text.strip().endswith("%") and 0 <= value <= 100:
        return value / 100
    if value == 0 or (1 <= value < math.inf and value.is_integer() and number == text.strip()):
        return int(value)
    if 0 < value < 1:
        return value
    raise ArgumentTypeError(f"'{text}' is neither a number of steps, a share below 1, nor a percentage")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup):
    """Optimizer and learning rate."""

    optimizer_type: str = option("AdamW", "optimizer; only AdamW for now")
    optimizer_args: tuple[str, ...] = option(
        (),
        "settings of the optimizer, as key=value (weight_decay=0.1 betas=(0.9,0.99))",
        nargs="*",
        metavar="KEY=VALUE",
    )
    learning_rate: float = option(2e-6, "peak learning rate; LoRAs often want about 1e-4")
    max_grad_norm: float = option(1.0, "gradients longer than this are scaled down to it; 0 turns that off")
    lr_scheduler: str = option("constant", "how the rate changes over the run", choices=tuple(SCHEDULERS))
    lr_warmup_steps: int | float = option(
        0, "steps over which the rate rises from 0; below 1 or with % a share of all", parse=steps_or_share
    )
    lr_decay_steps: int | float = option(
        0, "steps of the fall at the end of warmup_stable_decay, like --lr_warmup_steps", parse=steps_or_share
    )
    lr_scheduler_num_cycles: int = option(1, "waves of the cosine schedulers")
    lr_scheduler_power: float = option(1.0, "exponent of polynomial")
    lr_scheduler_timescale: int | None = option(
        None, "time scale of inverse_sqrt; default: the warm-up steps"
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "lowest rate, as a share of the peak, of the schedulers that have one"
    )

    def __post_init__(self) -> None:
        if self.optimizer_type.lower() != "adamw":
            raise ConfigError(f"--optimizer_type {self.optimizer_type} is not available; there is AdamW.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning_rate is {self.learning_rate}; it must be above 0.")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ConfigError(f"--max_grad_norm is {self.max_grad_norm}; it must be 0 or more.")
        self.optimizer_settings()
        self._check_scheduler()

    def optimizer_settings(self) -> dict[str, object]:
        """Return `--optimizer_args` as values by name. Raises ConfigError for what AdamW cannot take."""
        found: dict[str, object] = {}
        for word in self.optimizer_args:
            key, equals, text = word.partition("=")
            if not equals:
                raise ConfigError(f"--optimizer_args '{word}' must be written key=value, without spaces.")
            if key == "lr":
                raise ConfigError(f"--optimizer_args {word}: the rate is set by --learning_rate.")
            if key not in ADAMW_SETTINGS:
                near = did_you_mean(key, ADAMW_SETTINGS) or f"; there are {', '.join(ADAMW_SETTINGS)}."
                raise ConfigError(f"--optimizer_args: AdamW has no setting '{key}'{near}")
            fits, what = ADAMW_SETTINGS[key]
            found[key] = _literal(text)
            if not fits(found[key]):
                raise ConfigError(f"--optimizer_args {word}: it must be {what}.")
        return found

    def _check_scheduler(self) -> None:
        """Raise ConfigError for a scheduler setting that cannot be, or that the scheduler does not know."""
        name, used = self.lr_scheduler, SCHEDULERS[self.lr_scheduler]
        for flag in frozenset().union(*SCHEDULERS.values()) - used:
            if getattr(self, flag) != getattr(OptimizerOptions, flag):
                users = ", ".join(other for other, flags in SCHEDULERS.items() if flag in flags)
                raise ConfigError(f"--{flag} means nothing to --lr_scheduler {name}; it is for {users}.")
        ratio = self.lr_scheduler_min_lr_ratio
        if name in NEEDS_MIN_RATIO and ratio is None:
            raise ConfigError(f"--lr_scheduler {name} needs --lr_scheduler_min_lr_ratio.")
        if ratio is not None and not 0 <= ratio <= 1:
            raise ConfigError(f"--lr_scheduler_min_lr_ratio is {ratio}; it must be from 0 to 1.")
        if self.lr_scheduler_num_cycles < 1:
            raise ConfigError(
                f"--lr_scheduler_num_cycles is {self.lr_scheduler_num_cycles}; it must be 1 or more."
            )
        if not 0 < self.lr_scheduler_power < math.inf:
            raise ConfigError(f"--lr_scheduler_power is {self.lr_scheduler_power}; it must be above 0.")
        if self.lr_scheduler_timescale is not None and self.lr_scheduler_timescale < 1:
            raise ConfigError(
                f"--lr_scheduler_timescale is {self.lr_scheduler_timescale}; it must be 1 or more."
            )


def _literal(text: str) -> object:
    """Read a Python literal; anything else stays text, which the setting's own check refuses."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_pair_below_one(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_number(b) and b < 1 for b in value)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


ADAMW_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "weight_decay": (_is_number, "a number, 0 or more"),
    "betas": (_is_pair_below_one, "two numbers from 0 to below 1, as (0.9,0.999)"),
    "eps": (_is_number, "a number, 0 or more"),
    "amsgrad": (_is_bool, "True or False"),
    "foreach": (_is_bool, "True or False"),
    "fused": (_is_bool, "True or False"),
}
