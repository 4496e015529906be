"""Everything about a run that can be checked before torch is imported: folders, weight files, dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.files import require_name_fits, require_writable_directory
from library.core.hashing import HashLedger
from library.core.launch import compiler_wishes
from library.data.cache_keys import check_latents_cacheable, check_texts_cacheable
from library.data.items import Dataset, Manifest
from library.data.prompt_files import load_sample_prompts, sources_of
from library.data.scan import scan, without_sources
from library.data.schema import load_datasets
from library.options.request import ImageRequest
from library.options.saving import SavingOptions
from library.training.family import CacheIdentities, ModelFiles
from library.training.output.hub import check_uploads, fetch_state
from library.training.state.checkpoint import SavedState, check_state_folders, find_resumed
from library.training.state.identity import check_resumed, dataset_digest, settings_of, warnings_of_changes
from library.training.watch.trackers import check_trackers

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer


@dataclass(frozen=True)
class Prepared:
    """A checked run: its dataset, its weight files and what caches know of them, and the ledger of digests.

    settings: what a state records of the run. resumed: the state to go on from. changes: a sentence for each
    setting that is not what it was there. adjustments: a sentence for each flag or option of a prompt that
    has no effect. warnings: what is wrong more likely than meant.
    """

    manifest: Manifest
    files: ModelFiles
    identities: CacheIdentities
    ledger: HashLedger
    settings: Mapping[str, object]
    resumed: SavedState | None = None
    changes: tuple[str, ...] = ()
    adjustments: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def prepare(trainer: NetworkTrainer) -> Prepared:
    """Check a run's folders, datasets and weight files, cheapest first.

    Raises UserError for what is wrong.
    """
    options = trainer.options
    options.logging.set_up()
    require_writable_directory(options.saving.output_dir, "--output_dir")
    require_name_fits(options.saving.output_dir, _longest_name(options.saving), "--output_name")
    check_state_folders(options.state, options.saving)
    check_trackers(options.logging)
    check_uploads(options.hub, options.state)
    options.ema.check_samples(options.sampling)
    trainer.trainee_kind.check(options)
    if options.swap.count:
        options.compute.check_swapping()
    if options.budget.plan_memory:
        options.compute.check_measuring()
    options.trainee.check_caches(options.caching)
    _check_model(trainer)
    resumed = find_resumed(fetch_state(options.hub, options.state), options.saving)
    adjustments = list(options.adjustments())
    datasets, edits = described_datasets(trainer, adjustments.append), trainer.edits_pictures()
    ledger = HashLedger()
    manifest = scan(datasets, skip_bad_images=options.dataset.skip_bad_images, ledger=ledger)
    trainer.trainee_kind.check_data(manifest)
    if trainer.token_budget is not None:
        trainer.token_budget.check(manifest)
    files = trainer.model_files(ledger)
    identities = CacheIdentities(
        trainer.latent_identity(ledger) if options.caching.latents else None,
        trainer.text_identity(ledger) if options.caching.texts else None,
    )
    if options.training.only_looks and options.budget.plan_memory:
        adjustments.append("--plan_memory has no effect: --dry_run and --debug_dataset only look")
    adjustments += compiler_wishes(os.environ, compiles=options.compute.compiles)
    if not manifest.validation:
        adjustments += options.validation.without_pictures()
    samples = []
    if options.sampling.prompts is not None:
        samples = load_sample_prompts(options.sampling.prompts, ImageRequest(seed=0), adjustments.append)
        sources_of(samples, edits=edits)
    adjustments += trainer.check_data(manifest, samples)
    if edits:
        adjustments += without_sources(manifest)
    settings = settings_of(options, files, manifest, ledger)
    ledger.save()
    changes: list[str] = []
    warnings: list[str] = []
    if resumed is not None:
        if options.budget.vram_budget is not None and options.quant.transformer is None:
            settings["base_quant"] = resumed.record.settings.get("base_quant")  # goes on as it was planned
        changes = check_resumed(
            *(resumed, settings, options.training.seed, dataset_digest(manifest)),
            new_start=options.trainee.new_start,
            stays=options.trainee.stays,
        )
        warnings = warnings_of_changes(resumed, settings)
    told = (tuple(changes), tuple(adjustments), tuple(warnings))
    return Prepared(manifest, files, identities, ledger, settings, resumed, *told)


def described_datasets(trainer: NetworkTrainer, tell: Callable[[str], None]) -> tuple[Dataset, ...]:
    """Return the datasets as they are described; no picture is looked for.

    `tell` is given a sentence for what is done otherwise than it is written. Raises ConfigError for a
    mistake, or for what would change from epoch to epoch and is to be cached.
    """
    options, edits = trainer.options, trainer.edits_pictures()
    datasets = load_datasets(options.dataset, stride=trainer.family.pixel_stride, edits=edits, tell=tell)
    if options.caching.latents:
        check_latents_cacheable(datasets)
    if options.caching.texts:
        check_texts_cacheable(datasets)
    return datasets


def _check_model(trainer: NetworkTrainer) -> None:
    """Check the weight files, and that what is asked of the DiT can be done with it."""
    model = trainer.check_files()
    trainer.trainee_kind.check_model(trainer, model.found, model.layers)
    trainer.options.swap.check(model.blocks)
    trainer.options.tread.check(model.routed)


def _longest_name(saving: SavingOptions) -> str:
    """Return a name as long as the longest that files of a run have, which are sample pictures."""
    return f"{saving.output_name}-base_e000001_00_{os.getpid():014d}_2147483647-000.png"
