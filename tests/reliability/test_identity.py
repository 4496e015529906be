"""Which settings must stay when a run is resumed, which may change, and that no flag falls between."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.core.errors import ConfigError
from library.core.hashing import HashLedger
from library.options.group import group_classes, parse_options
from library.options.train import LuminaFinetuneOptions, LuminaTrainOptions
from library.options.train_kandinsky5 import Kandinsky5FinetuneOptions, Kandinsky5TrainOptions
from library.options.weights import WeightsOptions
from library.training.family import ModelFiles
from library.training.state.checkpoint import SavedState, StateRecord
from library.training.state.identity import (
    CANNOT_BEGIN,
    JUDGED,
    JUDGED_GROUPS,
    MUST_STAY,
    SILENT,
    SILENT_GROUPS,
    TOLD,
    check_resumed,
    settings_of,
    warnings_of_changes,
)
from lumina_train_network import LuminaTrainer
from tests.reliability import legs

FILES = ModelFiles(
    trained_on={"pretrained_model_name_or_path": "a" * 64},
    read_by={"ae": "b" * 64, "gemma2": "c" * 64},
)
MANIFEST = SimpleNamespace(trained_datasets=[SimpleNamespace(batch_size=2)])


def options(*more: str) -> LuminaTrainOptions:
    words = [
        *("--pretrained_model_name_or_path=a", "--gemma2=b", "--ae=c", "--output_dir=d"),
        *("--dataset_config=e", "--network_module=networks.lora_lumina", *more),
    ]
    return parse_options(LuminaTrainOptions, words)


@pytest.fixture
def ledger(tmp_path: Path) -> HashLedger:
    return HashLedger(tmp_path / "hashes.json")


@pytest.fixture
def settings(ledger: HashLedger) -> dict[str, object]:
    return settings_of(options(), FILES, MANIFEST, ledger)


def resumed(settings: dict[str, object]) -> SavedState:
    record = StateRecord(
        name="kiwi",
        run="r",
        serial=1,
        interim=False,
        step=5,
        events_done=True,
        seed=7,
        world=1,
        steps_per_epoch=10,
        dataset="digest",
        settings=settings,
    )
    return SavedState(Path("kiwi-state"), record)


def test_every_flag_is_in_one_table() -> None:
    """A new flag is an addition to one of them: library/training/state/identity.py says what each means."""
    tables = [set(MUST_STAY), set(CANNOT_BEGIN), TOLD, SILENT, JUDGED]
    found, known = [], set()
    scripts = (
        *(LuminaTrainOptions, Kandinsky5TrainOptions),
        *(LuminaFinetuneOptions, Kandinsky5FinetuneOptions),
    )
    groups = dict.fromkeys(pair for script in scripts for pair in group_classes(script).items())
    for group_name, group in groups:
        for f in fields(group):
            name = f.name
            known.add(name)
            places = sum(name in table for table in tables) + (group_name in SILENT_GROUPS | JUDGED_GROUPS)
            elsewhere = f.metadata["refusal"] is not None or f.metadata["inert"] is not None
            if places != 1 and not elsewhere:
                found.append(f"--{name} of '{group_name}' is in {places} tables")
    assert found == []
    assert set().union(*tables) <= known
    assert SILENT_GROUPS | JUDGED_GROUPS <= group_classes(LuminaTrainOptions).keys()


def test_nothing_changed_is_nothing_said(settings) -> None:
    assert check_resumed(resumed(settings), settings, 7, "digest", new_start="begin anew") == []
    assert check_resumed(resumed(settings), settings, None, "digest", new_start="begin anew") == []


def test_going_on_with_the_model_in_another_precision_is_warned_of(ledger: HashLedger) -> None:
    whole, int8, fp8 = (
        settings_of(options(*flags), FILES, MANIFEST, ledger)
        for flags in ((), ("--base_quant=int8",), ("--fp8_base",))
    )
    assert warnings_of_changes(resumed(int8), int8) == warnings_of_changes(resumed(whole), whole) == []
    (warning,) = warnings_of_changes(resumed(int8), fp8)
    assert "kiwi-state were trained on the model in int8, and go on on the model in fp8" in warning
    (warning,) = warnings_of_changes(resumed(int8), whole)
    assert "and go on on the model in the precision of its file" in warning
    assert warnings_of_changes(resumed(whole), whole | {"learning_rate": 1}) == []


def test_every_setting_that_changes_is_refused_or_told_by_name(settings) -> None:
    refused = MUST_STAY.keys() | CANNOT_BEGIN.keys() | {"trained on --pretrained_model_name_or_path"}
    assert refused <= settings.keys()
    for name in settings:
        changed = settings | {name: "something else"}
        if name in refused:
            with pytest.raises(ConfigError, match=r"is something else, but was .* in kiwi-state, and the "):
                check_resumed(resumed(settings), changed, None, "digest", new_start="begin anew")
            continue
        (sentence,) = check_resumed(resumed(settings), changed, None, "digest", new_start="begin anew")
        flag = f"{name.removeprefix('content of ')} (the file's content)" if "--" in name else f"--{name}"
        assert sentence.startswith(f"{flag} is something else from here on; it was ")


# Flags that say the same, and such that say something else, though the flag of the setting is what it was.
SAME = [
    (("--use_8bit_adam",), ("--optimizer_type=AdamW8bit",)),
    (("--text_encoder_lr=1e-4",), ("--network_train_text_encoder", "--text_encoder_lr=1e-4")),
    (("--cache_latents",), ("--cache_latents_to_disk",)),
    ((), ("--network_train_unet_only",)),
    (("--network_args", "a=1", "b=2"), ("--network_args", "b=2", "a=1")),
]
DIFFERENT = [
    ((), ("--use_8bit_adam",), "optimizer_type"),
    ((), ("--text_encoder_lr=1e-4",), "network_train_text_encoder"),
    (("--network_train_text_encoder",), ("--network_train_text_encoder_only",), "text_encoder_only"),
]


@pytest.mark.parametrize(("before", "now"), SAME)
def test_the_same_in_other_words_is_the_same(ledger, before: tuple[str, ...], now: tuple[str, ...]) -> None:
    one, two = (settings_of(options(*words), FILES, MANIFEST, ledger) for words in (before, now))
    assert check_resumed(resumed(one), two, None, "digest", new_start="begin anew") == []


@pytest.mark.parametrize(("before", "now", "named"), DIFFERENT)
def test_other_words_for_something_else_are_refused(ledger, before, now, named: str) -> None:
    one, two = (settings_of(options(*words), FILES, MANIFEST, ledger) for words in (before, now))
    with pytest.raises(ConfigError, match=f"--[a-z_]*{named} is "):
        check_resumed(resumed(one), two, None, "digest", new_start="begin anew")


def test_the_two_words_for_a_fused_backward_pass(ledger) -> None:
    """Both may begin and end on the way: what a step does to a weight is the same, but for clipping."""

    def settings(*more: str) -> dict[str, object]:
        words = [
            *("--pretrained_model_name_or_path=a", "--gemma2=b", "--ae=c", "--output_dir=d"),
            *("--dataset_config=e", *more),
        ]
        return settings_of(parse_options(LuminaFinetuneOptions, words), FILES, MANIFEST, ledger)

    plain, one, other = map(settings, ("--seed=7", "--fused_backward_pass", "--blockwise_fused_optimizers"))
    assert one == other
    (sentence,) = check_resumed(resumed(plain), one, None, "digest", new_start="begin anew")
    assert sentence == "--fused_backward_pass is True from here on; it was False"
    with pytest.raises(ConfigError, match="--full_bf16 is True, but was False .* Keep it, or begin anew"):
        precise = settings("--full_bf16", "--mixed_precision=bf16")
        check_resumed(resumed(plain), precise, None, "digest", new_start="begin anew")
    with pytest.raises(ConfigError, match="state of a run that trains the model itself .* trains a LoRA"):
        lora = settings_of(options(), FILES, MANIFEST, ledger)
        check_resumed(resumed(plain), lora, None, "digest", new_start="begin anew")
    halved, stays = settings("--mixed_precision=bf16"), WeightsOptions.stays
    with pytest.raises(
        ConfigError, match="--mixed_precision is bf16, but was no .* weights of this precision"
    ):
        check_resumed(resumed(plain), halved, None, "digest", new_start="begin anew", stays=stays)


def test_an_average_may_end_but_not_begin(ledger) -> None:
    without, kept = (settings_of(options(*words), FILES, MANIFEST, ledger) for words in ((), ("--ema",)))
    with pytest.raises(ConfigError, match="--ema is True, but was False .* no running average"):
        check_resumed(resumed(without), kept, None, "digest", new_start="begin anew")
    (sentence,) = check_resumed(resumed(kept), without, None, "digest", new_start="begin anew")
    assert sentence == "--ema is False from here on; it was True"


def test_merged_in_files_are_told_apart_by_their_content(ledger, nano, tmp_path: Path) -> None:
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(nano.dit.read_bytes())
    flags = ("--network_weights", str(moved), "--dim_from_weights")

    def settings(path: Path, *more: str) -> dict[str, object]:
        return settings_of(options("--base_weights", str(path), *more), FILES, MANIFEST, ledger)

    before = settings(nano.dit, *flags)
    assert (
        check_resumed(resumed(before), settings(moved, *flags), None, "digest", new_start="begin anew") == []
    )
    with pytest.raises(ConfigError, match="--base_weights is .* times 0.5, but was .* times 1"):
        check_resumed(
            resumed(before),
            settings(moved, *flags, "--base_weights_multiplier=0.5"),
            None,
            "digest",
            new_start="begin anew",
        )
    moved.write_bytes(nano.ae.read_bytes())
    with pytest.raises(ConfigError, match="--base_weights is "):
        check_resumed(resumed(before), settings(moved, *flags), None, "digest", new_start="begin anew")
    with pytest.raises(ConfigError, match=r"--network_weights \(the file's content\) is "):
        check_resumed(resumed(before), settings(nano.dit, *flags), None, "digest", new_start="begin anew")


def test_the_text_encoder_must_stay_where_it_is_trained(nano, config: Path, tmp_path: Path, ledger) -> None:
    """Its file is one that the network is trained on then, else one that only reads captions for it."""
    command = [word for word in legs.words(nano, config, tmp_path) if "cache_" not in word]
    for more, trained in (((), False), (("--network_train_text_encoder",), True)):
        files = LuminaTrainer(parse_options(LuminaTrainOptions, [*command, *more])).model_files(ledger)
        assert ("gemma2" in files.trained_on) == trained
        assert ("gemma2" in files.read_by) != trained
    before = settings_of(options("--network_train_text_encoder"), files, MANIFEST, ledger)
    now = replace(files, trained_on=files.trained_on | {"gemma2": "d" * 64})
    with pytest.raises(ConfigError, match=r"--gemma2 \(the file's content\) is dddd"):
        changed = settings_of(options("--network_train_text_encoder"), now, MANIFEST, ledger)
        check_resumed(resumed(before), changed, None, "digest", new_start="begin anew")


def test_settings_that_one_version_does_not_know_are_passed_over(settings) -> None:
    old = resumed({k: v for k, v in settings.items() if k != "learning_rate"} | {"gone": 1})
    assert check_resumed(old, settings, None, "digest", new_start="begin anew") == []


def test_paths_names_and_secrets_are_not_recorded(settings) -> None:
    names = ("output_dir", "output_name", "dataset_config", "huggingface_token", "wandb_api_key")
    assert not settings.keys() & set(names)


def test_another_dataset_is_told(settings) -> None:
    (sentence,) = check_resumed(resumed(settings), settings, None, "other", new_start="begin anew")
    assert "the dataset is not what it was" in sentence
