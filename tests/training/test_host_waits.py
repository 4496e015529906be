"""A step waits for the GPU once, to read its numbers; found without a GPU, see `tests.pretended_device`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.training.run import TrainingRun
from library.training.watch.metrics import Metrics
from tests.pretended_device import PretendedDevice
from tests.training.assembled import command, started, write_pictures

CPU = torch.device("cpu")
NOT_CACHED = "latents are not cached"


@pytest.mark.parametrize(
    ("read", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x.mean() * 2), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: (x.cpu(), x.to("cpu")), 2),
        (lambda x: x[x > 0], 1),
        (lambda x: torch.tensor([1.0], device=CPU), 1),
        (lambda x: torch.ones(3).to(CPU), 1),
        (lambda x: torch.ones(3).to(CPU, non_blocking=True).sum().item(), 1),
        (lambda x: x.to(CPU), 0),
        (lambda x: torch.ones(3).sum().item() + len(x) + x.shape[0], 0),
        (lambda x: torch.zeros(3, device=CPU) + x, 0),
        (lambda x: torch.zeros(3, device=CPU).sum().item(), 1),
    ],
)
def test_the_pretended_device_knows_what_waits(read: object, waits: int) -> None:
    x = torch.randn(3)
    with PretendedDevice([x]) as device:
        read(x)
    assert len(device.waits) == waits, device.waits


def test_memory_that_is_used_again_is_not_on_the_device() -> None:
    device = PretendedDevice()
    with device:
        for _ in range(200):
            (torch.randn(50, device=CPU) * 2).sum()
            torch.randn(50).sum().item()
    assert device.waits == []


def test_backward_stays_on_the_device() -> None:
    weight = torch.randn(3, requires_grad=True)
    with PretendedDevice([weight]) as device:
        (weight.exp() * torch.randn(3)).sum().backward()
        assert weight.grad is not None
        weight.grad.norm().item()
    assert len(device.waits) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision=bf16", "--gradient_checkpointing", "--ema"],
        ["--mixed_precision=fp16", "--gradient_accumulation_steps=2", "--max_batch_tokens=30"],
        ["--ip_noise_gamma=0.1", "--loss_type=huber", "--scale_weight_norms=0.1", "--tread_routes=1:-2:0.5"],
        ["--scheduled_sampling_max_step_offset=3", "--scheduled_sampling_probability=0.8"],
        ["--noise_offset=0.1", "--adaptive_noise_scale=0.1", "--multires_noise_iterations=2", NOT_CACHED],
        ["--base_quant=nf4", "--gradient_checkpointing", "--blocks_to_swap=2"],
    ],
    ids=["bf16", "fp16", "norms", "walks", "noise", "nf4"],
)
def test_a_step_waits_once(nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    config = write_pictures(tmp_path / "pictures")
    words = command(nano, config, tmp_path / "out", *flags)
    if NOT_CACHED in words:
        words = [word for word in words if word not in (NOT_CACHED, "--cache_latents")]
    run = started(words)
    device, found = PretendedDevice(), []
    loop, step = TrainingRun._loop, Metrics.step

    def watched_loop(self: TrainingRun) -> None:
        device.take([*self.parts.model.parameters(), *self.parts.model.buffers()])
        device.take(self.parts.trainee.parameters())
        with device:
            loop(self)

    def watched_step(self: Metrics, *numbers: object) -> None:
        found.append(list(device.waits))
        device.waits.clear()
        step(self, *numbers)

    monkeypatch.setattr(TrainingRun, "_loop", watched_loop)
    monkeypatch.setattr(Metrics, "step", watched_step)
    run.run()
    assert len(found) == 4
    for waits in found:
        assert [wait.partition(":")[0] for wait in waits] == ["tolist in training/update.py"], waits
