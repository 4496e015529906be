"""Which optimizer, how fast, and how the rate changes over the run."""

from __future__ import annotations

import ast
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from library.core.errors import ConfigError
from library.core.suggest import did_you_mean
from library.options.group import OptionGroup, option
from library.options.optimizer_table import (
    OPTIMIZERS,
    OptimizerKind,
    canonical_name,
    optimizer_kind,
    require_package,
)

# By scheduler, the flags that mean something to it besides --learning_rate. transformers also has
# reduce_lr_on_plateau and greedy; they follow the loss, so the rate would not be a function of the step.
# piecewise_constant is diffusers'; adafactor is the name for leaving the rate to Adafactor's relative steps.
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
    "piecewise_constant": frozenset({"lr_scheduler_args"}),
    "adafactor": frozenset(),
}
ADAFACTOR_PATH = "transformers.optimization.Adafactor"
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
    if text.strip() == "1.0":
        return 1.0  # how a config file has 100%
    if value == 0 or (1 <= value < math.inf and value.is_integer() and number == text.strip()):
        return int(value)
    if 0 < value < 1:
        return value
    raise ArgumentTypeError(f"'{text}' is neither a number of steps, a share below 1, nor a percentage")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup):
    """Optimizer and learning rate."""

    optimizer_type: str = option(
        "AdamW",
        f"optimizer: {', '.join(OPTIMIZERS)}, a class of torch.optim, or any other as package.module.Class",
        parse=canonical_name,
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "the same as --optimizer_type Lion")
    optimizer_args: tuple[str, ...] = option(
        (),
        "settings of the optimizer, as key=value (weight_decay=0.1 betas=(0.9,0.99))",
        nargs="*",
        metavar="KEY=VALUE",
    )
    learning_rate: float = option(
        2e-6,
        "peak learning rate; LoRAs often want about 1e-4, whole models 5e-6 to 1e-5, and optimizers that "
        "find the rate (Prodigy) 1",
    )
    unet_lr: float | None = option(
        None, "peak learning rate of the DiT, or of the LoRA on it (default: --learning_rate)"
    )
    max_grad_norm: float = option(1.0, "gradients longer than this are scaled down to it; 0 turns that off")
    lr_scheduler: str = option("constant", "how the rate changes over the run", choices=tuple(SCHEDULERS))
    lr_scheduler_type: str = option(
        "",
        "instead of --lr_scheduler: a class of torch.optim.lr_scheduler, or any as package.module.Class",
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (),
        "settings of --lr_scheduler_type, as key=value (T_max=100), or of piecewise_constant "
        "(step_rules='1:10,0.1:20,0.01')",
        nargs="*",
        metavar="KEY=VALUE",
    )
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
        require_package(self.optimizer_kind.package, f"--optimizer_type {self.optimizer_name}")
        for flag, rate in (("learning_rate", self.learning_rate), ("unet_lr", self.unet_lr)):
            if rate is not None and not 0 < rate < math.inf:
                raise ConfigError(f"--{flag} is {rate}; it must be above 0.{_to_leave_the_dit(flag, rate)}")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ConfigError(f"--max_grad_norm is {self.max_grad_norm}; it must be 0 or more.")
        self.optimizer_settings()
        self._check_scheduler()

    @property
    def optimizer_name(self) -> str:
        """The optimizer's name or class path: what --optimizer_type and its two old short forms say.

        Raises ConfigError if they say different things.
        """
        short = {"--use_8bit_adam": ("AdamW8bit", self.use_8bit_adam)}
        short["--use_lion_optimizer"] = ("Lion", self.use_lion_optimizer)
        named = canonical_name(self.optimizer_type)
        chosen = {flag: name for flag, (name, given) in short.items() if given}
        if named != "AdamW" or not chosen:
            chosen["--optimizer_type"] = named
        if len(set(chosen.values())) > 1:
            shown = " and ".join(f"{flag} ({name})" for flag, name in chosen.items())
            raise ConfigError(f"{shown} name different optimizers; keep one of them.")
        return next(iter(chosen.values()))

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """Where the optimizer comes from. Raises ConfigError for an unknown name."""
        return optimizer_kind(self.optimizer_name)

    @property
    def relative_step(self) -> bool:
        """Whether Adafactor finds its rate by itself, as it does unless --optimizer_args say otherwise."""
        is_adafactor = self.optimizer_kind.path == ADAFACTOR_PATH
        return is_adafactor and bool(self.optimizer_settings().get("relative_step", True))

    @property
    def network_lr(self) -> float:
        """The peak rate of the DiT, or of the LoRA on it."""
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    def optimizer_settings(self) -> dict[str, object]:
        """Return what the optimizer's constructor is given, by name: `--optimizer_args`, else the presets.

        Raises ConfigError for a word that is not key=value, and for what AdamW or Adafactor cannot take.
        """
        found = dict(self.optimizer_kind.presets)
        found |= keyed_literals(self.optimizer_args, "--optimizer_args")
        for reserved in ("lr", "params"):
            if reserved in found:
                raise ConfigError(f"--optimizer_args {reserved}=...: the rate is set by --learning_rate.")
        if self.optimizer_name == "AdamW":
            _check_adamw(found)
        if self.optimizer_kind.path == ADAFACTOR_PATH:
            _check_adafactor(found)
        return found

    def scheduler_settings(self) -> dict[str, object]:
        """Return `--lr_scheduler_args` as values by name, but for last_epoch=-1, which is the default.

        Raises ConfigError for a word that is not key=value.
        """
        settings = keyed_literals(self.lr_scheduler_args, "--lr_scheduler_args")
        return {key: value for key, value in settings.items() if (key, value) != ("last_epoch", -1)}

    def step_rules(self) -> tuple[tuple[float, int | None], ...]:
        """Return piecewise_constant's factors, each with the step before which it holds, None for the last.

        Raises ConfigError unless `--lr_scheduler_args` is such as step_rules=1:10,0.1:20,0.01.
        """
        settings = self.scheduler_settings()
        *pieces, last = str(settings.get("step_rules", "")).split(",")
        try:
            rules = [(float(factor), int(step)) for factor, step in (piece.split(":") for piece in pieces)]
            factors, steps = [factor for factor, _ in rules] + [float(last)], [step for _, step in rules]
        except ValueError:
            factors, steps = [-1.0], []
        rising = all(before < after for before, after in pairwise([0, *steps]))
        if settings.keys() != {"step_rules"} or not rising or not all(map(_is_number, factors)):
            raise ConfigError(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules=1:10,0.1:20,0.01: "
                "the rate times 1 before step 10, times 0.1 before step 20, and times 0.01 from then on."
            )
        return tuple(zip(factors, [*steps, None], strict=True))

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag of the learning rate that has no part in it."""
        yield from super().adjustments()
        yield from self.without_effect(*self._unread())

    def in_effect(self) -> OptimizerOptions:
        """Return the options without those flags of the learning rate that have no part in it."""
        names, _ = self._unread()
        return replace(self, **{name: getattr(OptimizerOptions, name) for name in names})

    def _unread(self) -> tuple[list[str], str]:
        """Name the flags of the schedule that nothing reads, and why, as sd-scripts leaves them out too."""
        settings = sorted(frozenset().union(*SCHEDULERS.values()))
        if self.relative_step:
            chosen = [] if self.lr_scheduler == "adafactor" else ["lr_scheduler"]
            return ["unet_lr", *chosen, "lr_scheduler_type", *settings], (
                "Adafactor finds its rate by relative steps. For a rate and schedule of your own give "
                "--optimizer_args relative_step=False scale_parameter=False"
            )
        if self.lr_scheduler_type:
            names = ["lr_scheduler", *(name for name in settings if name != "lr_scheduler_args")]
            return names, f"--lr_scheduler_type {self.lr_scheduler_type} makes the whole schedule"
        used, reason = SCHEDULERS[self.lr_scheduler], f"--lr_scheduler {self.lr_scheduler} has none"
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            reason += "; constant_with_warmup has a warm-up"
        return [name for name in settings if name not in used], reason

    def _check_scheduler(self) -> None:
        """Raise ConfigError for a scheduler setting that cannot be, or was meant for another one."""
        self.scheduler_settings()
        if self.lr_scheduler == "adafactor" and not self.relative_step:
            raise ConfigError(
                "--lr_scheduler adafactor leaves the rate to Adafactor's relative steps: it needs "
                "--optimizer_type Adafactor, without relative_step=False."
            )
        if self.relative_step:
            return
        if self.lr_scheduler_type:
            root, dot, _ = self.lr_scheduler_type.partition(".")
            require_package(root if dot else "torch", f"--lr_scheduler_type {self.lr_scheduler_type}")
            return
        if self.scheduler_settings() and self.lr_scheduler != "piecewise_constant":
            raise ConfigError(
                f"--lr_scheduler_args are for --lr_scheduler_type and for --lr_scheduler piecewise_constant; "
                f"{self.lr_scheduler} takes its settings from the flags --lr_scheduler_..."
            )
        self._check_scheduler_values(self.lr_scheduler)

    def _check_scheduler_values(self, name: str) -> None:
        if name == "piecewise_constant":
            self.step_rules()
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


def keyed_literals(words: Sequence[str], flag: str) -> dict[str, object]:
    """Read key=value words; values are Python literals, anything else is text.

    Raises ConfigError for a word that is not key=value.
    """
    found: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise ConfigError(f"{flag} '{word}' must be written key=value, without spaces.")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def _to_leave_the_dit(flag: str, rate: float) -> str:
    """Return the way out for who turns a rate off, as sd-scripts does it."""
    if flag != "unet_lr" or rate != 0:
        return ""
    return " Where a LoRA is trained, --network_train_text_encoder_only leaves the DiT as it is."


def _check_adamw(settings: Mapping[str, object]) -> None:
    for key, value in settings.items():
        if key not in ADAMW_SETTINGS:
            near = did_you_mean(key, ADAMW_SETTINGS) or f"; there are {', '.join(ADAMW_SETTINGS)}."
            raise ConfigError(f"--optimizer_args: AdamW has no setting '{key}'{near}")
        fits, what = ADAMW_SETTINGS[key]
        if not fits(value):
            raise ConfigError(f"--optimizer_args {key}={value}: it must be {what}.")


def _check_adafactor(settings: Mapping[str, object]) -> None:
    for key in ("relative_step", "scale_parameter", "warmup_init"):
        if not _is_bool(settings.get(key, True)):
            raise ConfigError(f"--optimizer_args {key}={settings[key]}: it must be True or False.")
    if settings.get("warmup_init", False) and not settings.get("relative_step", True):
        raise ConfigError(
            "--optimizer_args warmup_init=True is a form of Adafactor's relative steps, which "
            "relative_step=False turns off. Leave one of them out; to warm up a rate of your own there is "
            "--lr_warmup_steps."
        )


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
