"""Pictures of any size in a batch (--max_batch_tokens): each loss is that of the picture alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.core.errors import ConfigError
from library.training.assembly import Assembly
from library.training.context import RunContext
from library.training.update import Share
from tests.training.assembled import SIZES, command, put_together, started, write_pictures

VARIANTS = {
    "cached": [],
    "online": [],
    "noise": [
        *("--noise_offset=0.1", "--adaptive_noise_scale=0.2", "--multires_noise_iterations=3"),
        *("--ip_noise_gamma=0.3", "--ip_noise_gamma_random_strength", "--weighting_scheme=cosmap"),
    ],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def words(nano: object, config: Path, output: Path, variant: str = "cached") -> list[str]:
    given = command(nano, config, output, "--max_batch_tokens=24", *VARIANTS[variant])
    return [word for word in given if variant != "online" or not word.startswith("--cache")]


def stir(parts: Assembly) -> None:
    """Move the LoRA away from its start, where it does nothing."""
    for parameter in parts.trainee.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))


def batch_alone(context: RunContext, parts: Assembly, draw: object) -> Tensor:
    """Return the training loss of a draw in a batch of its own."""
    batch = parts.loader._complete(parts.loader.batch([draw]))
    return parts.objective.training_losses(batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_any_sizes_has_the_losses_of_its_pictures(
    nano, config: Path, tmp_path: Path, variant: str
) -> None:
    context, parts = put_together(words(nano, config, tmp_path / "out", variant))
    stir(parts)
    sizes = set()
    with torch.no_grad():
        for _, _, batch in parts.loader.batches(0, context.plan.steps_per_epoch):
            together = parts.objective.training_losses(batch)
            alone = torch.cat([batch_alone(context, parts, draw) for draw in batch.draws])
            torch.testing.assert_close(together, alone, rtol=2e-5, atol=1e-6)
            sizes.add(len({picture.shape for picture in batch.latents or batch.pixels}))
    assert max(sizes) > 1, "some batch was meant to hold pictures of different sizes"


def test_gradients_are_those_of_the_pictures_alone(nano, config: Path, tmp_path: Path) -> None:
    context, parts = put_together(words(nano, config, tmp_path / "out"))
    stir(parts)
    trained = list(parts.trainee.parameters())
    _, _, batch = max(
        parts.loader.batches(0, context.plan.steps_per_epoch), key=lambda place: len(place[2].draws)
    )
    assert len(batch.draws) > 1
    together = torch.autograd.grad(parts.objective.training_losses(batch).mean(), trained)
    losses = [batch_alone(context, parts, draw).sum() for draw in batch.draws]
    alone = torch.autograd.grad(torch.stack(losses).mean(), trained)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(nano, config: Path, tmp_path: Path) -> None:
    more = ["--save_state", "--save_every_n_steps=3", "--max_train_steps=7", "--lr_scheduler=constant"]
    started(words(nano, config, tmp_path / "whole") + more).run()
    state = tmp_path / "whole" / "run-step00000003-state"
    started([*words(nano, config, tmp_path / "resumed"), *more, f"--resume={state}"]).run()
    whole, resumed = (load_file(tmp_path / name / "run.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    lines = (tmp_path / "whole" / "run.metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "loss/current" in json.loads(line)]) == 7


def test_two_processes_do_what_one_would(nano, config: Path, tmp_path: Path) -> None:
    """Each runs its part; the gradients of the parts add up to that of the whole batch."""
    context, parts = put_together(words(nano, config, tmp_path / "out"))
    stir(parts)
    budget = context.trainer.token_budget
    plan = type(context.plan)(context.prepared.manifest, seed=context.seed, world=2, budget=budget)
    micro = max(plan.step(0) + plan.step(1), key=lambda micro: len(micro.draws))
    assert all(micro.parts), "both processes were meant to have pictures"

    def losses(draws: object) -> Tensor:
        return parts.objective.training_losses(parts.loader._complete(parts.loader.batch(draws)))

    with torch.no_grad():
        shares = [Share(parts.loader.batch(part), len(micro.draws)) for part in micro.parts]
        added = sum(losses(share.batch.draws).sum() / share.total for share in shares)
        torch.testing.assert_close(added, losses(micro.draws).mean(), rtol=1e-5, atol=1e-6)


def test_a_budget_too_small_is_told_before_anything_is_loaded(nano, config: Path, tmp_path: Path) -> None:
    largest = max((width // 16) * (height // 16) for width, height in SIZES)
    assert largest == 24
    with pytest.raises(ConfigError, match="max_batch_tokens is 23, but a picture of 96x64 has 24 tokens"):
        put_together(command(nano, config, tmp_path / "out", "--max_batch_tokens=23"))
