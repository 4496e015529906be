"""Numbers that are not finite never reach the weights, and memory that runs out is explained."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.core.dist import Processes
from library.core.errors import NonFiniteError, ResourceError
from library.data.batch import Batch
from library.data.items import Draw
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from library.training.gradients import PlainGradients
from library.training.guards import memory_explained, require_finite, training_advice
from library.training.objective import Objective
from library.training.update import MAX_SKIPPED, Share, Updater, UpdateSettings
from lumina_train_network import LuminaTrainer
from tests.reliability import legs
from tests.reliability.legs import NAME, losses, states


class Losses:
    """Losses of a line through data that a test may spoil; pictures 0 and 1."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.bad: float | None = None

    def training_losses(self, batch: Batch) -> torch.Tensor:
        factors = torch.tensor([1.0, 1.0 if self.bad is None else self.bad])
        return (self.weight * factors - 1.0) ** 2

    def sigmas(self, batch: Batch) -> torch.Tensor:
        return torch.tensor([0.25, 0.75])


def updater(objective: Losses, on_nan: str = "stop") -> Updater:
    optimizer = torch.optim.AdamW([objective.weight], lr=0.1)
    return Updater(
        objective,
        PlainGradients([objective.weight], torch.device("cpu")),
        optimizer,
        Processes.start(),
        UpdateSettings(seed=1, max_grad_norm=1.0, on_nan=on_nan),
    )


def shares() -> list[Share]:
    draws = tuple(Draw(slot, 0, 0, 0, 0, slot) for slot in range(2))
    return [Share(Batch(draws, ("good.png", "bad.png"), ("", ""), torch.ones(2)), 2)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_picture_and_sigma(bad: float) -> None:
    objective = Losses()
    update = updater(objective)
    update.step(0, shares())
    before = objective.weight.detach().clone()
    objective.bad = bad
    with pytest.raises(
        NonFiniteError, match=r"Step 2: the loss is (nan|inf)\. It comes from bad\.png \(sigma 0\.750\)\. So"
    ):
        update.step(1, shares())
    assert torch.equal(objective.weight, before)


def test_skipping_leaves_weights_and_optimizer_as_they_were(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("flow_scripts"), "propagate", True)
    spoilt, clean = Losses(), Losses()
    with_nan, without = updater(spoilt, "skip"), updater(clean)
    for step in range(3):
        spoilt.bad = float("nan") if step == 1 else None
        result = with_nan.step(step, shares())
        assert result.updated == (step != 1)
        if step != 1:
            without.step(step, shares())
    assert torch.equal(spoilt.weight, clean.weight)
    assert "bad.png (sigma 0.750). This step is left out (--on_nan skip)." in caplog.text


def test_skipping_is_given_up_when_every_step_is_bad() -> None:
    objective = Losses()
    objective.bad = float("nan")
    update = updater(objective, "skip")
    for step in range(MAX_SKIPPED):
        update.step(step, shares())
    with pytest.raises(NonFiniteError, match=f"for the {MAX_SKIPPED + 1}th time in a row"):
        update.step(MAX_SKIPPED, shares())


def test_a_gradient_that_is_not_finite_names_all_pictures() -> None:
    objective = Losses()
    objective.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"gradient norm is .*good\.png \(sigma 0\.250\), bad\.png"):
        updater(objective).step(0, shares())


def test_a_nan_ends_a_run_with_the_state_before_it(train, tmp_path: Path, monkeypatch) -> None:
    """The latents of step 4 are NaN; the state is that of step 3, and the run goes on from there."""
    real = Objective.training_losses

    def spoilt(self: Objective, batch: Batch) -> torch.Tensor:
        bad = batch.draws[0].step == 3
        return real(self, batch.map(lambda tensor: tensor * float("nan")) if bad else batch)

    monkeypatch.setattr(Objective, "training_losses", spoilt)
    with pytest.raises(NonFiniteError, match=r"Step 4: the loss is nan.*\.png \(sigma 0\.\d+\).*state"):
        train(tmp_path)
    assert states(tmp_path) == ["-step00000003-state"]
    assert not (tmp_path / f"{NAME}.safetensors").exists()
    train(tmp_path, "--resume=latest", "--on_nan=skip")
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_weights_that_are_not_finite_are_never_saved() -> None:
    tensors = {
        "a": torch.ones(2),
        "b": torch.tensor([1.0, float("inf")]),
        "c": torch.ones(2, dtype=torch.uint8),
    }
    with pytest.raises(NonFiniteError, match="In the network, 'b' holds NaN or infinite"):
        require_finite(tensors, "the network")
    require_finite({"c": tensors["c"]}, "the network")


# --- memory ---


def explained(error: BaseException) -> None:
    with memory_explained("training", torch.device("cpu"), ["first", "second", "third", "fourth"]):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_out_of_memory_comes_with_numbers_and_three_pieces_of_advice(error: BaseException) -> None:
    pattern = (
        r"Out of memory while training: this program used up to [\d.]+ GiB\. .*: first; second; third\.$"
    )
    with pytest.raises(ResourceError, match=pattern):
        explained(error)
    assert ResourceError.exit_code == 71


@pytest.mark.parametrize(
    ("unused", "platform", "first"),
    [
        (
            "2.50 GiB",
            "linux",
            "the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True, as 2.50 GiB",
        ),
        ("120.54 MiB", "linux", "first; second; third."),
        ("2.50 GiB", "win32", "first; second; third."),
    ],
)
def test_memory_in_pieces_is_told_of(
    monkeypatch: pytest.MonkeyPatch, unused: str, platform: str, first: str
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("library.training.guards.peak_memory_bytes", lambda device: 2**30)
    told = (
        "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 23.68 GiB of which "
        "187.88 MiB is free. Including non-PyTorch memory, this process has 23.49 GiB memory in use. Of the "
        f"allocated memory 20.44 GiB is allocated by PyTorch, and {unused} is reserved by PyTorch but "
        "unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_"
        "segments:True to avoid fragmentation."
    )
    with pytest.raises(ResourceError) as refused:
        explained(torch.OutOfMemoryError(told))
    assert str(refused.value).partition("What helps most here: ")[2].startswith(first)


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="^shapes$"):
        explained(RuntimeError("shapes"))


def test_advice_is_made_from_what_is_not_in_use_yet(nano, config: Path, tmp_path: Path) -> None:
    item = SimpleNamespace(geometry=SimpleNamespace(bucket=(832, 1216)))
    manifest = SimpleNamespace(trained_datasets=[SimpleNamespace(batch_size=4)], items=[item])
    command = [word for word in legs.words(nano, config, tmp_path) if "cache_" not in word]
    plain = " ".join(training_advice(parse_options(LuminaTrainOptions, command), manifest))
    for words in (
        "--gradient_checkpointing",
        "bf16",
        "batch_size 1 instead of 4",
        "--cache_latents",
        "832x1216",
    ):
        assert words in plain
    command += ["--gradient_checkpointing", "--mixed_precision=bf16", "--cache_latents"]
    manifest.trained_datasets[0].batch_size = 1
    thrifty = training_advice(parse_options(LuminaTrainOptions, command), manifest)
    wanted = ["--checkpoint_mode", "--cache_text_encoder_outputs_to_disk,", "--blocks_to_swap", "a"]
    assert [advice.split()[0] for advice in thrifty] == wanted


def test_a_preview_without_memory_costs_only_the_preview(train, tmp_path: Path, monkeypatch, capfd) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n")
    real = Objective.velocity

    def velocity(self: Objective, x_BCHW: torch.Tensor, *rest: object) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, x_BCHW, *rest)

    monkeypatch.setattr(Objective, "velocity", velocity)
    output = train(tmp_path, f"--sample_prompts={prompts}", "--sample_every_n_steps=2")
    assert sorted(losses(output)) == [1, 2, 3, 4, 5, 6]
    assert "Out of memory while drawing a sample picture" in capfd.readouterr().err


def test_a_training_step_without_memory_ends_with_advice(train, tmp_path: Path, monkeypatch) -> None:
    def training_losses(self: Objective, batch: Batch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Objective, "training_losses", training_losses)
    with pytest.raises(
        ResourceError, match="while training: .*--gradient_checkpointing, .*bf16, .*batch_size 1"
    ):
        train(tmp_path)


def refuse(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("load_transformer", "while loading the model: .*--mixed_precision bf16, .*other programs"),
        (
            "encode_images",
            "while encoding the dataset: .*--mixed_precision bf16, .*--text_encoder_quant int8",
        ),
        (
            "encode_prompts",
            "dataset: .*--text_encoder_quant int8, .*--text_encoder_batch_size 1 instead of 8",
        ),
    ],
)
def test_loading_and_encoding_without_memory_end_with_advice(
    train, tmp_path: Path, monkeypatch, hook: str, message: str
) -> None:
    monkeypatch.setattr(LuminaTrainer, hook, refuse)
    with pytest.raises(ResourceError, match=message):
        train(tmp_path, f"--cache_directory={tmp_path / 'cache'}")


def test_a_prompt_that_cannot_be_encoded_costs_only_its_picture(
    train, whole, tmp_path: Path, monkeypatch, capfd
) -> None:
    """The text encoder is loaded beside the model for a prompt that was added during the run."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n")
    real = Objective.training_losses

    def training_losses(self: Objective, batch: Batch) -> torch.Tensor:
        prompts.write_text("a cat --w 64 --h 64 --s 2\na dog --w 64 --h 64 --s 2\n")
        monkeypatch.setattr(LuminaTrainer, "load_text_encoders", refuse)
        return real(self, batch)

    monkeypatch.setattr(Objective, "training_losses", training_losses)
    output = train(tmp_path, "--ema", f"--sample_prompts={prompts}", "--sample_every_n_steps=4")
    assert "Out of memory while drawing a sample picture" in capfd.readouterr().err
    assert [path.name.split("_")[2] for path in (output / "sample").iterdir()] == ["00"]
    assert losses(output) == losses(whole)
