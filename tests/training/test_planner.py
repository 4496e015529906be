"""--vram_budget and --plan_memory: what is chosen fits, is the fastest that does, and keeps given flags."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError, ResourceError
from library.nn.running.runner import MODES
from library.training.look.budget import LATER, allowed_bytes


@pytest.fixture(scope="module")
def command(nano, tmp_path_factory):
    photos = tmp_path_factory.mktemp("data") / "2_thing"
    photos.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (192, 192), name).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"{name} picture")
    return [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--train_data_dir={photos.parent}", "--caption_extension=.txt", "--resolution=192"),
        *("--train_batch_size=2", "--network_module=networks.lora_lumina", "--network_dim=4", "--seed=1"),
        *("--max_train_steps=2", "--cache_latents", "--cache_text_encoder_outputs"),
        *("--gemma2_max_token_length=30", "--output_name=it"),
    ]


@pytest.fixture(scope="module")
def estimate(command, tmp_path_factory):
    """The memory estimate of that run, made in this process, and its options."""
    from library.options.group import parse_options
    from library.options.train import LuminaTrainOptions
    from library.training.context import RunContext
    from library.training.look.memory_estimate import MemoryEstimate
    from library.training.look.meter import Speeds
    from library.training.prepare import prepare
    from lumina_train_network import LuminaTrainer

    folder = tmp_path_factory.mktemp("estimate")
    options = parse_options(LuminaTrainOptions, [*command, f"--output_dir={folder}", "--vram_budget=12GB"])
    trainer = LuminaTrainer(options)
    context = RunContext.decide(trainer, prepare(trainer))
    return MemoryEstimate(trainer, context, speeds=Speeds()), options


def plan(estimate, allowed, precisions=(None, "int8", "nf4"), **changed):
    from library.training.look.meter import Speeds
    from library.training.look.planner import make_plan

    made, options = estimate
    for group, values in changed.items():
        options = replace(options, **{group: replace(getattr(options, group), **values)})
    return make_plan(made, options, round(allowed), Speeds(), precisions=precisions)


def test_with_much_memory_nothing_is_given_up(estimate):
    chosen = plan(estimate, 2**40).chosen
    assert (chosen.manner.mode, chosen.manner.quant, chosen.swap.count) == ("none", None, 0)
    assert chosen.flags() == "--checkpoint_mode none"


def test_what_is_chosen_fits_and_nothing_cheaper_does(estimate):
    whole = plan(estimate, 2**40).chosen.memory
    seen = set()
    for share in (0.9, 0.33):
        made = plan(estimate, whole * share)
        assert made.chosen.memory <= whole * share
        cheaper = [choice for choice in made.choices if choice.cost < made.chosen.cost]
        assert all(choice.memory > whole * share for choice in cheaper)
        seen.add(made.chosen.flags())
    assert len(seen) == 2


def test_less_memory_never_makes_a_faster_choice(estimate):
    whole = plan(estimate, 2**40).chosen.memory
    costs = [plan(estimate, whole * share).chosen.cost for share in (1, 0.9, 0.33)]
    assert costs == sorted(costs)


def test_given_flags_are_kept(estimate):
    whole = plan(estimate, 2**40).chosen.memory
    made = plan(estimate, whole, compute={"gradient_checkpointing": True, "checkpoint_mode": "full"})
    assert {choice.manner.mode for choice in made.choices} == {"full"}
    made = plan(estimate, whole, compute={"gradient_checkpointing": True})
    assert "none" not in {choice.manner.mode for choice in made.choices}
    made = plan(estimate, whole * 2, compute={"cpu_offload_checkpointing": True})
    assert {choice.manner.mode for choice in made.choices} == {"none", "selective", "offload"}
    made = plan(estimate, whole * 2, swap={"blocks_to_swap": 3})
    assert {choice.swap.count for choice in made.choices} == {3}
    made = plan(estimate, whole * 2, quant={"base_quant": "int4"})
    assert {choice.manner.quant for choice in made.choices} == {"int4"}
    made = plan(estimate, whole * 2, precisions=("nf4",))  # what a resumed run had
    assert {choice.manner.quant for choice in made.choices} == {"nf4"}
    made = plan(estimate, whole * 2, compute={"torch_compile": True})
    assert not {"selective", "feed_forward", "outputs"} & {choice.manner.mode for choice in made.choices}


def test_a_choice_becomes_options_and_flags_that_say_the_same(estimate, command, tmp_path):
    from library.options.group import parse_options
    from library.options.train import LuminaTrainOptions
    from library.training.look.memory_estimate import Manner

    _, options = estimate
    whole = plan(estimate, 2**40).chosen.memory
    for share in (0.9, 0.33):
        chosen = plan(estimate, whole * share).chosen
        applied = chosen.apply_to(options)
        words = [*command, f"--output_dir={tmp_path}", *chosen.flags().split()]
        typed = parse_options(LuminaTrainOptions, words)
        assert (typed.compute, typed.swap, typed.quant) == (applied.compute, applied.swap, applied.quant)
        assert Manner.of(applied) == chosen.manner


def test_what_cannot_fit_is_told_with_its_parts(estimate):
    with pytest.raises(
        ResourceError, match="takes at least .* network .* gradients .* optimizer .* a lower resolution"
    ):
        plan(estimate, 100_000)


def test_a_budget_that_leaves_nothing():
    with pytest.raises(ResourceError, match="100MB leaves nothing for tensors: 0.59 GiB are kept back"):
        allowed_bytes("100MB", 100 * 2**20, torch.device("cpu"))


def test_what_is_cached_already_is_not_advised(estimate):
    for cached in (True, False):
        with pytest.raises(ResourceError) as caught:
            plan(estimate, 100_000, caching={"cache_latents": cached})
        assert ("--cache_latents_to_disk" in str(caught.value)) is not cached
        assert "--cache_text_encoder_outputs_to_disk" not in str(caught.value)


def test_what_is_free_is_planned_with_where_a_device_tells(monkeypatch):
    with pytest.raises(ConfigError, match="this run is on the cpu; give an amount"):
        allowed_bytes("auto", None, torch.device("cpu"))
    free = 8 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 24 * 2**30))
    assert 7.3 * 2**30 < allowed_bytes("auto", None, torch.device("cuda")) < free - LATER
    assert 10.5 * 2**30 < allowed_bytes("12GB", 12 * 2**30, torch.device("cpu")) < 12 * 2**30


def test_a_run_does_what_the_dry_run_has_chosen(command, run_script, tmp_path):
    budget = "--vram_budget=622MB"  # of which 600 are not for tensors
    words = [*command, f"--output_dir={tmp_path}", budget]
    looked = run_script("lumina_train_network.py", *words, "--dry_run")
    assert looked.code == 0, looked.err
    said = looked.out + looked.err
    flags = re.search(r"flags: (.*--checkpoint_mode .*)", said)[1]
    assert "<- chosen" in said and "this is a plan for a GPU" in said
    result = run_script("lumina_train_network.py", *words)
    assert result.code == 0, result.err
    assert f"flags: {flags}" in result.out + result.err
    config = (tmp_path / "it.config.toml").read_text()
    assert "gradient_checkpointing = true" in config and 'vram_budget = "622MB"' in config


def test_measuring_says_what_each_way_takes(command, run_script, tmp_path):
    words = [*command, f"--output_dir={tmp_path}", "--plan_memory", "--vram_budget=640MB"]
    result = run_script("lumina_train_network.py", *words)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "memory_plan.json").read_text())
    assert {row["mode"] for row in rows} == set(MODES)
    assert any(row["blocks_swapped"] for row in rows)
    assert [row["base_quant"] for row in rows if row["base_quant"]] == ["int8", "int8", "nf4", "nf4"]
    for row in rows:
        assert row["foretold_bytes"] == pytest.approx(row["found_bytes"], rel=0.1)
        assert row["seconds"] > 0
    assert "<- chosen" in result.out
    assert not (tmp_path / "it.safetensors").exists()


def test_measuring_a_quantised_file_measures_no_other_precision(nano, command, run_script, tmp_path):
    saved = tmp_path / "nf4.safetensors"
    flags = ("--pretrained_model_name_or_path", nano.dit, "--output", saved, "--base_quant", "nf4")
    assert run_script("tools/quantize_model.py", *flags).code == 0
    words = [*command[1:], f"--pretrained_model_name_or_path={saved}", f"--output_dir={tmp_path}"]
    result = run_script("lumina_train_network.py", *words, "--plan_memory", "--vram_budget=640MB")
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "memory_plan.json").read_text())
    assert {row["base_quant"] for row in rows} == {None} and "int8" not in result.out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--torch_compile"], "--plan_memory measures steps that are not compiled"),
        (["--vram_budget=auto"], "--vram_budget auto asks a CUDA GPU"),
        (["--vram_budget=100MB"], "--vram_budget 100MB leaves nothing for tensors"),
    ],
)
def test_measuring_that_cannot_be_is_refused_before_it_begins(command, run_script, tmp_path, flags, reason):
    words = [*command, f"--output_dir={tmp_path}", "--plan_memory", *flags]
    result = run_script("lumina_train_network.py", *words)
    assert result.code in (2, 71) and reason in result.err
    assert "foretold" not in result.out


def test_compiled_blocks_are_foretold_to_keep_more_where_they_may(estimate):
    from library.options.swap import SwapOptions
    from library.training.look.memory_estimate import Manner, MemoryEstimate

    plain, options = estimate

    def activations(made, mode):
        return made.bytes_of_steps(Manner(None, mode), SwapOptions())["activations of the largest batch"]

    for budget, more in ((1.0, 1.2), (0.5, 1.0)):
        compute = replace(options.compute, torch_compile=True, activation_memory_budget=budget)
        trainer = plain._trainer.with_options(replace(options, compute=compute))
        compiled = MemoryEstimate(trainer, plain._context)
        assert activations(compiled, "none") == pytest.approx(more * activations(plain, "none"), rel=1e-3)
        assert activations(compiled, "full") == pytest.approx(activations(plain, "full"), rel=1e-3)


def test_a_dry_run_says_that_it_does_not_measure(command, run_script, tmp_path):
    result = run_script(
        "lumina_train_network.py", *command, f"--output_dir={tmp_path}", "--plan_memory", "--dry_run"
    )
    assert result.code == 0 and "--plan_memory has no effect: --dry_run" in result.out


def test_a_plan_is_for_the_batch_that_takes_the_most(nano, tmp_path):
    """Of one large picture and of many small ones, which have a caption each, not the one of most pixels."""
    from library.options.group import parse_options
    from library.options.train import LuminaTrainOptions
    from library.training.context import RunContext
    from library.training.look.memory_estimate import Manner, MemoryEstimate
    from library.training.prepare import prepare
    from lumina_train_network import LuminaTrainer

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, side in enumerate([256, *[64] * 15]):
        Image.new("RGB", (side, side), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a picture")
    config = tmp_path / "data.toml"
    config.write_text(
        f"[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 256\nenable_bucket = true\n"
        f"min_bucket_reso = 64\nbucket_no_upscale = true\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    )
    words = [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--dataset_config={config}", f"--output_dir={tmp_path / 'out'}", "--max_batch_tokens=256"),
        *("--network_module=networks.lora_lumina", "--network_dim=4", "--seed=1", "--max_train_steps=2"),
    ]
    trainer = LuminaTrainer(parse_options(LuminaTrainOptions, words))
    context = RunContext.decide(trainer, prepare(trainer))
    assert context.plan.heaviest_batches == [((256, 256),), ((64, 64),) * 15]
    estimate = MemoryEstimate(trainer, context, tokens=100)
    assert len(estimate.work.sizes) == 15
    one = estimate.simulation(None).step(replace(estimate.work, sizes=((256, 256),)))
    assert estimate.step(Manner.of(trainer.options)).peak > 1.5 * one.peak
