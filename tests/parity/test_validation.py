"""The validation loss in the log against one computed anew from the files, and over seeds and processes.

The pictures are held out in both ways, by number and as a dataset of their own; there are masks, a network
multiplier, another loss than l2, captions and pictures that training draws at random, and a weighting scheme,
which validation leaves out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.core import seeds
from tests.parity.independent import Sample, latent_mask, load_alpha, load_pixels
from tests.parity.independent_lumina import Lumina
from tests.parity.runs import (
    PHOTOS,
    RECIPE,
    SIDEWAYS,
    Run,
    add_alpha,
    flags,
    pipeline_flags,
    recipe_flags,
    write_config,
    write_photos,
)

STEPS, SIGMAS = 2, (0.1, 0.3, 0.5, 0.7, 0.9)
CHOICE, COUNT = 4, 1  # validation_seed, validation_count
STRENGTH = 0.5  # network_multiplier of the trained dataset
SIZES = {"sky": (80, 48), "woman": (48, 80), SIDEWAYS: (48, 80)}  # of buckets; the others are 64 x 64
DRAWN = "flip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.5\ncaption_tag_dropout_rate = 0.3"


@dataclass(frozen=True)
class Pictures:
    """Two folders: one is trained on, but for COUNT pictures, the other is for validation."""

    trained: Path
    held_out: Path

    def config(self, path: Path, batch_size: int, drawn: str = DRAWN) -> Path:
        """Write a configuration; `drawn` is what training leaves to chance."""
        dataset = f"network_multiplier = {STRENGTH}\nvalidation_count = {COUNT}\nvalidation_seed = {CHOICE}"
        validation = (
            f"[[datasets]]\nresolution = 64\nvalidation = true\n[[datasets.subsets]]\n"
            f"image_dir = '{self.held_out}'\nalpha_mask = true"
        )
        return write_config(
            path,
            self.trained,
            batch_size=batch_size,
            dataset=dataset,
            subset=f"alpha_mask = true\n{drawn}\n{validation}",
        )

    def measured(self) -> list[tuple[Path, float]]:
        """The held-out pictures, each with the strength of the network on it."""
        paths = sorted(self.trained.glob("*.png"), key=lambda p: seeds.unit(CHOICE, "validation", digest(p)))
        return [(path, STRENGTH) for path in paths[:COUNT]] + [
            (path, 1.0) for path in sorted(self.held_out.glob("*.png"))
        ]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    folder = tmp_path_factory.mktemp("validation")
    pictures = Pictures(
        write_photos(folder / "trained"), write_photos(folder / "held_out", ("woman", "cat", SIDEWAYS))
    )
    add_alpha(pictures.held_out / "cat.png")
    for (path, _), caption in zip(pictures.measured(), ("red, green,blue", "a  cat", "x"), strict=False):
        path.with_suffix(".txt").write_text(caption + "\nnot this line\n", encoding="utf-8")
    return pictures


@pytest.fixture(scope="module")
def options(pipeline: Path) -> dict[str, object]:
    changes = {
        "masked_loss": True,
        "max_train_steps": STEPS,
        "save_every_n_steps": 1,
        "validate_at_first": True,
        "validate_every_n_steps": 1,
        "loss_type": "smooth_l1",
        "huber_schedule": "constant",
        "huber_c": 0.2,
        "weighting_scheme": "cosmap",
        "noise_offset": 0.1,
    }
    return pipeline_flags(pipeline) | recipe_flags() | changes


@pytest.fixture(scope="module")
def run(
    options: dict[str, object],
    pictures: Pictures,
    train: Callable[..., Run],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    config = pictures.config(tmp_path_factory.mktemp("one") / "two.toml", batch_size=2)
    return train(options | {"dataset_config": config})


def validations(run: Run) -> list[dict[str, float]]:
    lines = (line for line in run.metrics if "loss/validation" in line)
    return [{name: line[name] for name in line if "validation" in name or name == "step"} for line in lines]


@torch.no_grad()
def expected(lumina: Lumina, pictures: Pictures, lora: Mapping[str, Tensor]) -> dict[str, float]:
    """The validation loss, from the formulas: mean over pictures at each sigma, and over sigmas."""
    losses: dict[float, list[float]] = {sigma: [] for sigma in SIGMAS}
    for path, strength in pictures.measured():
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0]
        if path.parent == pictures.trained:
            caption = ", ".join(tag.strip() for tag in caption.split(","))  # as training joins shuffled tags
        pixels_3HW = load_pixels(path, SIZES.get(path.stem, (64, 64)))
        mask = latent_mask(Sample(pixels_3HW, caption, 0, 0, 0, mask_HW=load_alpha(path)))
        x0 = lumina.latents(pixels_3HW[None])
        for sigma in SIGMAS:
            key = seeds.derive(0, "validation", digest(path), sigma)
            noise = torch.randn(x0.shape, generator=seeds.generator(key, "noise"))
            noisy = (1 - sigma) * x0 + sigma * noise
            text = f"{RECIPE.system_prompt} <Prompt Start> {caption}"
            velocity = lumina.velocity(noisy, torch.tensor([sigma]), [text], lora, strength)
            error = 2 * (((velocity - (noise - x0)) ** 2 + 0.2**2) ** 0.5 - 0.2)
            losses[sigma].append((error * mask).mean().item())
    means = {f"loss/validation_sigma_{sigma}": sum(values) / len(values) for sigma, values in losses.items()}
    return {"loss/validation": sum(means.values()) / len(means)} | means


def test_the_numbers_in_the_log(run: Run, pictures: Pictures, pipeline: Path) -> None:
    lumina, found = Lumina(pipeline), validations(run)
    assert [values.pop("step") for values in found] == list(range(STEPS + 1))
    files = [run.folder / f"last-step{step:08d}.safetensors" for step in range(1, STEPS)] + [run.path]
    loras = [{}, *map(load_file, files)]
    for values, lora in zip(found, loras, strict=True):
        assert values == pytest.approx(expected(lumina, pictures, lora), rel=1e-5)
    assert len({values["loss/validation"] for values in found}) == STEPS + 1


def test_held_out_pictures_are_not_trained_on(run: Run, pictures: Pictures) -> None:
    from safetensors import safe_open

    with safe_open(run.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_num_train_images"] == str(len(PHOTOS) - COUNT)
    assert metadata["ss_num_validation_images"] == str(COUNT + 3)
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert dataset["num_train_images"] == len(PHOTOS) - COUNT


def test_other_runs_measure_the_same(
    run: Run, options: dict[str, object], pictures: Pictures, train: Callable[..., Run], tmp_path: Path
) -> None:
    """An untrained network, another seed, other chances in training, latents on disk."""
    config = pictures.config(tmp_path / "other.toml", 1, drawn="shuffle_caption = true\nnum_repeats = 3")
    changes = {
        "seed": 99,
        "dataset_config": config,
        "max_train_steps": 1,
        "gradient_accumulation_steps": 1,
        "max_data_loader_n_workers": 0,
        "cache_latents_to_disk": True,
        "cache_directory": tmp_path / "cache",
    }
    other = train(options | changes)
    assert validations(other)[0] == validations(run)[0]
    assert validations(other)[1] != validations(run)[1]


# --- two processes ---


@pytest.fixture(scope="module")
def two(
    options: dict[str, object],
    pictures: Pictures,
    tmp_path_factory: pytest.TempPathFactory,
    launch: Callable[[Sequence[object]], str],
) -> Run:
    folder = tmp_path_factory.mktemp("two")
    given = options | {
        "dataset_config": pictures.config(folder / "one.toml", batch_size=1),
        "output_dir": folder,
    }
    (folder / "jobs").write_text(json.dumps(flags(given)) + "\n", encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    log = launch([*launcher, "tests/parity/training_worker.py", folder / "jobs"])
    return Run(folder, log)


def test_two_processes_measure_what_one_measures(two: Run, run: Run) -> None:
    """Bit for bit while the network is the same, which training itself gives only to the last digits."""
    assert "2 process(es)" in two.log
    assert validations(two)[0] == validations(run)[0]
    for ours, theirs in zip(validations(two), validations(run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_two_processes_share_the_encoding_for_caches_in_memory(two: Run) -> None:
    """The main process makes half of the entries: nine pictures, and their texts."""
    assert "latents: 0 in the cache, 5 to encode" in two.log, two.log
