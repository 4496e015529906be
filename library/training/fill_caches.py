"""Filling the caches on disk ahead of training, for the tools. Torch is imported once all is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.core.hashing import HashLedger
from library.core.launch import complete_launch
from library.core.log import logger
from library.core.versions import require_torch
from library.data.items import Manifest
from library.data.scan import scan, without_sources
from library.training.family import CacheIdentities
from library.training.prepare import described_datasets

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

_log = logger("caching")


def fill_caches(trainer: NetworkTrainer, *, latents: bool = False, texts: bool = False) -> None:
    """Encode what a training run with these options would, as far as the caches do not have it.

    The options must ask for the caches that are filled, on disk. Of the others only those are read that
    decide about the entries. Raises UserError for what is wrong with them, or with a file.
    """
    require_torch()
    complete_launch()
    options = trainer.options
    options.logging.set_up()
    if texts:
        options.trainee.check_caches(options.caching)
    notes: list[str] = []
    datasets, ledger = described_datasets(trainer, notes.append), HashLedger()
    try:
        identities = CacheIdentities(
            trainer.latent_identity(ledger) if latents else None,
            trainer.text_identity(ledger) if texts else None,
        )
        manifest = scan(datasets, skip_bad_images=options.dataset.skip_bad_images, ledger=ledger)
    finally:
        ledger.save()  # a bad picture is no reason to read large files again at the next start
    notes += without_sources(manifest) if trainer.edits_pictures() else ()
    _encode(trainer, manifest, identities, notes)


def _encode(
    trainer: NetworkTrainer, manifest: Manifest, identities: CacheIdentities, notes: Sequence[str]
) -> None:
    from library.core.device import dtype_named
    from library.core.dist import Processes
    from library.training.guards import caching_advice, memory_explained
    from library.training.inputs import Inputs

    options = trainer.options
    processes = Processes.start(options.training.ddp_timeout)
    options.logging.set_up(is_main=processes.is_main)
    for sentence in manifest.skipped:
        _log.warning("left out: %s", sentence)
    for sentence in manifest.warnings:
        _log.warning("%s", sentence)
    for sentence in (*options.adjustments(), *manifest.notes, *notes):
        _log.info("%s", sentence)
    inputs = Inputs(trainer, identities, processes, dtype_named(options.training.mixed_precision))
    advice = caching_advice(options)
    with processes.tied(), memory_explained("encoding the dataset", processes.device, advice):
        inputs.fill_caches(manifest)
