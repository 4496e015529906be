"""Making the optimizer, and what `--optimizer_args` may say."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from library.core.errors import ConfigError
from library.options.group import parse_options
from library.options.optimizer import ADAMW_SETTINGS, OptimizerOptions
from library.training.optim.optimizer import create_optimizer, describe_optimizer, set_learning_rates


@dataclass(frozen=True)
class Options:
    optimizer: OptimizerOptions


def parse(*words: str) -> OptimizerOptions:
    return parse_options(Options, list(words)).optimizer


def parameters(count: int = 3) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(5, 4, generator=random)) for _ in range(count)]


def test_steps_like_torchs_adamw() -> None:
    options = parse("--learning_rate=1e-2", "--optimizer_args", "weight_decay=0.1", "betas=(0.8,0.95)")
    ours, reference = parameters(), parameters()
    optimizer = create_optimizer([{"params": ours, "lr": options.learning_rate}], options)
    plain = torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), foreach=False)
    for step in range(5):
        for a, b in zip(ours, reference, strict=True):
            a.grad = torch.full_like(a, 0.1 * step - 0.2) * a.detach().sign()
            b.grad = a.grad.clone()
        optimizer.step()
        plain.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, reference, strict=True))


def test_is_fused_unless_told_otherwise() -> None:
    groups = [{"params": parameters(), "lr": 1e-3}]
    assert create_optimizer(groups, parse()).defaults["fused"] is True
    for words in ("fused=False", "foreach=True"):
        assert not create_optimizer(groups, parse("--optimizer_args", words)).defaults["fused"]


def test_rates_follow_each_groups_peak() -> None:
    groups = [{"params": parameters(), "lr": 1e-3, "name": "down"}, {"params": parameters(), "lr": 4e-3}]
    optimizer = create_optimizer(groups, parse())
    for factor in (0.5, 0.25):
        set_learning_rates(optimizer, lambda step, peaks, f=factor: [f * peak for peak in peaks], step=0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25e-3, 1e-3]
    assert "initial_lr" not in groups[0]  # the caller's groups are not touched


def test_description_is_kohyas() -> None:
    groups = [{"params": parameters(), "lr": 1e-3}]
    options = parse("--optimizer_args", "weight_decay=0.1", "eps=1e-6")
    described = describe_optimizer(create_optimizer(groups, options), options)
    assert described == "torch.optim.adamw.AdamW(weight_decay=0.1,eps=1e-06)"
    assert describe_optimizer(create_optimizer(groups, parse()), parse()) == "torch.optim.adamw.AdamW"


def test_the_settings_are_torchs() -> None:
    assert set(ADAMW_SETTINGS) <= set(inspect.signature(torch.optim.AdamW).parameters)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer_type=Lyon"], "there is no optimizer 'Lyon'; did you mean 'Lion'"),
        (["--optimizer_type=adamw_8bit"], "did you mean 'AdamW8bit'"),
        (["--optimizer_type=Lion", "--use_8bit_adam"], "name different optimizers"),
        (["--use_lion_optimizer", "--use_8bit_adam"], "name different optimizers"),
        (["--unet_lr=0"], "--unet_lr is 0.0; it must be above 0.*--network_train_text_encoder_only"),
        (["--optimizer_type=Lion", "--optimizer_args", "lr=1"], "set by --learning_rate"),
        (["--lr_scheduler=adafactor"], "needs --optimizer_type Adafactor"),
        (
            [
                "--optimizer_type=Adafactor",
                "--lr_scheduler=adafactor",
                "--optimizer_args=relative_step=False",
            ],
            "without relative_step=False",
        ),
        (
            ["--optimizer_type=Adafactor", "--optimizer_args", "relative_step=False", "warmup_init=True"],
            "warmup_init=True is a form of Adafactor's relative steps",
        ),
        (["--optimizer_type=Adafactor", "--optimizer_args", "relative_step=1"], "must be True or False"),
        (["--lr_scheduler=cosine", "--lr_scheduler_args", "T_max=3"], "and for --lr_scheduler piecewise"),
        (["--lr_scheduler=piecewise_constant"], "needs --lr_scheduler_args step_rules="),
        (["--learning_rate=0"], "above 0"),
        (["--learning_rate=nan"], "above 0"),
        (["--max_grad_norm=-1"], "0 or more"),
        (["--optimizer_args", "weight_decya=0.1"], "no setting 'weight_decya'; did you mean 'weight_decay'"),
        (["--optimizer_args", "weight_decay"], "written key=value"),
        (["--optimizer_args", "weight_decay=high"], "weight_decay=high: it must be a number"),
        (["--optimizer_args", "betas=0.9"], "two numbers"),
        (["--optimizer_args", "betas=(0.9,1.0)"], "two numbers"),
        (["--optimizer_args", "amsgrad=1"], "True or False"),
        (["--optimizer_args", "lr=1"], "set by --learning_rate"),
        (["--lr_scheduler=cosin"], "invalid choice"),
        (["--lr_scheduler_args", "last_epoch=3"], "and for --lr_scheduler piecewise"),
        (["--lr_scheduler=cosine_with_min_lr"], "needs --lr_scheduler_min_lr_ratio"),
        (["--lr_scheduler=cosine_with_min_lr", "--lr_scheduler_min_lr_ratio=2"], "from 0 to 1"),
        (["--lr_scheduler=cosine_with_restarts", "--lr_scheduler_num_cycles=0"], "1 or more"),
        (["--lr_scheduler=polynomial", "--lr_scheduler_power=0"], "above 0"),
        (["--lr_scheduler=inverse_sqrt", "--lr_scheduler_timescale=0"], "1 or more"),
        (["--lr_scheduler=linear", "--lr_warmup_steps=1.5"], "neither a number of steps"),
        (["--lr_scheduler=linear", "--lr_warmup_steps=-3"], "neither a number of steps"),
        (["--lr_scheduler=linear", "--lr_warmup_steps=120%"], "neither a number of steps"),
        (["--lr_scheduler=linear", "--lr_warmup_steps=many"], "'many' is neither a number of steps"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*words)


@pytest.mark.parametrize("flag", ["--optimizer_type", "--lr_scheduler_type"])
def test_a_class_of_a_package_that_is_not_there(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} no_such_package.X: no package 'no_such_package' is"):
        parse(f"{flag}=no_such_package.X")


@pytest.mark.parametrize(
    ("text", "value"), [("100", 100), ("0", 0), ("0.05", 0.05), ("5%", 0.05), ("100%", 1.0), ("1e2", 100)]
)
def test_warmup_is_steps_or_a_share(text: str, value: int | float) -> None:
    warmup = parse("--lr_scheduler=linear", f"--lr_warmup_steps={text}").lr_warmup_steps
    assert warmup == value and type(warmup) is type(value)


@pytest.mark.parametrize("module", ["library.options.optimizer", "library.training.optim.lr"])
def test_can_be_imported_without_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "AdamW"),
        (["--optimizer_type="], "AdamW"),
        (["--optimizer_type=adamw8BIT"], "AdamW8bit"),
        (["--use_8bit_adam"], "AdamW8bit"),
        (["--use_8bit_adam", "--optimizer_type=AdamW8bit"], "AdamW8bit"),
        (["--use_lion_optimizer"], "Lion"),
        (["--optimizer_type=radam"], "RAdam"),
        (["--optimizer_type=torch.optim.NAdam"], "torch.optim.NAdam"),
    ],
)
def test_names_in_any_case_and_the_old_short_forms(words: list[str], name: str) -> None:
    assert parse(*words).optimizer_name == name


@pytest.mark.parametrize("rules", ["1:10", "1:10,0.1:5,0.01", "1:ten,0.1", "-1:3,1", "1:0,2", "", "1:3.5,1"])
def test_step_rules_that_are_none(rules: str) -> None:
    with pytest.raises(ConfigError, match="the rate times 1 before step 10"):
        parse("--lr_scheduler=piecewise_constant", "--lr_scheduler_args", f"step_rules={rules}")


def test_settings_are_python_literals_over_what_the_name_stands_for() -> None:
    words = ["--optimizer_type=SGDNesterov", "--optimizer_args", "momentum=0.5", "weight_decay=1e-2"]
    settings = parse(*words).optimizer_settings()
    assert settings == {"momentum": 0.5, "nesterov": True, "weight_decay": 0.01}
    assert parse("--optimizer_type=Prodigy", "--optimizer_args", "betas=0.9,0.99").optimizer_settings() == {
        "betas": (0.9, 0.99)
    }


def test_the_rate_of_the_dit() -> None:
    assert parse("--learning_rate=1e-3").network_lr == 1e-3
    assert parse("--learning_rate=1e-3", "--unet_lr=2e-4").network_lr == 2e-4


@pytest.mark.parametrize(("name", "waits"), [("AdamW8bit", 0), ("Lion8bit", 0), ("PagedAdamW8bit", 3)])
def test_bitsandbytes_waits_for_the_device_only_where_states_are_paged(
    monkeypatch: pytest.MonkeyPatch, name: str, waits: int
) -> None:
    """In its step; the update itself is left out, because a CPU has none for paged states."""
    from bitsandbytes import utils

    waited: list[torch.Tensor] = []
    monkeypatch.setattr(utils, "sync_gpu", waited.append)
    weights = parameters(2)
    optimizer = create_optimizer([{"params": weights, "lr": 1e-3}], parse(f"--optimizer_type={name}"))
    for method in ("to_gpu", "init_state", "prefetch_state", "update_step"):
        monkeypatch.setattr(optimizer, method, lambda *_: None)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert len(waited) == waits
