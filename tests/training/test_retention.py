"""Which saved files are kept: those that the options say, and every file that is not this run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.options.saving import SavingOptions
from library.training.events import Moment
from library.training.output.saving import PeriodicSave

STEPS_PER_EPOCH = 10


def run(folder: Path, steps: int, *, average: bool = False, **options: object) -> list[str]:
    """Save as a run of `steps` steps would; return the names that are left."""

    def write(path: Path, moment: Moment) -> list[Path]:
        files = [path, path.with_name(f"{path.stem}-ema{path.suffix}")] if average else [path]
        for file in files:
            file.write_text(f"{file.name} {moment.step}", encoding="utf-8")
        return files

    saving = SavingOptions(output_dir=folder, output_name="lora", **options)
    event = PeriodicSave(saving, write, total_epochs=steps // STEPS_PER_EPOCH)
    for step in range(1, steps + 1):
        epochs, rest = divmod(step, STEPS_PER_EPOCH)
        moment = Moment(step=step, epoch=epochs + (rest > 0), epoch_ended=rest == 0, run_ended=step == steps)
        if event.due(moment):
            event.run(moment)
    return left(folder)


def left(folder: Path) -> list[str]:
    return sorted(path.stem.removeprefix("lora-") for path in folder.iterdir())


def test_all_are_kept_by_default(tmp_path: Path) -> None:
    assert run(tmp_path, 50, save_every_n_epochs=2) == ["000002", "000004"]


def test_epochs_are_counted_in_files(tmp_path: Path) -> None:
    assert run(tmp_path, 90, save_every_n_epochs=2, save_last_n_epochs=3) == ["000004", "000006", "000008"]


def test_steps_are_counted_in_steps(tmp_path: Path) -> None:
    """As in the reference tool: at step 500 with 200 to keep, those of step 300 and later stay."""
    kept = run(tmp_path, 501, save_every_n_steps=100, save_last_n_steps=200)
    assert kept == ["step00000300", "step00000400", "step00000500"]


def test_the_two_kinds_do_not_touch_each_other(tmp_path: Path) -> None:
    kept = run(tmp_path, 40, save_every_n_steps=5, save_every_n_epochs=1, save_last_n_steps=5)
    assert kept == ["000001", "000002", "000003", "step00000030", "step00000035"]


def test_files_of_either_kind_by_count(tmp_path: Path) -> None:
    kept = run(tmp_path, 40, save_every_n_steps=5, save_every_n_epochs=1, save_last_n_files=3)
    assert kept == ["000003", "step00000030", "step00000035"]


def test_the_average_goes_with_its_network(tmp_path: Path) -> None:
    kept = run(tmp_path, 40, average=True, save_every_n_epochs=1, save_last_n_epochs=1)
    assert kept == ["000003", "000003-ema"]


def test_foreign_files_stay(tmp_path: Path) -> None:
    for name in ("lora-000000", "lora-000001-ema", "lora", "other-000001"):
        (tmp_path / f"{name}.safetensors").write_text("of somebody else", encoding="utf-8")
    kept = run(tmp_path, 50, save_every_n_epochs=1, save_last_n_epochs=1)
    assert kept == ["000000", "000001-ema", "000004", "lora", "other-000001"]


def test_a_file_that_was_changed_since_stays(tmp_path: Path) -> None:
    saving = SavingOptions(
        output_dir=tmp_path, output_name="lora", save_every_n_epochs=1, save_last_n_epochs=1
    )

    def write(path: Path, moment: Moment) -> list[Path]:
        path.write_text("network", encoding="utf-8")
        return [path]

    event = PeriodicSave(saving, write, total_epochs=9)
    for epoch in (1, 2, 3):
        event.run(Moment(step=epoch * 10, epoch=epoch, epoch_ended=True, run_ended=False))
        if epoch == 1:
            (tmp_path / "lora-000001.safetensors").write_text("the user's merge", encoding="utf-8")
    assert left(tmp_path) == ["000001", "000003"]


def test_a_file_that_the_user_removed_is_no_trouble(tmp_path: Path) -> None:
    saving = SavingOptions(output_dir=tmp_path, save_every_n_epochs=1, save_last_n_epochs=1)

    def write(path: Path, moment: Moment) -> list[Path]:
        path.touch()
        return [path]

    event = PeriodicSave(saving, write, total_epochs=9)
    event.run(Moment(step=10, epoch=1, epoch_ended=True, run_ended=False))
    (tmp_path / "last-000001.safetensors").unlink()
    event.run(Moment(step=20, epoch=2, epoch_ended=True, run_ended=False))
    assert [path.name for path in tmp_path.iterdir()] == ["last-000002.safetensors"]


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(2, ["000005"]), (3, ["000003", "000006", "000009"]), (99, [f"{n:06d}" for n in range(1, 10)])],
)
def test_a_ratio_spreads_the_files_over_the_epochs(tmp_path: Path, ratio: int, kept: list[str]) -> None:
    """Ten epochs; the file of the last one is the run's final file."""
    assert run(tmp_path, 100, save_n_epoch_ratio=ratio, save_every_n_epochs=7) == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_last_n_files": 2}, "add --save_every_n_epochs or"),
        ({"save_last_n_files": 0, "save_every_n_steps": 1}, "--save_last_n_files is 0"),
        ({"save_n_epoch_ratio": 0}, "--save_n_epoch_ratio is 0"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SavingOptions(output_dir=tmp_path, **options)


def test_a_resumed_run_knows_the_files_it_wrote_before(tmp_path: Path) -> None:
    options = SavingOptions(output_dir=tmp_path, save_every_n_epochs=1, save_last_n_epochs=2)

    def write(path: Path, moment: Moment) -> list[Path]:
        path.write_text(f"network {moment.step}", encoding="utf-8")
        return [path]

    (tmp_path / "last-000000.safetensors").touch()
    state = None
    for epoch in range(1, 5):  # stopped and resumed after every epoch
        event = PeriodicSave(options, write, total_epochs=9)
        if state is not None:
            event.retention.import_state(json.loads(state))
        event.run(Moment(step=epoch * 10, epoch=epoch, epoch_ended=True, run_ended=False))
        state = json.dumps(event.retention.export_state())
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["last-000000", "last-000003", "last-000004"]
