"""lumina_train_network.py against training written anew from the documents, number for number.

The checkpoints were written by diffusers and transformers, and the other side of the comparison computes with
them. The run has everything that could hide a mistake: several buckets, pictures that are resized and turned,
captions of different lengths in a batch, a last micro-batch and a last step that are smaller, more than one
epoch, LoRAs of different ranks on every kind of layer, LoRA+.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from library.data.items import Draw, Item
from tests.parity.independent import (
    Sample,
    State,
    load_alpha,
    load_pixels,
    shift_by_three,
    start_of_lora,
)
from tests.parity.independent import train as train_independently
from tests.parity.independent_lumina import Lumina
from tests.parity.plans import Steps, planned
from tests.parity.runs import (
    ACCUMULATION,
    RECIPE,
    STEPS,
    Run,
    add_alpha,
    pipeline_flags,
    recipe_flags,
    write_config,
    write_photos,
)


def expected_ranks() -> dict[str, int]:
    """The rank of each layer under `recipe_flags`, from the documents (section 3.6, D-16)."""
    ranks = {"x_embedder": 2, "t_embedder_mlp_0": 1, "t_embedder_mlp_2": 1, "cap_embedder_1": 3}
    for block in ("layers_0", "layers_1"):
        ranks |= {f"{block}_attention_qkv": 5, f"{block}_attention_out": 5, f"{block}_adaLN_modulation_1": 2}
        ranks |= {f"{block}_feed_forward_w{i}": 3 for i in (1, 2, 3)}
    for block in ("noise_refiner_0", "noise_refiner_1", "context_refiner_0", "context_refiner_1"):
        ranks |= {f"{block}_attention_{part}": 4 for part in ("qkv", "out")}
        ranks |= {f"{block}_feed_forward_w{i}": 4 for i in (1, 2, 3)}
        if block.startswith("noise"):
            ranks[f"{block}_adaLN_modulation_1"] = 4
    return ranks | {"final_layer_linear": 6, "final_layer_adaLN_modulation_1": 2}


def steps_of(config: Path, ledger: Path, steps: int, reg_weight: float = 1.0) -> Steps:
    """The pictures of each micro-batch of each step."""

    def sample(item: Item, draw: Draw) -> Sample:
        return Sample(
            load_pixels(item.path, item.geometry.bucket),
            item.path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0],
            *(draw.step, draw.micro, draw.slot),
            weight=reg_weight if item.subset.is_reg else 1.0,
            mask_HW=load_alpha(item.path),
        )

    return planned(config, ledger, sample, seed=RECIPE.seed, steps=steps, accumulation=ACCUMULATION)


@pytest.fixture(scope="module")
def steps(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return steps_of(config, tmp_path_factory.mktemp("ledger") / "hashes.json", STEPS)


@pytest.fixture(scope="module")
def expected(pipeline: Path, steps: Steps) -> tuple[list[float], list[float], State]:
    """Losses, gradient norms and the LoRA of the independent implementation."""
    lumina = Lumina(pipeline)
    return train_independently(lumina, steps, start_of_lora(lumina, expected_ranks(), RECIPE), RECIPE)


def test_the_run_has_what_could_hide_a_mistake(steps: Steps) -> None:
    batches = [batch for step in steps for batch in step]
    assert {len(batch) for batch in batches} == {1, 2} and {len(step) for step in steps} == {1, 3}
    assert {tuple(batch[0].pixels_3HW.shape[1:]) for batch in batches} == {(64, 64), (80, 48), (48, 80)}
    assert any(len({sample.caption for sample in batch}) == 2 for batch in batches)
    uses = Counter(sample.caption for step in steps[:2] for batch in step for sample in batch)
    assert len(uses) == 6 and set(uses.values()) == {1}


def test_the_loss_of_every_step(trained: Run, expected: tuple) -> None:
    losses, _, _ = expected
    assert len(trained.losses) == STEPS
    assert trained.losses == pytest.approx(losses, rel=1e-5)


def test_the_gradient_norm_of_every_step(trained: Run, expected: tuple) -> None:
    _, norms, _ = expected
    assert trained.norms == pytest.approx(norms, rel=1e-4)
    assert min(norms) < RECIPE.max_norm < max(norms), "some steps are clipped, some are not"


def test_the_trained_lora(trained: Run, expected: tuple, pipeline: Path) -> None:
    _, _, lora = expected
    assert trained.lora.keys() == lora.keys()
    start = start_of_lora(Lumina(pipeline), expected_ranks(), RECIPE)
    for key, theirs in lora.items():
        ours = trained.lora[key]
        if key.endswith(".alpha"):
            assert ours.item() == theirs.item()
            continue
        moved = (theirs - start[key]).norm()
        assert moved > 0.1 * theirs.norm()
        assert (ours - theirs).norm() < 1e-3 * moved, key


# --- what weighs the loss ---


def smooth_l1(difference: Tensor, sigma: Tensor) -> Tensor:
    """The reference tool's pseudo-Huber loss with a threshold of 0.2."""
    return 2 * ((difference**2 + 0.2**2) ** 0.5 - 0.2)


def cosmap(difference: Tensor, sigma: Tensor) -> Tensor:
    """Squared error, weighted for the cosine schedule: SD3 paper, section 3.1."""
    return difference**2 * 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


@pytest.mark.parametrize(
    ("error", "flags"),
    [
        (smooth_l1, {"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_c": 0.2}),
        (cosmap, {"weighting_scheme": "cosmap"}),
    ],
    ids=["smooth_l1", "cosmap"],
)
def test_masks_weights_and_other_losses(
    error: Callable[[Tensor, Tensor], Tensor],
    flags: dict[str, object],
    pipeline: Path,
    train: Callable[..., Run],
    tmp_path: Path,
) -> None:
    photos = write_photos(tmp_path / "photos", ("cat", "rocket", "sky"))
    add_alpha(photos / "rocket.png")
    reg = write_photos(tmp_path / "reg", ("dog", "woman"))
    config = write_config(
        tmp_path / "config.toml",
        photos,
        dataset="network_multiplier = 0.5",
        subset=f"alpha_mask = true\n[[datasets.subsets]]\nimage_dir = '{reg}'\nis_reg = true",
    )
    sigma = partial(shift_by_three, sigmoid_scale=0.8)
    recipe = replace(RECIPE, strength=0.5, sigma=sigma, error=error)
    shift = {"timestep_sampling": "shift", "discrete_flow_shift": 3.0, "sigmoid_scale": 0.8}
    given = pipeline_flags(pipeline) | recipe_flags() | shift | flags
    ours = train(given | {"dataset_config": config, "prior_loss_weight": 0.3, "max_train_steps": 2})
    steps = steps_of(config, tmp_path / "hashes.json", 2, reg_weight=0.3)
    lumina = Lumina(pipeline)
    start = start_of_lora(lumina, expected_ranks(), recipe)
    losses, norms, _ = train_independently(lumina, steps, start, recipe)
    samples = [sample for step in steps for batch in step for sample in batch]
    assert {sample.weight for sample in samples} == {1.0, 0.3} and any(s.mask_HW is not None for s in samples)
    assert ours.losses == pytest.approx(losses, rel=1e-5)
    assert ours.norms == pytest.approx(norms, rel=1e-4)
