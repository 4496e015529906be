"""Scheduled sampling in training, on nano models of both families; see also test_rollout_draws.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kandinsky5_train_network import Kandinsky5Trainer
from library.data.batch import Batch
from library.options.group import parse_options
from library.options.train_kandinsky5 import Kandinsky5TrainOptions
from library.training.assembly import Assembly, assemble
from library.training.context import RunContext
from library.training.prepare import prepare
from library.training.rollout import Passes, passes_of
from library.training.state.stop import StopRequest, StopSignals
from tests.parity.runs import write_config
from tests.parity.runs import write_pictures as write_noisy_pictures
from tests.training.assembled import command, put_together, started, write_pictures
from tests.training.rolling_out import slow_losses
from tools.make_nano_models import make_nano_kandinsky5

Made = tuple[RunContext, Assembly, list[Batch]]

ON = ("--scheduled_sampling_max_step_offset=4", "--scheduled_sampling_probability=0.8")
PLAIN = "--scheduled_sampling_reflexflow=false"
LARGE = "--scheduled_sampling_step_size=0.07"
SPREAD = "--timestep_sampling=uniform"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of six sizes with masks, one of which trains towards the untrained model."""
    folder = tmp_path_factory.mktemp("rollout")
    kept = write_pictures(folder / "kept", [(64, 64)])
    config = write_pictures(folder / "pictures")
    with config.open("a") as text:
        text.write(
            f"[[datasets.subsets]]\nimage_dir = '{kept.with_suffix('')}'\nalpha_mask = true\n"
            "custom_attributes = { diff_output_preservation = true }\n"
        )
    return config


def made_of(context: RunContext, parts: Assembly) -> Made:
    """Move the LoRA away from its start, where it does nothing; add the batches of two epochs."""
    for parameter in parts.trainee.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    batches = parts.loader.batches(0, 2 * context.plan.steps_per_epoch)
    return context, parts, [batch for *_, batch in batches]


@pytest.fixture(scope="module")
def lumina(nano, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Return a function that puts a run of Lumina together: batches of any sizes, and masks."""

    def make(*more: str, cached: bool = True) -> Made:
        given = command(nano, config, tmp_path_factory.mktemp("out"), "--max_batch_tokens=30", SPREAD, *more)
        given = [word for word in given if cached or not word.startswith("--cache")]
        return made_of(*put_together(given))

    return make


@pytest.fixture(scope="module")
def kandinsky(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Return a function that puts a run of Kandinsky together, which edits pictures."""
    folder = tmp_path_factory.mktemp("kandinsky")
    models = make_nano_kandinsky5(folder)
    after = write_noisy_pictures(folder / "after", {"fox": ((64, 64), "a fox"), "cup": ((48, 48), "a cup")})
    before = write_noisy_pictures(folder / "before", {"fox": ((64, 64), ""), "cup": ((48, 48), "")}, seed=6)
    alone = write_noisy_pictures(folder / "alone", {"city": ((80, 48), "a city"), "face": ((64, 64), "")})
    subset = f"conditioning_data_dir = '{before}'\n[[datasets.subsets]]\nimage_dir = '{alone}'"
    pairs = write_config(folder / "i2i.toml", after, subset=subset)

    def make(*more: str) -> Made:
        words = [
            *(f"--dit={models.i2i}", f"--text_encoder_qwen={models.qwen}", f"--vae={models.vae}"),
            *(f"--text_encoder_clip={models.clip}", f"--dataset_config={pairs}", "--seed=7"),
            *(f"--output_dir={folder / 'out'}", "--network_module=networks.lora_kandinsky5"),
            *("--network_dim=2", "--max_data_loader_n_workers=0", "--console_log_level=WARNING"),
            *("--cache_latents", "--cache_text_encoder_outputs", SPREAD, *more),
        ]
        torch.set_num_threads(1)
        trainer = Kandinsky5Trainer(parse_options(Kandinsky5TrainOptions, words))
        context = RunContext.decide(trainer, prepare(trainer))
        context.inputs.fill_caches(context.prepared.manifest)
        return made_of(context, assemble(context, StopRequest(StopSignals(), Path("no such file"), None)))

    return make


def gradients(parts: Assembly, losses: Sequence[Tensor]) -> list[Tensor]:
    trained = [parameter for parameter in parts.trainee.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(torch.stack(list(losses)).sum(), trained, allow_unused=True))


def assert_as_slow(made: Made) -> None:
    """Compare losses and gradients of all batches with the other computation."""
    context, parts, batches = made
    walks = [walk for batch in batches for walk in batch.walks]
    assert len({len(walk) for walk in walks}) > 2 and () in walks, "some walk, and not all as far"
    for batch in batches:
        ours = parts.objective.training_losses(batch)
        slow = [
            loss * weight
            for loss, weight in zip(slow_losses(context, parts, batch), batch.weights_B, strict=True)
        ]
        counts = [place for place, preserved in enumerate(batch.preserved) if not preserved]
        torch.testing.assert_close(ours[counts], torch.stack(slow)[counts], rtol=2e-4, atol=1e-6)
        if not counts:
            continue
        pairs = zip(
            gradients(parts, [ours[place] for place in counts]),
            gradients(parts, [slow[place] for place in counts]),
            strict=True,
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=5e-3, atol=2e-3 * other.abs().max().item())


def test_lumina_trains_as_the_slow_computation_says(lumina) -> None:
    beta1, beta2 = "--scheduled_sampling_reflexflow_beta1=3", "--scheduled_sampling_reflexflow_beta2=0.5"
    assert_as_slow(
        lumina(*ON, LARGE, "--ip_noise_gamma=0.2", "--scheduled_sampling_reflexflow_alpha=2", beta1, beta2)
    )


def test_so_it_does_with_the_plain_loss_and_pixels_that_are_encoded_on_the_way(lumina) -> None:
    assert_as_slow(lumina(*ON, LARGE, PLAIN, cached=False))


def test_kandinsky_trains_as_the_slow_computation_says(kandinsky) -> None:
    made = kandinsky(*ON, LARGE)
    assert any(any(batch.sources) for batch in made[2])
    assert_as_slow(made)


# --- what the model is asked ---


@pytest.fixture(scope="module")
def rolled(lumina) -> Made:
    """A run with dropout, and with tokens that skip blocks, of two epochs."""
    return lumina(*ON, LARGE, "--network_dropout=0.5", "--tread_routes=1:-2:0.5")


class Asked:
    """What the model is asked meanwhile: how many pictures, their sigmas, and whether as in training, which
    has a graph, dropout and routes."""

    def __init__(
        self, context: RunContext, monkeypatch: pytest.MonkeyPatch, network: torch.nn.Module
    ) -> None:
        self.times: list[tuple[int, list[float], tuple[bool, bool, bool]]] = []
        real = context.trainer.velocities

        def velocities(model, x, sigma_B, conditions, routing) -> list[Tensor]:
            manner = (torch.is_grad_enabled(), network.training, routing is not None)
            self.times.append((len(x), sigma_B.tolist(), manner))
            return real(model, x, sigma_B, conditions, routing)

        monkeypatch.setattr(context.trainer, "velocities", velocities)


def test_a_batch_takes_as_many_passes_as_its_longest_walk(rolled: Made, monkeypatch) -> None:
    """The velocities on the path come with the last of them, and the model walks as it draws."""
    context, parts, batches = rolled
    asked = Asked(context, monkeypatch, parts.trainee)
    for batch in batches:
        asked.times.clear()
        parts.objective.training_losses(batch)
        steps = [len(walk) - 1 for walk in batch.walks if walk]
        *walking, training = asked.times
        if any(batch.preserved):
            walking.pop()  # of the untrained model
        assert training == (len(batch.draws), list(batch.sigmas), (True, True, bool(batch.kept)))
        assert all(manner == (False, False, False) for *_, manner in walking)
        sizes = [sum(n >= left for n in steps) for left in range(max(steps, default=0), 0, -1)]
        assert [size for size, *_ in walking] == [*sizes[:-1], *(2 * size for size in sizes[-1:])]
        assert parts.trainee.training
    assert any(batch.kept and any(batch.walks) for batch in batches)
    assert len({len(batch.walks) - batch.walks.count(()) for batch in batches}) > 1


def test_what_is_dropped_at_random_is_what_it_would_be_without(rolled: Made, monkeypatch) -> None:
    """A walk takes nothing from the generator that dropout draws from."""
    context, parts, batches = rolled
    batch = next(batch for batch in batches if any(batch.walks))
    with torch.no_grad():
        torch.manual_seed(5)
        parts.objective.training_losses(batch)
        after = torch.get_rng_state()
        torch.manual_seed(5)
        parts.objective.training_losses(replace(batch, walks=((),) * len(batch.draws)))
    assert torch.equal(torch.get_rng_state(), after)


def test_pictures_that_train_towards_the_untrained_model_do_not_walk(rolled: Made) -> None:
    _, parts, batches = rolled
    draws = [draw for batch in batches for draw in batch.draws]
    walks = parts.objective._noising.walks
    assert any(walks(draws, torch.full((len(draws),), 0.5), [False] * len(draws)))
    assert not any(walks(draws, torch.full((len(draws),), 0.5), [True] * len(draws)))


def test_validation_asks_once(rolled: Made, monkeypatch) -> None:
    context, parts, batches = rolled
    batch = next(batch for batch in batches if any(batch.walks))
    conditions, noisy = parts.objective.conditions(batch), parts.objective._noisy(batch)
    asked = Asked(context, monkeypatch, parts.trainee)
    with torch.no_grad():
        parts.objective.losses_at(batch, noisy, conditions)
    assert len(asked.times) == 1


def test_every_process_knows_the_passes_of_all(rolled: Made) -> None:
    context, parts, batches = rolled
    passes = Passes(context.plan, context.prepared.manifest, parts.objective._noising)
    found = {(batch.draws[0].step, batch.draws[0].micro): passes_of(batch.walks) for batch in batches}
    assert {place: passes(*place) for place in found} == found
    assert len(set(found.values())) > 1


# --- whole runs ---


def losses(output: Path) -> list[dict[str, float]]:
    """Return the numbers of each step, but for those that clocks and memory have a part in."""
    lines = map(json.loads, (output / "run.metrics.jsonl").read_text().splitlines())
    kept = ("step", "loss", "grad_norm", "rollout")
    return [{name: value for name, value in line.items() if name.startswith(kept)} for line in lines]


@pytest.fixture(scope="module")
def train(nano, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains and returns the output folder."""

    def run(*more: str, output: Path | None = None) -> Path:
        output = output or tmp_path_factory.mktemp("run")
        started(command(nano, config, output, "--network_dropout=0.2", *more)).run()
        return output

    return run


@pytest.fixture(scope="module")
def whole(train: Callable[..., Path]) -> Path:
    """Four steps, with more and more walks."""
    return train(*RAMP)


RAMP = (
    *("--scheduled_sampling_max_step_offset=3", "--scheduled_sampling_ramp_steps=2"),
    *("--scheduled_sampling_prob_end=1", LARGE),
)


def same_network(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "run.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_log_tells_of_rollouts(whole: Path) -> None:
    steps = losses(whole)
    assert [step["rollout/probability"] for step in steps] == [0, 0.5, 1, 1]
    assert steps[0]["rollout/pictures"] == 0 and "rollout/mean_offset" not in steps[0]
    assert all(1 <= step["rollout/pictures"] <= 2 for step in steps[2:])
    assert all(1 <= step["rollout/mean_offset"] <= 3 for step in steps[2:])


def test_a_resumed_run_goes_on_bit_for_bit(train: Callable[..., Path], whole: Path) -> None:
    output = train(*RAMP, "--max_train_steps=2", "--save_state")
    train(*RAMP, "--resume=latest", output=output)
    assert losses(output) == losses(whole)
    assert same_network(output, whole)


def test_a_run_without_a_walk_is_the_plain_one_bit_for_bit(train: Callable[..., Path]) -> None:
    plain = train()
    assert not any("rollout" in name for step in losses(plain) for name in step)
    waiting = train(*RAMP, "--scheduled_sampling_start_step=50")
    assert [step.pop("rollout/pictures") for step in losses(waiting)] == [0] * 4
    assert same_network(plain, waiting)
    numbers = [{name: step[name] for name in step if "rollout" not in name} for step in losses(waiting)]
    assert numbers == losses(plain)


def test_a_run_without_the_flags_draws_nothing(lumina, monkeypatch) -> None:
    context, parts, batches = lumina()
    assert all(batch.walks == () for batch in batches)
    asked = Asked(context, monkeypatch, parts.trainee)
    monkeypatch.setattr("library.training.objective.roll_out", None)
    parts.objective.training_losses(batches[0])
    assert len(asked.times) == 1 + any(batches[0].preserved)
