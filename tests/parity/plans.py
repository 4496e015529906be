"""Which pictures a step is made of: the order in which they come is ours to define."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from library.core.hashing import HashLedger
from library.data.items import Draw, Item
from library.data.plan import Plan
from library.data.scan import scan
from library.data.schema import load_datasets
from library.options.dataset import DatasetOptions
from tests.parity.independent import Sample

Steps = list[list[list[Sample]]]  # the pictures of each micro-batch of each step


def planned(
    config: Path,
    ledger: Path,
    sample: Callable[[Item, Draw], Sample],
    *,
    seed: int,
    steps: int,
    accumulation: int,
    edits: bool = False,
) -> Steps:
    """Plan the steps of a run. `sample` makes a picture of a draw; `edits`: the model edits pictures."""
    datasets = load_datasets(DatasetOptions(dataset_config=config), stride=16, edits=edits)
    manifest = scan(datasets, skip_bad_images=False, ledger=HashLedger(ledger))
    plan = Plan(manifest, seed=seed, accumulation=accumulation)
    return [
        [[sample(manifest.items[draw.item], draw) for draw in batch.draws] for batch in plan.step(step)]
        for step in range(steps)
    ]
