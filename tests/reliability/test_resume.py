"""A resumed run is the uninterrupted run, bit for bit; and what may be changed on the way."""

from __future__ import annotations

import itertools
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.core.errors import CheckpointError, ConfigError, Stopped
from library.options.saving import SavingOptions
from library.options.state import StateOptions
from library.training.events import Moment
from library.training.state.checkpoint import read_state
from library.training.state.contents import RunFacts, StateSaver
from library.training.state.resume import require_one_start
from tests.reliability.legs import NAME, losses, same, states, weights, write_dataset


@pytest.fixture(scope="module")
def saved(nano, config, tmp_path_factory):
    """The folder of a run of six steps with a state after each, EMA included."""
    from tests.reliability import legs

    output = tmp_path_factory.mktemp("saved")
    flags = ("--ema", "--save_state", "--save_every_n_steps=1", "--save_every_n_epochs=1")
    legs.train(legs.words(nano, config, output, *flags))
    return output


def test_states_are_named_as_in_the_reference_tool(saved: Path) -> None:
    by_step = [f"-step{step:08d}-state" for step in range(1, 6)]
    assert states(saved) == sorted(["-000001-state", "-state", *by_step])
    assert not list(saved.glob(".*"))


def test_saving_states_changes_nothing(saved: Path, whole: Path) -> None:
    assert same(weights(saved), weights(whole))
    assert losses(saved) == losses(whole)


@pytest.mark.parametrize("step", range(1, 6))
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one(train, saved, whole, tmp_path, step) -> None:
    output = train(tmp_path, "--ema", f"--resume={saved / f'{NAME}-step{step:08d}-state'}")
    assert same(weights(output), weights(whole))
    assert same(weights(output, "-ema"), weights(whole, "-ema"))
    assert losses(output) == {k: v for k, v in losses(whole).items() if k > step}


def test_six_legs_are_one_run(train, whole: Path, tmp_path: Path) -> None:
    """sd-scripts #2171: there the second resume counts from the wrong step."""
    for step in range(6):  # the first is stopped before its first step already
        with pytest.raises(Stopped, match=f"Stopped by --max_train_minutes 1e-09 after step {step};"):
            train(tmp_path, "--ema", "--resume=latest", "--max_train_minutes=1e-9")
    assert states(tmp_path) == ["-step00000004-state", "-step00000005-state"]  # the newest two
    train(tmp_path, "--ema", "--resume=latest")
    assert same(weights(tmp_path), weights(whole))
    assert losses(tmp_path) == losses(whole)
    assert states(tmp_path) == ["-state"]  # by which the next start sees that all is done


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "Prodigy", "AdamWScheduleFree", "Adafactor"])
def test_a_run_with_another_optimizer_resumes_exactly(train, tmp_path: Path, optimizer: str) -> None:
    """Validation and saving in between use other weights than training with a schedule-free optimizer."""
    flags = [f"--optimizer_type={optimizer}", "--lr_scheduler=constant", "--max_train_epochs=2"]
    flags += (
        ["--optimizer_args", "relative_step=False"] if optimizer == "Adafactor" else ["--learning_rate=1"]
    )
    train(tmp_path / "a", *flags, "--save_state", "--save_every_n_steps=2")
    train(tmp_path / "b", *flags, f"--resume={tmp_path / 'a' / f'{NAME}-step00000004-state'}")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_accumulated_steps_resume_exactly(train, tmp_path: Path) -> None:
    flags = ("--gradient_accumulation_steps=2", "--optimizer_type=Lion", "--max_train_epochs=3")
    train(tmp_path / "a", *flags, "--save_state", "--save_every_n_steps=1")
    state = tmp_path / "a" / f"{NAME}-step00000003-state"
    train(tmp_path / "b", *flags, f"--resume={state}", "--max_data_loader_n_workers=2")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_finished_run_says_so_and_can_be_made_longer(train, saved: Path, tmp_path: Path, caplog) -> None:
    output = tmp_path / "out"
    shutil.copytree(saved, output)
    before = (output / f"{NAME}.safetensors").read_bytes()
    train(output, "--ema", "--resume=latest")
    assert (output / f"{NAME}.safetensors").read_bytes() == before
    train(output, "--ema", "--resume=latest", "--max_train_epochs=3", "--save_state_on_train_end")
    assert sorted(losses(output)) == list(range(1, 10))
    record = read_state(output / f"{NAME}-state").record
    assert record.step == 9
    assert any("--max_train_epochs is 3 from here on; it was 2" in line for line in record.history)
    with pytest.raises(
        ConfigError, match=r"kiwi-state is a state after step 9, but the run ends after step 3"
    ):
        train(output, "--ema", "--resume=latest", "--max_train_epochs=1")


def test_latest_without_a_state_starts_from_the_beginning(train, whole: Path, tmp_path: Path) -> None:
    output = train(tmp_path, "--ema", "--resume=latest")
    assert losses(output) == losses(whole)


def test_latest_passes_over_a_damaged_state(train, saved: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(saved, output)
    shutil.rmtree(output / f"{NAME}-state")
    newest = output / f"{NAME}-step00000005-state" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    train(output, "--ema", "--resume=latest")
    assert same(weights(output), weights(whole))


CHANGES_REFUSED = {
    "--seed=8": "--seed is 8, but the run in .* has seed 7",
    "--network_dim=4": "--network_dim is 4, but was 2 .*rank",
    "--network_alpha=2": "--network_alpha is 2.0, but was 1.0",
    "--optimizer_type=Lion": "--optimizer_type is Lion, but was AdamW",
}


@pytest.mark.parametrize("flag", CHANGES_REFUSED)
def test_what_the_state_hangs_on_must_stay(train, saved: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=CHANGES_REFUSED[flag]):
        train(tmp_path, f"--resume={saved / f'{NAME}-step00000002-state'}", flag)


def test_another_dataset_rate_and_precision_are_allowed_and_told(
    train, saved, tmp_path: Path, capsys
) -> None:
    dataset = write_dataset(tmp_path / "photos", pictures=6, batch_size=1)
    state = saved / f"{NAME}-000001-state"
    flags = ("--ema", "--learning_rate=1e-3", "--max_train_epochs=2", "--save_state")
    flags += ("--base_quant=int8", "--console_log_level=WARNING")
    train(tmp_path / "out", f"--resume={state}", *flags, dataset=dataset)
    warned = [
        line for line in capsys.readouterr().err.splitlines() if "from here on" in line or "int8" in line
    ]
    assert len(warned) == 1 and "and go on on the model in int8" in warned[0]
    # After the first of two epochs: the second has six steps now.
    assert sorted(losses(tmp_path / "out")) == list(range(7, 13))
    told = " ".join(read_state(tmp_path / "out" / f"{NAME}-state").record.history)
    assert "--learning_rate is 0.001 from here on; it was 0.01" in told
    assert "--base_quant is int8 from here on; it was not set" in told
    assert "the dataset is not what it was" in told
    assert "an epoch has 6 steps instead of 3" in told


def test_initial_step_and_epoch_start_in_the_middle(train, whole: Path, tmp_path: Path) -> None:
    """The data, noise and learning rate of step 4 do not depend on the steps before; the weights do."""
    output = train(tmp_path / "a", "--initial_step=3", "--skip_until_initial_step")
    assert sorted(losses(output)) == [4, 5, 6]
    assert losses(train(tmp_path / "b", "--initial_epoch=2")) == losses(output)
    assert losses(output)[4][0] != losses(whole)[4][0]
    with pytest.raises(ConfigError, match="would start after step 6"):
        train(tmp_path, "--initial_epoch=3")


def test_states_come_by_the_clock_and_go_when_all_is_done(train, tmp_path: Path, monkeypatch) -> None:
    """A clock that goes on four minutes whenever it is asked, so that a step takes eight."""
    minutes, seen = itertools.count(step=4), []
    real = StateSaver.save

    def save(self: StateSaver, moment: Moment, **given: object) -> list[Path]:
        try:
            return real(self, moment, **given)
        finally:
            seen.append((moment.step, states(tmp_path)))

    monkeypatch.setattr(StateSaver, "save", save)
    monkeypatch.setattr(StateSaver.__init__, "__kwdefaults__", {"clock": lambda: 60.0 * next(minutes)})
    flags = ("--max_train_epochs=4", "--save_state_every_n_minutes=10")
    train(tmp_path, *flags)
    assert len(seen) >= 3
    assert all(later - earlier <= 3 for (earlier, _), (later, _) in pairwise([(0, []), *seen]))
    assert all(
        kept == [f"-step{step:08d}-state" for step, _ in seen[:n][-2:]] for n, (_, kept) in enumerate(seen, 1)
    )
    assert states(tmp_path) == []
    seen.clear()
    train(tmp_path, "--max_train_epochs=4", "--save_state_every_n_minutes=0")
    assert seen == []


def test_without_a_flag_there_is_a_state_every_ten_minutes(tmp_path: Path) -> None:
    now = [0.0]
    facts = RunFacts(run="r", seed=1, world=1, steps_per_epoch=3, dataset="", settings={})
    saving = SavingOptions(output_dir=tmp_path, output_name=NAME)
    saver = StateSaver(StateOptions(), saving, facts, {}, total_epochs=1, clock=lambda: now[0])
    saved = []
    for second in range(3600):
        now[0] = float(second)
        if saver.overdue():
            saver.save(Moment(step=second, epoch=1, epoch_ended=False, run_ended=False))
            saved.append(second)
    assert saved == [600, 1200, 1800, 2400, 3000]


def test_a_name_that_is_too_long_is_refused_before_anything_happens(train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output_name is too long for .*names of \d+ bytes"):
        train(tmp_path, f"--output_name={'n' * 220}")
    assert not list(tmp_path.iterdir())


def test_what_is_no_state_is_named(train, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        train(tmp_path, f"--resume={tmp_path / 'nowhere'}")
    foreign = tmp_path / "accelerate-state"
    foreign.mkdir()
    (foreign / "random_states_0.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a state of accelerate .*--network_weights"):
        train(tmp_path, f"--resume={foreign}")


def test_processes_that_see_different_disks_are_told(saved: Path) -> None:
    state = read_state(saved / f"{NAME}-000001-state")
    facts = (state.record.run, state.record.serial, state.record.step)
    require_one_start(SimpleNamespace(rank=1, gather=lambda own: [facts, own]), state)
    with pytest.raises(ConfigError, match=r"different states \(process 1: none\)"):
        require_one_start(SimpleNamespace(rank=1, gather=lambda own: [facts, own]), None)
