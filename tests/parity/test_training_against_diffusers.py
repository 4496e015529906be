"""lumina_train_network.py against training written anew from the documents, number for number.

The checkpoints were written by diffusers and transformers, and the other side of the comparison computes with them.
The run has everything that could hide a mistake: several buckets, pictures that are resized and turned, captions of
different lengths in a batch, a last micro-batch and a last step that are smaller, more than one epoch, LoRAs of
different ranks on every kind of layer, LoRA+.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from library.core.hashing import HashLedger
from library.data.plan import Plan
from library.data.scan import scan
from library.data.schema import load_datasets
from library.options.dataset import DatasetOptions
from tests.parity.independent import Lumina, Sample, State, load_pixels, start_of_lora, train
from tests.parity.runs import ACCUMULATION, RECIPE, STEPS, Run

Steps = list[list[list[Sample]]]


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


def planned(config: Path, ledger: Path) -> Steps:
    """The pictures of each micro-batch of each step, in the order that is ours to define."""
    datasets = load_datasets(DatasetOptions(dataset_config=config), stride=16)
    manifest = scan(datasets, skip_bad_images=False, ledger=HashLedger(ledger))
    plan = Plan(manifest, seed=RECIPE.seed, accumulation=ACCUMULATION)

    def sample(draw) -> Sample:
        item = manifest.items[draw.item]
        caption = item.path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0]
        return Sample(load_pixels(item.path, item.geometry.bucket), caption, draw.step, draw.micro, draw.slot)

    return [[[sample(draw) for draw in batch.draws] for batch in plan.step(step)] for step in range(STEPS)]


@pytest.fixture(scope="module")
def steps(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return planned(config, tmp_path_factory.mktemp("ledger") / "hashes.json")


@pytest.fixture(scope="module")
def expected(pipeline: Path, steps: Steps) -> tuple[list[float], list[float], State]:
    """Losses, gradient norms and the LoRA of the independent implementation."""
    lumina = Lumina(pipeline)
    return train(lumina, steps, start_of_lora(lumina.dit, expected_ranks(), RECIPE), RECIPE)


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
    assert min(norms) > RECIPE.max_norm, "clipping must have something to do"


def test_the_trained_lora(trained: Run, expected: tuple, pipeline: Path) -> None:
    _, _, lora = expected
    assert trained.lora.keys() == lora.keys()
    start = start_of_lora(Lumina(pipeline).dit, expected_ranks(), RECIPE)
    for key, theirs in lora.items():
        ours = trained.lora[key]
        if key.endswith(".alpha"):
            assert ours.item() == theirs.item()
            continue
        moved = (theirs - start[key]).norm()
        assert moved > 0.01 * theirs.norm()
        assert (ours - theirs).norm() < 1e-3 * moved, key
