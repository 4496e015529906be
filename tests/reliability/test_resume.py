"""A resumed run is the uninterrupted run, bit for bit; and what may be changed on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from library.core.errors import CheckpointError, ConfigError, Stopped
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
    assert states(tmp_path)[-1] == "-step00000005-state"
    train(tmp_path, "--ema", "--resume=latest")
    assert same(weights(tmp_path), weights(whole))
    assert losses(tmp_path) == losses(whole)


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
    record = json.loads((output / f"{NAME}-state" / "state.json").read_text())
    assert record["step"] == 9
    assert any("--max_train_epochs is 3 from here on; it was 2" in line for line in record["history"])


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


def test_another_dataset_batch_size_and_rate_are_allowed_and_told(train, saved, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "photos", pictures=6, batch_size=1)
    state = saved / f"{NAME}-000001-state"
    flags = ("--ema", "--learning_rate=1e-3", "--max_train_epochs=2", "--save_state")
    train(tmp_path / "out", f"--resume={state}", *flags, dataset=dataset)
    # After the first of two epochs: the second has six steps now.
    assert sorted(losses(tmp_path / "out")) == list(range(7, 13))
    record = json.loads((tmp_path / "out" / f"{NAME}-state" / "state.json").read_text())
    told = " ".join(record["history"])
    assert "--learning_rate is 0.001 from here on; it was 0.01" in told
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
    with pytest.raises(ConfigError, match="nothing to skip to"):
        train(tmp_path, "--skip_until_initial_step")


def test_what_is_no_state_is_named(train, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        train(tmp_path, f"--resume={tmp_path / 'nowhere'}")
    foreign = tmp_path / "accelerate-state"
    foreign.mkdir()
    (foreign / "random_states_0.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a state of accelerate .*--network_weights"):
        train(tmp_path, f"--resume={foreign}")
