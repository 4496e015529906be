"""The run's numbers: averages, what is measured of a step, and where they are written."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from library.core.errors import ConfigError, MissingPackageError
from library.options.saving import LoggingOptions
from library.training.trainee.norm_limit import NormLimit
from library.training.watch.gauges import SigmaBands, StepClock, WeightNorms
from library.training.watch.metrics import AverageLoss, Metrics, SmoothedLoss
from library.training.watch.trackers import check_trackers, make_trackers
from networks.lora import LoRANetwork, LoRASize

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def lines(path: Path) -> list[dict[str, object]]:
    """Read as strictly as a browser would: Python's reader takes NaN, JSON has none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_average_is_over_the_window() -> None:
    average = AverageLoss(3)
    assert [average.add(loss) for loss in (3.0, 5.0, 1.0, 0.0)] == [3.0, 4.0, 3.0, 2.0]


def test_the_smoothed_loss_has_no_pull_towards_zero() -> None:
    smoothed = SmoothedLoss()
    assert [smoothed.add(2.5) for _ in range(5)] == pytest.approx([2.5] * 5)
    weights = 0.98 ** np.arange(5, -1, -1)
    assert smoothed.add(0.0) == pytest.approx(weights[:5].sum() * 2.5 / weights.sum())


def test_a_loss_that_is_not_finite_does_not_spoil_the_averages(tmp_path: Path) -> None:
    trackers = make_trackers(LoggingOptions(), tmp_path / "m.jsonl", "1", is_main=True)
    metrics = Metrics(trackers, total_steps=3, window=2, shown=False)
    for step, loss in enumerate((1.0, math.nan, 3.0), start=1):
        metrics.step(step, loss, {}, peak_bytes=2**30)
    metrics.close()
    found = lines(tmp_path / "m.jsonl")
    assert [line["loss/current"] for line in found] == [1.0, None, 3.0]
    assert [line["loss/average"] for line in found] == [1.0, 1.0, 2.0]
    assert [line.get("loss/epoch_average") for line in found] == [None, 1.0, None]
    assert found[0]["memory/peak_gib"] == 1.0


def test_the_averages_go_on_from_a_state_exactly() -> None:
    losses = [0.1 * n**0.5 for n in range(20)]
    straight, early, late = (Metrics([], total_steps=20, window=6, shown=False) for _ in range(3))
    found: dict[str, list[dict[str, float]]] = {"straight": [], "late": []}
    straight.log = lambda step, values: found["straight"].append(dict(values))  # type: ignore[method-assign]
    late.log = lambda step, values: found["late"].append(dict(values))  # type: ignore[method-assign]
    for step, loss in enumerate(losses, start=1):
        straight.step(step, loss, {}, 0)
        if step <= 9:
            early.step(step, loss, {}, 0)
    late.import_state(json.loads(json.dumps(early.export_state())))
    for step, loss in enumerate(losses[9:], start=10):
        late.step(step, loss, {}, 0)
    assert found["late"] == found["straight"][9:]


@pytest.mark.parametrize("shared", [False, True])
def test_loss_by_band_of_sigma(shared: bool) -> None:
    def read(bands: SigmaBands) -> dict[str, float]:
        return bands.named(bands.measure(0).tolist())

    bands = SigmaBands(torch.device("cpu"), shared=shared)
    bands.add((0.05, 0.15, 0.2), torch.tensor([1.0, 2.0, 8.0], requires_grad=True))
    bands.add((1.0, 0.05), torch.tensor([5.0, 6.0]))
    assert read(bands) == {"loss/sigma_0.0_0.2": 3.0, "loss/sigma_0.2_0.4": 8.0, "loss/sigma_0.8_1.0": 5.0}
    assert read(bands) == {}
    bands.add((0.5, 0.9), torch.tensor([float("nan"), 4.0]))
    found = read(bands)
    assert found["loss/sigma_0.4_0.6"] != found["loss/sigma_0.4_0.6"] and found["loss/sigma_0.8_1.0"] == 4.0


def test_norms_of_all_weights_of_a_kind() -> None:
    network = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("a", "b")})
    weights = torch.cat([network[name].weight.flatten() for name in ("a", "b")])
    gauge = WeightNorms(network)
    norms = gauge.named(gauge.measure(0).tolist())
    assert norms["norm/weight"] == pytest.approx(weights.norm().item())
    assert norms.keys() == {"norm/weight", "norm/bias"}
    looked = [step + 1 for step in range(25) if gauge.named(gauge.measure(step).tolist())]
    assert looked == [1, 10, 20]


def test_what_a_limit_did_is_read_with_the_numbers_of_the_next_step() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    network = LoRANetwork(model, {"0": LoRASize(2, 2.0)})
    (lora,) = network.loras.values()
    nn.init.ones_(lora.up)
    gauge = NormLimit(network, 0.5, torch.device("cpu"))
    assert gauge.named(gauge.measure(0).tolist()) == {}
    gauge.apply()
    found = gauge.named(gauge.measure(1).tolist())
    assert found["max_norm/keys_scaled"] == 1
    assert found["max_norm/max_key_norm"] == found["max_norm/average_key_norm"] == pytest.approx(0.5)
    assert lora.norm().item() == pytest.approx(0.5)
    assert gauge.last() == {}
    gauge.apply()
    assert gauge.last()["max_norm/max_key_norm"] == pytest.approx(0.5)


def test_the_clock_times_waiting_and_work_but_not_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow() -> Iterator[int]:
        for number in range(2):
            spend(0.5)
            yield number

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = StepClock()
    for _ in clock.watch(slow()):
        spend(1.5)
        speed = clock.read(pictures=4)
        spend(100.0)  # a preview
        assert speed == {"speed/images_per_second": 2.0, "speed/data_wait_seconds": 0.5}


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tmp_path / "trackers.toml"
    config.write_text("[tensorboard]\nfilename_suffix = '.mine'\n", encoding="utf-8")
    options = LoggingOptions(logging_dir=tmp_path / "logs", log_prefix="p", log_tracker_config=config)
    metrics = Metrics(
        make_trackers(options, tmp_path / "m.jsonl", "1", is_main=True), total_steps=1, window=1, shown=False
    )
    metrics.step(1, 0.5, {"lr/lora": 1e-4}, peak_bytes=0)
    metrics.picture(1, "sample/00", PICTURE, "a cat")
    metrics.close()
    (file,) = (tmp_path / "logs").rglob("events.*")
    assert file.name.endswith(".mine") and file.parent.name == "network_train"
    events = EventAccumulator(str(file)).Reload()
    assert events.Scalars("lr/lora")[0].value == pytest.approx(1e-4)
    (image,) = events.Images("sample/00")
    assert (image.step, image.width, image.height) == (1, 6, 4)


class StandIn(types.ModuleType):
    """What of wandb's interface is used; it keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.keys: list[str] = []
        self.logged: list[tuple[int, dict[str, object]]] = []
        self.config: dict[str, object] = {}
        self.finished = False

    def login(self, key: str) -> None:
        if key == "wrong":
            raise self.errors.Error("API key must be 40 characters long")
        self.keys.append(key)

    def init(self, **given: object) -> StandIn:
        self.given = given
        return self

    def Image(self, pixels: np.ndarray, caption: str) -> tuple[str, np.ndarray]:
        return caption, pixels

    def log(self, values: dict[str, object], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_numbers_pictures_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tmp_path / "trackers.toml"
    config.write_text("[wandb]\nentity = 'team'\ntags = ['lumina']\n", encoding="utf-8")
    options = LoggingOptions(
        log_with="wandb",
        logging_dir=tmp_path / "logs",
        log_tracker_name="project",
        wandb_run_name="first",
        wandb_api_key="secret",
        log_tracker_config=config,
    )
    check_trackers(options)
    metrics = Metrics(
        make_trackers(options, tmp_path / "m.jsonl", "1", is_main=True), total_steps=1, window=1, shown=False
    )
    metrics.log(1, {"loss/validation": 0.5})
    metrics.picture(1, "sample/00", PICTURE, "a cat")
    metrics.close()
    assert wandb.keys == ["secret"]
    assert wandb.given == {
        "project": "project",
        "name": "first",
        "dir": str(tmp_path / "logs"),
        "entity": "team",
        "tags": ["lumina"],
    }
    assert wandb.logged == [(1, {"loss/validation": 0.5}), (1, {"sample/00": ("a cat", PICTURE)})]
    assert wandb.finished
    assert "secret" not in (tmp_path / "m.jsonl").read_text(encoding="utf-8")


def test_the_configuration_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = LoggingOptions(log_with="all", logging_dir=tmp_path / "logs")
    for tracker in make_trackers(options, tmp_path / "m.jsonl", "1", is_main=True):
        tracker.config("[training]\nseed = 7\n")
        tracker.close()
    assert wandb.config == {"training": {"seed": 7}}
    (file,) = (tmp_path / "logs").rglob("events.*")
    (text,) = EventAccumulator(str(file)).Reload().Tensors("config/text_summary")
    assert b"seed = 7" in text.tensor_proto.string_val[0]
    assert (tmp_path / "m.jsonl").read_text(encoding="utf-8") == ""


def test_wandb_that_refuses_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn())
    options = LoggingOptions(log_with="wandb", wandb_api_key="wrong")
    with pytest.raises(ConfigError, match="40 characters.*wandb login"):
        make_trackers(options, tmp_path / "m.jsonl", "1", is_main=True)


def test_wandb_that_is_not_installed_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(MissingPackageError, match="pip install wandb"):
        check_trackers(LoggingOptions(log_with="wandb"))


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    options = LoggingOptions(logging_dir=tmp_path / "logs")
    assert make_trackers(options, tmp_path / "m.jsonl", "1", is_main=False) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "trackers"),
    [
        ({}, ()),
        ({"logging_dir": Path("x")}, ("tensorboard",)),
        ({"log_with": "wandb"}, ("wandb",)),
        ({"log_with": "all", "logging_dir": Path("x")}, ("tensorboard", "wandb")),
    ],
)
def test_which_trackers(options: dict[str, object], trackers: tuple[str, ...]) -> None:
    assert LoggingOptions(**options).trackers == trackers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_with": "all"}, "--log_with all needs --logging_dir"),
        ({"log_with": "tensorboard"}, "--log_with tensorboard needs --logging_dir"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoggingOptions(**options)


def test_a_table_for_no_tracker_of_the_run_is_named(tmp_path: Path) -> None:
    config = tmp_path / "trackers.toml"
    config.write_text("[wandbb]\nentity = 'x'\n", encoding="utf-8")
    options = LoggingOptions(logging_dir=tmp_path, log_tracker_config=config)
    with pytest.raises(ConfigError, match=r"'wandbb' is not a table.*\[tensorboard\]"):
        check_trackers(options)
