"""What the lycoris-lora package would make for a model: which layers, of which kind and of which sizes.

The package is asked with a hollow twin of the model, whose modules have the names of the original code and
whose tensors have shapes but no content. So nothing is loaded or copied, and no random number is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import ModuleType

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.core.errors import ConfigError, MissingPackageError
from library.core.log import logger
from networks.families.family import Family
from networks.families.known import family_of
from networks.layer import LoRALinear, linear_layers
from networks.lycoris.args import LycorisArgs, read_preset
from networks.lycoris.kinds import Settings
from networks.lycoris.layer import LycorisSize
from networks.names import kohya_name

_log = logger("network")
_KINDS = {"locon": "lora", "kron": "lokr"}  # the package's modules have other names than its algorithms
_SETTINGS = {"alpha", "on_input"}


def planned(
    model: nn.Module, chosen: LycorisArgs, *, dim: int, alpha: float | None, text_encoder: bool
) -> dict[str, LycorisSize]:
    """Return what each layer of a model gets, by path.

    Raises:
        ConfigError: the preset fits no layer, or a layer has no network of these sizes.
        MissingPackageError: the package is not installed.
    """
    kohya = _package()
    family = family_of(linear_layers(model))
    preset = _preset(chosen.preset, family)
    prefix = "lora_te" if text_encoder else "lora_unet"
    paths = {kohya_name(path, prefix): path for path in linear_layers(model)}
    with FakeTensorMode(), _as_configured(kohya.LycorisNetworkKohya, preset), _its_warnings():
        twin, nothing = _twin(model, family), nn.Module()
        try:
            network = kohya.LycorisNetworkKohya(
                twin if text_encoder else None,
                nothing if text_encoder else twin,
                warn_on_unmatched=read_preset(chosen.preset) is not None,
                **_arguments(chosen, dim, alpha),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--network_module lycoris.kohya cannot make algo={chosen.algo}, preset={chosen.preset} with "
                f"--network_dim {dim}: {str(error).rstrip('.')}."
            ) from error
        sizes = {paths[module.lora_name]: _size(module, chosen) for module in network.loras}
    if not sizes:
        raise ConfigError(
            f"--network_args preset={chosen.preset} fits no layer of the "
            f"{'text encoder' if text_encoder else 'model'}; preset=full does."
        )
    return sizes


def _package() -> ModuleType:
    try:
        from lycoris import kohya
    except ImportError as error:
        raise MissingPackageError("lycoris-lora", "--network_module lycoris.kohya") from error
    return kohya


def _preset(name: str, family: Family | None) -> dict[str, object]:
    """Return a preset; what the package's own say of other models' classes they say of this family's too."""
    from lycoris.config import PRESET
    from lycoris.config_sdk import PresetConfig, PresetValidationError

    content = read_preset(name)
    if content is None:
        own = PRESET[name]
        classes = own["unet_target_module"]
        meant = {} if family is None else family.preset_classes
        return own | {"unet_target_module": [*classes, *(c for key in classes for c in meant.get(key, ()))]}
    try:
        return PresetConfig.from_dict(content).to_dict()
    except PresetValidationError as error:
        raise ConfigError(f"--network_args preset={name}: {error}.") from error


def _arguments(chosen: LycorisArgs, dim: int, alpha: float | None) -> dict[str, object]:
    """Return the arguments of the package's network. Dropouts are done here, and not by its modules."""
    passed = ("use_scalar", "rs_lora", "factor", "decompose_both", "full_matrix", "rescaled")
    passed += ("unbalanced_factorization", "train_on_input")
    values = asdict(chosen)
    return {name: values[name] for name in passed} | {
        "network_module": chosen.algo,
        "lora_dim": dim,
        "conv_lora_dim": 0,
        "alpha": alpha or dim,
        "constraint": chosen.constraint,
        "weight_decompose": chosen.dora_wd,
        "wd_on_out": chosen.wd_on_output,
        "bypass_mode": False,
    }


def _twin(module: nn.Module, family: Family | None, path: str = "") -> nn.Module:
    """Return a hollow copy of the module at `path` of a model, with the class names of the original code."""
    if isinstance(module, LoRALinear):
        module = module.base
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    name = (None if family is None else family.class_of(path)) or type(module).__name__
    twin = type(name, (nn.Module,), {})()
    for child_name, child in module.named_children():
        twin.add_module(child_name, _twin(child, family, f"{path}.{child_name}" if path else child_name))
    return twin


def _size(module: nn.Module, chosen: LycorisArgs) -> LycorisSize:
    """Return what one of the package's modules trains."""
    kind = _KINDS.get(module.name, module.name)
    tensors: Mapping[str, Tensor] = module.state_dict()
    shapes = {
        key.removesuffix(".weight"): tuple(tensor.shape)
        for key, tensor in tensors.items()
        if key not in _SETTINGS
    }
    if kind in ("lora", "loha", "lokr"):
        settings = Settings(alpha=module.scale * module.lora_dim)
        if isinstance(module.scalar, nn.Parameter):
            shapes["scalar"] = ()
    elif kind == "ia3":
        settings = Settings(on_input=module.train_input)
    elif kind == "full":
        settings = Settings()
    elif kind in ("diag-oft", "boft"):
        settings = Settings(alpha=module.constraint / module.dim)
    else:
        raise ConfigError(
            f"--network_args preset={chosen.preset} asks for '{kind}', which is not made here, as nothing "
            f"tests it."
        )
    return LycorisSize(kind, shapes, settings)


@contextmanager
def _as_configured(network_class: type, preset: Mapping[str, object]) -> Iterator[None]:
    """Let the package's class have a preset for a while: it keeps presets in attributes of the class."""
    before = {name: value for name, value in vars(network_class).items() if name.isupper()}
    network_class.apply_preset(preset)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(network_class, name, value)


class _Forward(logging.Handler):
    """Tells the package's warnings in our log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tell one."""
        _log.warning("lycoris: %s", record.getMessage())


@contextmanager
def _its_warnings() -> Iterator[None]:
    """Let the package's warnings go to our log, and its other lines nowhere."""
    its = logging.getLogger("LyCORIS")
    handlers, level = its.handlers, its.level
    its.handlers = [_Forward(logging.WARNING)]
    its.setLevel(logging.WARNING)
    try:
        yield
    finally:
        its.handlers = handlers
        its.setLevel(level)
