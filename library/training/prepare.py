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
from library.training.output.hub import check_uploads, fetch_state
from library.training.state.checkpoint import SavedState, find_resumed
from library.training.state.identity import check_resumed, dataset_digest, settings_of
from library.training.watch.trackers import check_trackers
from networks.module import check_network

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer


@dataclass(frozen=True)
class Prepared:
    """A checked run: its dataset, its weight files, and the ledger of file digests.

    resumed: the state to go on from. changes: a sentence for each setting that is not what it was there.
    """

    manifest: Manifest
    files: ModelFiles
    ledger: HashLedger
    resumed: SavedState | None = None
    changes: tuple[str, ...] = ()


def prepare(trainer: NetworkTrainer) -> Prepared:
    """Check a run's folders, datasets and weight files, cheapest first.

    Raises UserError for what is wrong.
    """
    options = trainer.options
    logging = options.logging
    setup_logging(logging.console_log_level, file=logging.console_log_file, simple=logging.console_log_simple)
    require_writable_directory(options.saving.output_dir, "--output_dir")
    check_trackers(options.logging)
    check_uploads(options.hub, options.state)
    options.ema.check_samples(options.sampling)
    check_network(options.network)
    options.network.check_caches(options.caching)
    trainer.check_files()
    resumed = find_resumed(fetch_state(options.hub, options.state), options.saving)
    datasets = load_datasets(options.dataset, stride=trainer.family.pixel_stride)
    if options.caching.latents:
        check_latents_cacheable(datasets)
    ledger = HashLedger()
    manifest = scan(datasets, skip_bad_images=options.dataset.skip_bad_images, ledger=ledger)
    files = trainer.model_files(ledger)
    if options.sampling.sample_prompts is not None:
        load_sample_prompts(options.sampling.sample_prompts, ImageRequest(seed=0))
    ledger.save()
    changes: list[str] = []
    if resumed is not None:
        settings = settings_of(options, files.described, manifest)
        changes = check_resumed(resumed, settings, options.training.seed, dataset_digest(manifest))
    return Prepared(manifest, files, ledger, resumed, tuple(changes))
