"""Everything about a run that can be checked before torch is imported: folders, weight files, dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.files import require_writable_directory
from library.core.hashing import HashLedger
from library.core.log import setup_logging
from library.data.cache_keys import check_latents_cacheable
from library.data.items import Manifest
from library.data.prompts import load_sample_prompts
from library.data.scan import scan
from library.data.schema import load_datasets
from library.options.request import ImageRequest
from library.training.family import ModelFiles
from networks.module import check_network

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer


@dataclass(frozen=True)
class Prepared:
    """A checked run: its dataset, its weight files, and the ledger of file digests."""

    manifest: Manifest
    files: ModelFiles
    ledger: HashLedger


def prepare(trainer: NetworkTrainer) -> Prepared:
    """Check a run's folders, datasets and weight files, cheapest first.

    Raises UserError for what is wrong.
    """
    options = trainer.options
    setup_logging(options.logging.console_log_level)
    require_writable_directory(options.saving.output_dir, "--output_dir")
    check_network(options.network)
    trainer.check_files()
    datasets = load_datasets(options.dataset, stride=trainer.family.pixel_stride)
    if options.caching.latents:
        check_latents_cacheable(datasets)
    ledger = HashLedger()
    manifest = scan(datasets, skip_bad_images=options.dataset.skip_bad_images, ledger=ledger)
    files = trainer.model_files(ledger)
    if options.sampling.sample_prompts is not None:
        load_sample_prompts(options.sampling.sample_prompts, ImageRequest(seed=0))
    ledger.save()
    return Prepared(manifest, files, ledger)
