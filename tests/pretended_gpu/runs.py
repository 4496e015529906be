"""Runs on a GPU: in order, with one wait a step, in the memory that was foretold. Run on the pretended one by
`test_pretended_gpu.py`; most of it holds on a real one, too.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops
from torch import Tensor

import kandinsky5_minimal_inference
import lumina_minimal_inference
from library.training.look.measure import measure
from library.training.run import TrainingRun
from library.training.state.stop import StopSignals
from library.training.watch.metrics import Metrics
from tests.training.assembled import command, started, write_pictures
from tests.training.nano_runs import Runs

FAMILIES = ("lumina", "kandinsky")
NOT_CACHED = "latents are not cached"
PROMPTS = "a red square --w 64 --h 96 --s 2 --d 1\n"


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs choose the GPU, which other tests are kept from."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def networks(nano: object, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """LoRAs."""
    return Runs(nano, tmp_path_factory.mktemp("networks"), of_networks=True)


@pytest.fixture(scope="module")
def weights(nano: object, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The models' own weights."""
    return Runs(nano, tmp_path_factory.mktemp("weights"))


def trained(runs: Runs, family: str, *flags: str) -> dict[str, Tensor]:
    """Train, and return what was saved."""
    where = f"--output_dir={elsewhere_of(runs)}"
    context = runs.context(family, "--learning_rate=1e-3", "--max_train_steps=4", where, *flags)
    assert context.device.type == "cuda"
    TrainingRun(context, StopSignals()).run()
    return safetensors.torch.load_file(context.options.saving.output_dir / "it.safetensors")


def elsewhere_of(runs: Runs) -> Path:
    """Return a folder that pictures may be written to, which is not beside those to train on."""
    return runs.folder.with_name(f"{runs.folder.name}-written")


SWAPPED = ("--blocks_to_swap=3", "--use_pinned_memory_for_block_swap")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_the_same_in_every_memory_mode(networks: Runs, family: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    plain = trained(networks, family, "--mixed_precision=bf16")
    for flags in (
        ("--gradient_checkpointing",),
        ("--gradient_checkpointing", "--cpu_offload_checkpointing"),
        SWAPPED,
        (
            "--blocks_to_swap=3",
            "--block_swap_ring_size=1",
            "--gradient_checkpointing",
            "--checkpoint_mode=full",
        ),
        (*SWAPPED, f"--sample_prompts={prompts}", "--sample_every_n_steps=2"),
    ):
        found = trained(networks, family, "--mixed_precision=bf16", *flags)
        for name, tensor in plain.items():
            assert torch.equal(found[name], tensor), (flags, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_same_in_every_memory_mode(weights: Runs, family: str) -> None:
    plain = trained(weights, family, "--mixed_precision=bf16", "--max_grad_norm=0")
    for flags in (
        ("--fused_backward_pass",),
        ("--fused_backward_pass", "--gradient_checkpointing", *SWAPPED),
        ("--blocks_to_swap=2", "--block_swap_ring_size=1"),
    ):
        found = trained(weights, family, "--mixed_precision=bf16", "--max_grad_norm=0", *flags)
        for name, tensor in plain.items():
            torch.testing.assert_close(
                found[name], tensor, msg=lambda text, at=(flags, name): f"{at}: {text}"
            )


@pytest.mark.parametrize(
    ("family", "scheme"), [("lumina", "int8"), ("lumina", "nf4"), ("kandinsky", "fp8"), ("kandinsky", "int4")]
)
def test_quantised_blocks_can_be_swapped(networks: Runs, family: str, scheme: str) -> None:
    flags = ("--mixed_precision=bf16", f"--base_quant={scheme}", f"--text_encoder_quant={scheme}")
    plain = trained(networks, family, *flags)
    swapped = trained(networks, family, *flags, *SWAPPED)
    assert all(torch.equal(swapped[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision=bf16", "--gradient_checkpointing", "--ema"],
        ["--mixed_precision=fp16", "--gradient_accumulation_steps=2", "--max_batch_tokens=30"],
        ["--ip_noise_gamma=0.1", "--loss_type=huber", "--scale_weight_norms=0.1", "--tread_routes=1:-2:0.5"],
        ["--scheduled_sampling_max_step_offset=3", "--scheduled_sampling_probability=0.8"],
        ["--noise_offset=0.1", "--adaptive_noise_scale=0.1", "--multires_noise_iterations=2", NOT_CACHED],
        ["--base_quant=nf4", "--gradient_checkpointing", "--blocks_to_swap=2"],
        ["--mixed_precision=bf16", "--max_grad_norm=1e-3", *SWAPPED],
        ["--network_dropout=0.1", "--network_args", "rank_dropout=0.1"],
        ["--network_args", "use_dora=True"],
    ],
    ids=["bf16", "fp16", "norms", "walks", "noise", "nf4", "swap", "dropout", "dora"],
)
def test_a_step_waits_once(
    nano: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    words = command(nano, write_pictures(tmp_path / "pictures"), tmp_path / "out", *flags)
    if NOT_CACHED in words:
        words = [word for word in words if word not in (NOT_CACHED, "--cache_latents")]
    assert_waits(started(words), monkeypatch)


@pytest.mark.parametrize("flags", [["--mixed_precision=bf16"], ["--mixed_precision=bf16", *SWAPPED]])
def test_a_step_of_kandinsky_waits_once(
    networks: Runs, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    where = f"--output_dir={elsewhere_of(networks)}"
    context = networks.context("kandinsky", "--max_train_steps=4", where, *flags)
    assert_waits(TrainingRun(context, StopSignals()), monkeypatch)


def assert_waits(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run four steps, each of which waits once, for its numbers."""
    found: list[list[str]] = []
    loop, step = TrainingRun._loop, Metrics.step

    def watched_loop(run: TrainingRun) -> None:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loop(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def watched_step(metrics: Metrics, *numbers: object) -> None:
        waits = [warning for warning in seen if "synchronizing" in str(warning.message)]
        found.append([Path(wait.filename).name for wait in waits])
        seen.clear()
        step(metrics, *numbers)

    monkeypatch.setattr(TrainingRun, "_loop", watched_loop)
    monkeypatch.setattr(Metrics, "step", watched_step)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.run()
    assert len(found) == 4
    # What encodes pictures on the way is read from its file when the first of them comes.
    found[0] = [where for where in found[0] if where != "reader.py"]
    assert found == [["update.py"]] * 4


@pytest.mark.parametrize("kind", ["networks", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_takes_the_memory_that_was_foretold(
    family: str, kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """With pictures so large that activations are most of it."""
    runs = request.getfixturevalue(kind)
    flags = ("--mixed_precision=bf16", "--vram_budget=2GB", "--resolution=384")
    context = runs.context(family, *flags, f"--output_dir={elsewhere_of(runs)}")
    rows = json.loads(measure(context).read_text())
    assert len(rows) >= 6
    for row in rows:
        assert row["foretold_bytes"] == pytest.approx(row["found_bytes"], rel=0.01), row
    assert "<- chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "family"),
    [(lumina_minimal_inference, "lumina"), (kandinsky5_minimal_inference, "kandinsky")],
    ids=FAMILIES,
)
def test_pictures_are_the_same_in_every_memory_mode(
    networks: Runs, program: object, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(networks, family, "--mixed_precision=bf16")
    files = [word for word in networks.files[family] if re.match("--(pretrained|dit|text_|vae)", word)]
    files += [
        re.sub("--(gemma2|ae)=", r"--\1_path=", word)
        for word in networks.files[family]
        if re.match("--(gemma2|ae)=", word)
    ]
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    pictures = []
    for number, flags in enumerate(
        [
            ["--dtype=bf16"],
            ["--offload"],
            ["--blocks_to_swap=3", "--use_pinned_memory_for_block_swap", "--offload"],
        ]
    ):
        folder = tmp_path / str(number)
        words = [*files, f"--from_file={tmp_path / 'prompts.txt'}", f"--output_dir={folder}", *flags]
        monkeypatch.setattr(
            "sys.argv", ["draw", *words, f"--lora_weights={elsewhere_of(networks) / 'it.safetensors'}"]
        )
        program.main()
        (path,) = folder.glob("*.png")
        pictures.append(Image.open(path).convert("RGB"))
    assert all(ImageChops.difference(pictures[0], other).getbbox() is None for other in pictures[1:])
