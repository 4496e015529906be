"""What full fine-tuning takes of memory: foretold as it is found, told, planned for, and advised about."""

from __future__ import annotations

import gc
import importlib
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from library.core.errors import ConfigError, ResourceError
from library.nn.running.runner import MODES
from library.nn.swap.gradient_return import UNDER_WAY
from library.options.swap import SwapOptions
from library.training.context import RunContext
from library.training.guards import loading_advice, training_advice
from library.training.look import measure
from library.training.look.budget import PRECISIONS, planned, precisions_for
from library.training.look.memory_estimate import Manner, MemoryEstimate
from library.training.look.memory_plan import MemoryPlan
from library.training.look.meter import Speeds
from library.training.look.planner import make_plan
from library.training.run import TrainingRun
from library.training.state.stop import StopSignals
from tests.training.nano_runs import Runs, weight_bytes_of
from tests.training.test_memory_estimate import allocated

BF16, FUSED, FULL_BF16 = "--mixed_precision=bf16", "--fused_backward_pass", "--full_bf16"
BLOCKS = 6  # of the nano models
NONE = SwapOptions()
FOR_GPUS = """
import torch

only = False

class ForGpus(torch.optim.SGD):
    def step(self):
        if only:
            raise RuntimeError("there is no kernel for the CPU")
        super().step()
"""


@pytest.fixture(scope="module")
def runs(nano, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    torch.set_num_threads(1)
    return Runs(nano, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def estimated(runs: Runs) -> Callable[..., MemoryEstimate]:
    """The estimate of a run on a GPU, each made once."""
    made: dict[tuple[str, ...], MemoryEstimate] = {}

    def estimate(*words: str) -> MemoryEstimate:
        if words not in made:
            context = runs.context(*words)
            made[words] = MemoryEstimate(context.trainer, context, speeds=Speeds())
        return made[words]

    return estimate


@pytest.mark.parametrize(
    ("family", "mode", "swapped", "words"),
    [
        ("lumina", "none", 0, ()),
        ("lumina", "full", 3, ()),
        ("lumina", "none", 0, (FUSED,)),
        ("lumina", "none", 0, (BF16,)),
        ("lumina", "full", 3, (BF16,)),
        ("lumina", "selective", 0, (BF16, FULL_BF16)),
        ("lumina", "full", 0, (BF16, FUSED)),
        ("lumina", "full", 5, (BF16, FULL_BF16, FUSED)),
        ("lumina", "full", 3, (BF16, "--gradient_accumulation_steps=2")),
        ("lumina", "outputs", 0, (BF16, FUSED, "--optimizer_type=Adafactor")),
        ("kandinsky", "none", 0, ()),
        ("kandinsky", "full", 0, (BF16, FUSED)),
        ("kandinsky", "selective", 3, (BF16,)),
        ("kandinsky", "full", 3, (BF16, FULL_BF16, FUSED)),
    ],
    ids=lambda value: "+".join(word.strip("-") for word in value) if isinstance(value, tuple) else None,
)
def test_training_takes_what_was_foretold(
    runs: Runs, family: str, mode: str, swapped: int, words: tuple[str, ...]
) -> None:
    """On a CPU the device's memory is the computer's, so what both hold is found together."""
    context = runs.context(family, *words, f"--blocks_to_swap={swapped}")
    estimate, swap = MemoryEstimate(context.trainer, context, kind="cpu"), SwapOptions(blocks_to_swap=swapped)
    manner = Manner(None, mode)
    device, computer = estimate.bytes_of_steps(manner, swap), estimate.in_computer(manner, swap)
    assert bool(computer) == bool(swapped)
    real = measure.RealSteps(context, estimate, mode)
    there = weight_bytes_of(real)
    kept = device.get("what is kept of fp32 weights", 0) + computer.get("what is kept of fp32 weights", 0)

    def two_steps() -> None:
        real.step()
        real.step()  # with all that the first one made

    found = there + allocated(two_steps)
    assert sum(device.values()) + sum(computer.values()) == pytest.approx(found, rel=0.05)
    assert kept == 0 or 0.01 * found < kept < found


@pytest.mark.parametrize(("swapped", "words"), [(0, (FUSED,)), (3, (FUSED,)), (3, ())])
def test_a_measured_model_is_gone_before_the_next_is_made(
    runs: Runs, swapped: int, words: tuple[str, ...]
) -> None:
    """Torch's hooks on weights hold what holds these, where no garbage collector sees it."""
    context = runs.context("lumina", BF16, *words, f"--blocks_to_swap={swapped}")
    estimate = MemoryEstimate(context.trainer, context, kind="cpu")
    seen: list[weakref.ref[torch.Tensor]] = []
    for _ in range(2):
        gc.collect()
        assert not [ref for ref in seen if ref() is not None]
        real = measure.RealSteps(context, estimate, "full")
        seen += [weakref.ref(weight) for weight in real.weights()]
        with closing(real):
            real.step()
        del real


def parts_of(estimate: MemoryEstimate, mode: str = "full", swapped: int = 0) -> dict[str, int]:
    return estimate.training(Manner(None, mode), SwapOptions(blocks_to_swap=swapped))


def test_each_number_is_counted_once_where_it_lies(estimated) -> None:
    """With AdamW. The embedder of time is fp32, as the averages are."""
    estimate = estimated("lumina", BF16, "--ema")
    weights = dict(estimate.trainee.named_parameters())
    halved = sum(p.numel() for p in weights.values() if p.dtype == torch.bfloat16)
    whole = sum(p.numel() for p in weights.values() if p.dtype == torch.float32)
    assert 0 < whole < 0.05 * halved
    for swapped in (0, 3):
        manner, swap = Manner(None, "full"), SwapOptions(blocks_to_swap=swapped)
        here, there = estimate.training(manner, swap), estimate.in_computer(manner, swap)
        names = ["what is kept of fp32 weights", "gradients", "optimizer", "running average (EMA)"]
        for name, bytes_halved, bytes_whole in zip(names, (2, 2, 8, 4), (0, 4, 8, 4), strict=True):
            together = here[name] + there.get(name, 0)
            assert together == pytest.approx(bytes_halved * halved + bytes_whole * whole, rel=1e-3), name
            assert (name in there) == bool(swapped)
        ring = estimate.holdings(None).blocks.ring(swap)
        weighed = here["transformer"] - ring + there.get("weights of swapped blocks", 0)
        assert weighed == pytest.approx(2 * halved + 4 * whole, rel=0.01)


def test_gradients_on_their_way_to_the_thread_that_uses_them(runs: Runs) -> None:
    """Where a GPU computes backward there are a few; where the CPU does, each is used at once."""
    context = runs.context("lumina", BF16, FUSED, "--blocks_to_swap=3")
    swap, found = SwapOptions(blocks_to_swap=3), {}
    for kind in ("cpu", "cuda"):
        estimate = MemoryEstimate(context.trainer, context, kind=kind)
        found[kind] = sum(estimate.in_computer(Manner(None, "full"), swap).values())
    blocks = estimate.model.runner.blocks[-3:]
    largest = max(weight.nbytes for block in blocks for weight in block.parameters())
    assert found["cuda"] - found["cpu"] == (UNDER_WAY - 1) * largest


def test_what_each_flag_saves(estimated) -> None:
    plain, bare = estimated("lumina", BF16), estimated("lumina", BF16, FULL_BF16)
    fused = estimated("lumina", BF16, FUSED)
    count = plain.trainee.parameter_count()
    assert "what is kept of fp32 weights" not in parts_of(bare)
    assert sum(parts_of(plain).values()) - sum(parts_of(bare).values()) == pytest.approx(2 * count, rel=0.1)
    assert "gradients" not in parts_of(fused)
    saved = sum(parts_of(plain).values()) - sum(parts_of(fused).values())
    assert 0 < saved < 2 * count  # as far as activations do not take the place of gradients
    every = [sum(parts_of(fused, swapped=count).values()) for count in (0, 3, BLOCKS)]
    assert every == sorted(every, reverse=True) and every[-1] < 0.6 * every[0]


def test_gradients_are_gone_while_pictures_are_drawn(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64\n")
    prompts = f"--sample_prompts={tmp_path / 'prompts.txt'}"
    drawn = (prompts, "--sample_every_n_steps=1", "--ema", "--ema_sample=ema")
    context = runs.context("lumina", BF16, *drawn)
    estimate = MemoryEstimate(context.trainer, context)
    drawing = estimate.other_phases(Manner(), NONE)["drawing sample pictures"]
    assert "gradients" not in drawing and "optimizer" in drawing
    assert not [name for name in drawing if "activations" in name]
    assert drawing["weights put aside"] == sum(p.nbytes for p in estimate.trainee.parameters())


# --- planning ---


def plan(runs: Runs, estimate: MemoryEstimate, allowed: float, *words: str) -> MemoryPlan:
    return make_plan(estimate, runs.options("lumina", *words), round(allowed), Speeds(), precisions=(None,))


def test_as_few_blocks_as_can_be_are_swapped(runs: Runs, estimated) -> None:
    words = (BF16, FUSED)
    estimate = estimated("lumina", *words)
    everything = plan(runs, estimate, 2**40, *words).chosen
    assert (everything.manner.mode, everything.swap.count, everything.elsewhere) == ("none", 0, {})
    least = sum(parts_of(estimate).values())
    assert plan(runs, estimate, least, *words).chosen.swap.count == 0  # it checkpoints instead
    tight = plan(runs, estimate, 0.9 * least, *words)
    assert tight.chosen.swap.count > 0 and tight.chosen.memory <= 0.9 * least
    fewer = SwapOptions(blocks_to_swap=tight.chosen.swap.count - 1)
    assert sum(estimate.training(tight.chosen.manner, fewer).values()) > 0.9 * least
    assert any(line.startswith("in the computer's memory: ") for line in tight.lines())
    assert FUSED not in tight.chosen.flags()  # it was given, and stays


def test_the_computer_takes_its_time_for_weights_that_it_updates(estimated) -> None:
    estimate = estimated("lumina", BF16)
    seconds = [estimate.update_seconds(None, SwapOptions(blocks_to_swap=count)) for count in (0, 3, BLOCKS)]
    assert seconds == sorted(seconds) and seconds[-1] > 10 * seconds[0] > 0


@pytest.fixture
def for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An optimizer that, once `only` is set, cannot step on the CPU, which stands for a GPU before."""
    (tmp_path / "for_gpus.py").write_text(FOR_GPUS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("for_gpus")
    del sys.modules["for_gpus"]


@pytest.mark.parametrize("only", [False, True])
def test_no_block_is_swapped_whose_weights_nothing_could_step(
    runs: Runs, for_gpus: ModuleType, only: bool
) -> None:
    words = (BF16, "--optimizer_type=for_gpus.ForGpus")
    context = runs.context("lumina", *words)
    estimate = MemoryEstimate(context.trainer, context, speeds=Speeds())
    least = min(sum(parts_of(estimate, mode).values()) for mode in MODES)
    for_gpus.only = only
    if not only:
        assert plan(runs, estimate, 0.9 * least, *words).chosen.swap.count > 0
        return
    assert plan(runs, estimate, least, *words).chosen.swap.count == 0
    with pytest.raises(ResourceError, match="Block swap is not possible .* no kernel") as caught:
        plan(runs, estimate, 0.9 * least, *words)
    assert "--blocks_to_swap" not in str(caught.value) and "AdamW8bit" in str(caught.value)
    with pytest.raises(ConfigError, match="Block swap is not possible .* no kernel"):
        context.trainer.trainee_kind.check_swapping(context.options)
    kept = plan(runs, estimate, 2**40, *words, "--blocks_to_swap=2")  # the run itself refuses what was given
    assert {choice.swap.count for choice in kept.choices} == {2}


def test_nothing_is_swapped_where_the_compilers_backend_keeps_weights_for_backward(runs: Runs) -> None:
    words, swap = (BF16, "--torch_compile", "--dynamo_backend=eager"), "--blocks_to_swap=2"
    TrainingRun(runs.context("kandinsky", *words[:2], "--dynamo_backend=aot_eager", swap), StopSignals())
    with pytest.raises(ConfigError, match="Block swap and --dynamo_backend eager do not go together"):
        runs.context("kandinsky", *words, swap)
    context = runs.context("kandinsky", *words)
    TrainingRun(context, StopSignals())
    estimate = MemoryEstimate(context.trainer, context, speeds=Speeds())
    assert "eager" in str(estimate.no_swap_because)


def test_an_optimizer_that_cannot_step_at_all_is_told_as_such(runs: Runs, for_gpus: ModuleType) -> None:
    for_gpus.only = True
    context = runs.context("lumina", BF16, "--optimizer_type=for_gpus.ForGpus", "--vram_budget=1GB")
    with pytest.raises(ConfigError, match="ForGpus cannot train on cpu: there is no kernel"):
        planned(context)


def test_what_cannot_fit_is_told_with_what_is_never_chosen(runs: Runs, estimated) -> None:
    with pytest.raises(ResourceError) as caught:
        plan(runs, estimated("lumina", BF16), 1_000_000, BF16)
    for words in ("gradients", "optimizer", FUSED, "AdamW8bit or Adafactor", FULL_BF16, "a lower resolution"):
        assert words in str(caught.value)
    assert "quant" not in str(caught.value)
    with pytest.raises(ResourceError) as caught:
        plan(runs, estimated("lumina", BF16, FUSED), 1_000_000, BF16, FUSED)
    assert FUSED not in str(caught.value)


# --- as users see it ---


def test_a_dry_run_tells_parts_and_the_computers_memory(runs: Runs, run_script, tmp_path: Path) -> None:
    words = [*runs.files["lumina"], *runs.words, f"--output_dir={tmp_path}", BF16, "--dry_run"]
    result = run_script("lumina_train.py", *words, "--gradient_checkpointing", "--blocks_to_swap=4")
    assert result.code == 0, result.err
    told = re.search(r"memory of tensors while training: ([\d.]+) MiB", result.out)
    parts = re.findall(r"^    ([a-z0-9 ]+): ([\d.]+) MiB$", result.out, re.MULTILINE)
    assert [name for name, _ in parts] == [
        "transformer",
        "what is kept of fp32 weights",
        "gradients",
        "optimizer",
        "activations of the largest batch",
    ]
    assert sum(float(size) for _, size in parts) == pytest.approx(float(told[1]), abs=0.5)
    assert re.search(
        r"in the computer's memory, of which .*weights of swapped blocks .* optimizer", result.out
    )


def test_a_budget_chooses_no_quantised_weights(runs: Runs, run_script, tmp_path: Path) -> None:
    words = [*runs.files["lumina"], *runs.words, f"--output_dir={tmp_path}", BF16, "--vram_budget=648MB"]
    looked = run_script("lumina_train.py", *words, "--dry_run")
    assert looked.code == 0, looked.err
    said = looked.out + looked.err
    assert "<- chosen" in said and "int8" not in said and "nf4" not in said
    assert re.search(r"flags: .*--checkpoint_mode \w+ .*--blocks_to_swap \d+", said)


def test_advice_is_mild_first_and_never_to_quantise(runs: Runs) -> None:
    item = SimpleNamespace(geometry=SimpleNamespace(bucket=(832, 1216)))
    manifest = SimpleNamespace(trained_datasets=[SimpleNamespace(batch_size=1)], items=[item])

    def advised(*words: str) -> list[str]:
        advice = training_advice(runs.options("lumina", *words), manifest)
        assert not any("quant" in sentence for sentence in advice)
        return [sentence.split()[0].strip(",") for sentence in advice]

    mild = ["--gradient_checkpointing", "--mixed_precision"]
    assert advised()[:4] == [*mild, FUSED, "--blocks_to_swap"]
    thrifty = (BF16, "--gradient_checkpointing", "--checkpoint_mode=full")
    upkeep = [FUSED, "--blocks_to_swap", "--optimizer_type", FULL_BF16]
    assert advised(*thrifty) == [*upkeep, "a"]
    thrifty += (FUSED, FULL_BF16, "--optimizer_type=Adafactor")
    assert advised(*thrifty, "--blocks_to_swap=2") == ["--blocks_to_swap", "a"]
    accumulating = training_advice(runs.options("lumina", BF16, "--gradient_accumulation_steps=2"), manifest)
    assert f"{FUSED} without --gradient_accumulation_steps" in " ".join(accumulating)
    loading = loading_advice(runs.options("lumina", BF16))
    assert [sentence.split()[0].strip(",") for sentence in loading] == [
        "--blocks_to_swap",
        FULL_BF16,
        "other",
    ]


def test_measuring_makes_real_updates_and_quantises_nothing(
    runs: Runs, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MODES", ("none", "offload"))  # to save time
    words = (BF16, FUSED, "--ema")  # the steps that are measured make no average
    context = runs.context("lumina", *words, "--vram_budget=601MB")  # too little
    saving = replace(context.options.saving, output_dir=tmp_path)
    context = replace(context, trainer=context.trainer.with_options(replace(context.options, saving=saving)))
    with pytest.raises(ResourceError, match="601MB leaves .* takes at least") as caught:
        measure.measure(context)
    assert "quant" not in str(caught.value)
    told = capsys.readouterr().out
    rows = re.findall(r"^as given +(\w+) +(\d+) .* ([\d.]+) +[\d.]+$", told, re.MULTILINE)
    assert {mode for mode, *_ in rows} == {"none", "full", "offload"}
    assert {int(swapped) for _, swapped, _ in rows} == {0, BLOCKS // 2}
    assert all(0.95 < float(ratio) < 1.05 for *_, ratio in rows)
    assert "int8" not in told


def test_precisions_to_choose_from_are_those_that_a_run_can_have(runs: Runs, nano, tmp_path: Path) -> None:
    whole, quantised = SimpleNamespace(comes_quantised=False), SimpleNamespace(comes_quantised=True)

    def had(resumed: str | None, context: RunContext) -> tuple[str | None, ...]:
        settings = {**context.prepared.settings, "base_quant": resumed}
        prepared = replace(context.prepared, resumed=SimpleNamespace(), settings=settings)
        return precisions_for(replace(context, prepared=prepared), whole)

    of_network = Runs(nano, tmp_path, of_networks=True).context("lumina")
    assert precisions_for(of_network, whole) == PRECISIONS
    assert precisions_for(of_network, quantised) == (None,)
    assert [had(quant, of_network) for quant in PRECISIONS] == [(quant,) for quant in PRECISIONS]
    of_weights = runs.context("lumina")
    assert precisions_for(of_weights, whole) == had(None, of_weights) == (None,)
