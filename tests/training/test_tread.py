"""Runs with --tread_routes: which tokens are dropped, when none are; a resumed run drops the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.data.loader import BatchLoader
from library.data.plan import Plan
from library.models.nextdit import NextDiT
from library.options.tread import Route
from library.training.look.simulate import Work
from lumina_train_network import LUMINA2, LuminaTrainer
from tests.training.assembled import command, context_of, put_together, started, write_pictures
from tests.training.test_memory_estimate import allocated, bare_step, simulation

ROUTES = ("--tread_routes", "1:2:0.5", "-1:-1:0.25")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def run(nano, config: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run put together, and its parts."""
    return put_together(command(nano, config, tmp_path_factory.mktemp("out"), *ROUTES))


def kept_of(batches: Iterator) -> dict[tuple, list[list[int]]]:
    """What is kept, by (step, micro, slot): for each route, numbers of tokens."""
    return {
        (draw.step, draw.micro, draw.slot): [route[place].tolist() for route in batch.kept]
        for _, _, batch in batches
        for place, draw in enumerate(batch.draws)
    }


def test_tokens_hang_on_seed_step_and_slot_alone(run, nano, config: Path, tmp_path: Path) -> None:
    context, parts = run
    whole = kept_of(parts.loader.batches(0, 6))
    assert kept_of(parts.loader.batches(3, 6)) == {key: v for key, v in whole.items() if key[0] >= 3}
    assert kept_of(parts.loader.batches(0, 6)) == whole
    routes = [route for kept in whole.values() for route in kept]
    assert len({tuple(route) for route in routes}) > 0.9 * len(routes)  # drawn anew each time
    _, other = put_together(command(nano, config, tmp_path, *ROUTES, "--seed=4"))
    assert kept_of(other.loader.batches(0, 6)) != whole


def test_processes_drop_what_one_alone_drops(run) -> None:
    """A batch of four on one process, or of two on each of two."""
    context, parts = run
    complete, manifest = parts.loader._complete, context.prepared.manifest
    doubled = [replace(item, dataset=replace(item.dataset, batch_size=4)) for item in manifest.items]
    datasets = tuple(replace(dataset, batch_size=4) for dataset in manifest.datasets)
    worlds = {
        1: replace(manifest, items=tuple(doubled), datasets=datasets),
        2: manifest,
    }
    found = {}
    for world, items in worlds.items():
        plan = Plan(items, seed=context.seed, world=world, accumulation=1)
        loaders = [
            BatchLoader(
                items, plan, parts.loader._caches, replace(context.loader_settings(), rank=rank),
                complete=complete,
            )
            for rank in range(world)
        ]  # fmt: skip
        found[world] = kept_of(chain(*(loader.batches(0, 4) for loader in loaders)))
    assert found[1] == found[2]


def test_as_many_are_kept_as_the_share_says(run) -> None:
    _, parts = run
    for _, _, batch in parts.loader.batches(0, 3):
        for route, share in zip(batch.kept, (0.5, 0.25), strict=True):
            for kept, latent in zip(route, batch.latents, strict=True):
                tokens = latent.shape[1] * latent.shape[2] // 4
                assert len(kept) == tokens - round(tokens * share) and int(kept.max()) < tokens


def test_tokens_inside_of_the_mask_first(nano, config: Path, tmp_path: Path) -> None:
    """Each picture has a corner of 16 x 16, which is a token, with little weight; all else is inside."""
    _, parts = put_together(command(nano, config, tmp_path, "--tread_routes", "1:2:0.1", "--tread_keep_mask"))
    checked = 0
    for _, _, batch in parts.loader.batches(0, 4):
        (route,) = batch.kept
        for kept, mask in zip(route, batch.masks, strict=True):
            tokens = mask.numel() // 4
            outside = {
                n
                for n in range(tokens)
                if mask.unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3)).view(-1)[n] < 0.5
            }
            dropped = set(range(tokens)) - set(kept.tolist())
            if dropped and outside:
                checked += 1
                assert dropped <= outside if len(dropped) <= len(outside) else outside <= dropped
    assert checked


def test_the_last_steps_have_all_tokens(nano, config: Path, tmp_path: Path) -> None:
    words = command(nano, config, tmp_path, *ROUTES, "--tread_off_last=50%")
    _, parts = put_together(words)
    assert [bool(batch.kept) for step, _, batch in parts.loader.batches(0, 4)] == [
        step < 2 for step, _, _ in parts.loader.batches(0, 4)
    ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Whether each pass through a model had gradients, and whether it was routed."""
    seen: list[tuple[bool, bool]] = []
    forward = NextDiT.forward

    def watched(self, x, t_B, captions, routing=None):
        if not x[0].is_meta:
            seen.append((torch.is_grad_enabled(), routing is not None))
        return forward(self, x, t_B, captions, routing)

    monkeypatch.setattr(NextDiT, "forward", watched)
    return seen


def test_only_training_is_routed_and_a_resumed_run_is_the_whole_one(
    nano, config: Path, tmp_path: Path, calls
) -> None:
    """Previews, validation and the teacher of preserved pictures see all tokens."""
    more = "custom_attributes = { diff_output_preservation = true }\nvalidation_split = 0.2\n"
    preserving = tmp_path / "data.toml"
    preserving.write_text(config.read_text() + more)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2")
    watching = (f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--validate_every_n_steps=2")
    states = ("--save_state", "--save_every_n_steps=2")
    whole = command(nano, preserving, tmp_path / "whole", *ROUTES, *watching, *states)
    started(whole).run()
    assert set(calls) == {(True, True), (False, False)}
    assert calls.count((True, True)) == 4 and calls.count((False, False)) > 4 + 2 * 2
    state = next((tmp_path / "whole").glob("*000002-state"))
    rest = command(nano, preserving, tmp_path / "rest", *ROUTES, f"--resume={state}")
    started(rest).run()
    one, other = (load_file(tmp_path / name / "run.safetensors") for name in ("whole", "rest"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    plain = command(nano, preserving, tmp_path / "plain", f"--resume={state}")
    started(plain).run()
    without = load_file(tmp_path / "plain" / "run.safetensors")
    assert any(not torch.equal(one[key], without[key]) for key in one)


@pytest.mark.parametrize("more", [[], ["--base_quant=int8", "--blocks_to_swap=2"]], ids=["plain", "int8"])
def test_a_batch_of_any_sizes_has_the_losses_of_its_pictures(
    nano, config: Path, tmp_path: Path, more: list[str]
) -> None:
    _, parts = put_together(command(nano, config, tmp_path, *ROUTES, "--max_batch_tokens=24", *more))
    several = 0
    with torch.no_grad():
        for _, _, batch in parts.loader.batches(0, 3):
            together = parts.objective.training_losses(batch)
            alone = [parts.loader._complete(parts.loader.batch([draw])) for draw in batch.draws]
            losses = torch.cat([parts.objective.training_losses(each) for each in alone])
            torch.testing.assert_close(together, losses, rtol=2e-4, atol=1e-5)
            several += len(batch.draws) > 1
    assert several


def test_routes_are_checked_before_anything_is_loaded(nano, config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no block 4; this model has 4 that tokens can skip"):
        context_of(command(nano, config, tmp_path, "--tread_routes=1:4:0.5"))


@pytest.mark.parametrize("mode", ["none", "full"])
def test_memory_of_a_routed_step_is_what_was_foretold(nano, mode: str) -> None:
    sizes = ((96, 64),) * 4
    plain, routed = Work(sizes, 20), Work(sizes, 20, (Route(0, -1, 0.5),))
    foretold, real = (simulation(nano, device, mode=mode) for device in ("meta", "cpu"))
    foretold.trainer.family = real.trainer.family = LUMINA2
    bare_step(real, routed)  # makes tables that stay
    peak = foretold.step(routed).peak
    assert peak == pytest.approx(allocated(lambda: bare_step(real, routed)), rel=0.05)
    assert peak < 0.9 * foretold.step(plain).peak


def test_the_dry_run_tells_tokens_and_savings_and_the_estimate_knows_them(
    nano, config: Path, tmp_path: Path, capsys
) -> None:
    def report(*more: str) -> str:
        from library.options.group import parse_options
        from library.options.train import LuminaTrainOptions

        words = command(nano, config, tmp_path, "--dry_run", *more)
        LuminaTrainer(parse_options(LuminaTrainOptions, words)).train()
        return capsys.readouterr().out

    def size(out: str) -> float:
        return float(re.search(r"activations of the largest batch: ([\d.]+) MiB", out)[1])

    routed = report("--tread_routes=0:-1:0.5", "--tread_off_last=1")
    assert "blocks 0 to 3 of 0 to 3 see 12 of a picture's 24 tokens (--tread_routes)" in routed
    saved = float(
        re.search(r"([\d.]+)% of what the model's blocks compute is saved, with a text of", routed)[1]
    )
    assert 15 < saved < 45 and "; not in the last 1 of 4 steps" in routed
    plain = report()
    assert "tread" not in plain and size(plain) == size(routed)  # the last step takes as much
    assert size(report("--tread_routes=0:-1:0.5")) < 0.9 * size(plain)
