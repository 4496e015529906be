"""The optimizers that `--optimizer_type` knows by name, and where each comes from. Torch-free.

Names are those of sd-scripts, in any case. Everything else is a class path, `package.module.Class`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

from library.core.errors import ConfigError, MissingPackageError
from library.core.suggest import did_you_mean


@dataclass(frozen=True)
class OptimizerKind:
    """Where an optimizer comes from and what sets it apart.

    path: its class. presets: settings that its name stands for; `--optimizer_args` may overrule them.
    finds_its_rate: it estimates the rate itself; the learning rate is a factor on that, 1 as a rule, and must
    be the same for all parameters.
    """

    path: str
    presets: Mapping[str, object] = field(default_factory=dict)
    finds_its_rate: bool = False

    @property
    def package(self) -> str:
        """The top-level package to import."""
        return self.path.partition(".")[0]


_NESTEROV = {"momentum": 0.9, "nesterov": True}


def _dadapt(name: str) -> OptimizerKind:
    return OptimizerKind(f"dadaptation.{name}", finds_its_rate=True)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "AdamW": OptimizerKind("torch.optim.AdamW"),
    "AdamW8bit": OptimizerKind("bitsandbytes.optim.AdamW8bit"),
    "PagedAdamW": OptimizerKind("bitsandbytes.optim.PagedAdamW"),
    "PagedAdamW8bit": OptimizerKind("bitsandbytes.optim.PagedAdamW8bit"),
    "PagedAdamW32bit": OptimizerKind("bitsandbytes.optim.PagedAdamW32bit"),
    "Lion": OptimizerKind("lion_pytorch.Lion"),
    "Lion8bit": OptimizerKind("bitsandbytes.optim.Lion8bit"),
    "PagedLion8bit": OptimizerKind("bitsandbytes.optim.PagedLion8bit"),
    "SGDNesterov": OptimizerKind("torch.optim.SGD", _NESTEROV),
    "SGDNesterov8bit": OptimizerKind("bitsandbytes.optim.SGD8bit", _NESTEROV),
    "Adafactor": OptimizerKind("transformers.optimization.Adafactor"),
    "Prodigy": OptimizerKind("prodigyopt.Prodigy", finds_its_rate=True),
    "DAdaptation": _dadapt("experimental.DAdaptAdamPreprint"),
    "DAdaptAdamPreprint": _dadapt("experimental.DAdaptAdamPreprint"),
    "DAdaptAdaGrad": _dadapt("DAdaptAdaGrad"),
    "DAdaptAdam": _dadapt("DAdaptAdam"),
    "DAdaptAdan": _dadapt("DAdaptAdan"),
    "DAdaptAdanIP": _dadapt("experimental.DAdaptAdanIP"),
    "DAdaptLion": _dadapt("DAdaptLion"),
    "DAdaptSGD": _dadapt("DAdaptSGD"),
    "AdamWScheduleFree": OptimizerKind("schedulefree.AdamWScheduleFree"),
    "RAdamScheduleFree": OptimizerKind("schedulefree.RAdamScheduleFree"),
    "SGDScheduleFree": OptimizerKind("schedulefree.SGDScheduleFree"),
}
# Others of torch, for which the name of the class is enough. LBFGS calls the loss itself, and SparseAdam
# needs sparse gradients: neither can train a LoRA.
TORCH_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
)
# SimpleTuner's names, and what comes nearest.
_ELSEWHERE: Mapping[str, str] = {
    "adamw_bf16": "the nearest is AdamW, and --full_bf16 keeps the trained weights in bf16 too",
    "optimi-stableadamw": "the nearest are AdamW, and pytorch_optimizer.StableAdamW of another package",
    "optimi-adamw": "use AdamW",
    "optimi-lion": "use Lion",
    "bnb-adamw": "use AdamW",
    "bnb-adamw8bit": "use AdamW8bit",
    "bnb-adamw8bit-paged": "use PagedAdamW8bit",
    "bnb-lion8bit": "use Lion8bit",
    "bnb-lion8bit-paged": "use PagedLion8bit",
}
_PIP_NAMES = {
    "lion_pytorch": "lion-pytorch",
    "pytorch_optimizer": "pytorch-optimizer",
    "prodigyplus": "prodigy-plus-schedule-free",
}
_BY_LOWER_NAME = {name.lower(): name for name in (*OPTIMIZERS, *TORCH_OPTIMIZERS)}


def canonical_name(text: str) -> str:
    """Return an optimizer's name as it is written here; class paths stay, and nothing means AdamW."""
    return _BY_LOWER_NAME.get(text.strip().lower(), text.strip()) or "AdamW"


def optimizer_kind(name: str) -> OptimizerKind:
    """Look up what `--optimizer_type` says, a name or a class path. Raises ConfigError if it is neither."""
    name = canonical_name(name)
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name in TORCH_OPTIMIZERS:
        return OptimizerKind(f"torch.optim.{name}")
    if "." in name:
        return OptimizerKind(name, finds_its_rate=name.startswith(("dadaptation.", "prodigyopt.")))
    if name.lower() in _ELSEWHERE:
        raise ConfigError(f"--optimizer_type: '{name}' is SimpleTuner's; {_ELSEWHERE[name.lower()]}.")
    near = did_you_mean(name, _BY_LOWER_NAME.values()) or "."
    raise ConfigError(
        f"--optimizer_type: there is no optimizer '{name}'{near} Known are {', '.join(OPTIMIZERS)}, the "
        "classes of torch.optim, and any other as package.module.Class."
    )


def require_package(package: str, needed_for: str) -> None:
    """Raise MissingPackageError unless a top-level package can be found; it is not imported.

    ConfigError for one that is not known here: nobody should install whatever has a mistyped name.
    """
    if importlib.util.find_spec(package) is not None:
        return
    if package in _PIP_NAMES or package in {kind.package for kind in OPTIMIZERS.values()}:
        raise MissingPackageError(package, needed_for, _PIP_NAMES.get(package))
    raise ConfigError(f"{needed_for}: no package '{package}' is installed. Is it spelt right?")
