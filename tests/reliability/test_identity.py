"""Which settings must stay when a run is resumed, which may change, and that no flag falls between."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from library.core.errors import ConfigError
from library.options.group import group_classes, parse_options
from library.options.train import LuminaTrainOptions
from library.training.state.checkpoint import SavedState, StateRecord
from library.training.state.identity import (
    MUST_STAY,
    SILENT,
    SILENT_GROUPS,
    TOLD,
    check_resumed,
    settings_of,
)

HASHES = {
    "sd_model_name": "x",
    "sd_model_hash": "1234",
    "new_sd_model_hash": "a" * 64,
    "new_vae_hash": "b" * 64,
}


@pytest.fixture
def settings() -> dict[str, object]:
    words = [
        *("--pretrained_model_name_or_path=a", "--gemma2=b", "--ae=c", "--output_dir=d"),
        *("--dataset_config=e", "--network_module=networks.lora_lumina"),
    ]
    manifest = SimpleNamespace(datasets=[SimpleNamespace(batch_size=2)])
    return settings_of(parse_options(LuminaTrainOptions, words), HASHES, manifest)


def resumed(settings: dict[str, object]) -> SavedState:
    record = StateRecord(
        step=5,
        events_done=True,
        serial=1,
        seed=7,
        world=1,
        steps_per_epoch=10,
        dataset="digest",
        settings=settings,
    )
    return SavedState(Path("kiwi-state"), record)


def test_every_flag_in_the_tables_is_one(settings) -> None:
    flags = {
        name for group in group_classes(LuminaTrainOptions).values() for name in group.__dataclass_fields__
    }
    assert SILENT | TOLD <= flags
    assert MUST_STAY.keys() <= settings.keys()
    assert SILENT_GROUPS - group_classes(LuminaTrainOptions).keys() <= {"hub"}


def test_nothing_changed_is_nothing_said(settings) -> None:
    assert check_resumed(resumed(settings), settings, 7, "digest") == []
    assert check_resumed(resumed(settings), settings, None, "digest") == []


def test_every_setting_that_changes_is_refused_or_told_by_name(settings) -> None:
    for name in settings:
        changed = settings | {name: "something else"}
        if name in MUST_STAY:
            with pytest.raises(ConfigError, match=MUST_STAY[name]):
                check_resumed(resumed(settings), changed, None, "digest")
            continue
        (sentence,) = check_resumed(resumed(settings), changed, None, "digest")
        flag = {"new_vae_hash": "--ae (the file's content)"}.get(name, f"--{name}")
        assert sentence.startswith(f"{flag} is something else from here on; it was ")


def test_settings_that_one_version_does_not_know_are_passed_over(settings) -> None:
    old = resumed({k: v for k, v in settings.items() if k != "learning_rate"} | {"gone": 1})
    assert check_resumed(old, settings, None, "digest") == []


def test_paths_names_and_secrets_are_not_recorded(settings) -> None:
    names = ("output_dir", "output_name", "dataset_config", "huggingface_token", "wandb_api_key")
    assert not settings.keys() & set(names)


def test_another_dataset_is_told(settings) -> None:
    (sentence,) = check_resumed(resumed(settings), settings, None, "other")
    assert "the dataset is not what it was" in sentence
