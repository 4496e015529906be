"""Encode the pictures of a dataset ahead of training.

    python tools/cache_latents.py --ae ae.safetensors --dataset_config my_dataset.toml --mixed_precision bf16

Training with --cache_latents or --cache_latents_to_disk finds every entry, provided that it is given the same
dataset and the same --ae, --mixed_precision, --no_half_vae, --cache_dtype and --cache_directory. With several
GPUs, start it with `accelerate launch`: the processes share the work out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.entry import run_script  # noqa: E402
from library.core.hashing import HashLedger  # noqa: E402
from library.core.log import setup_logging  # noqa: E402
from library.data.cache_keys import check_latents_cacheable  # noqa: E402
from library.data.items import Manifest  # noqa: E402
from library.data.scan import scan  # noqa: E402
from library.data.schema import load_datasets  # noqa: E402
from library.models.lumina2_identity import autoencoder_precision, latent_identity  # noqa: E402
from library.options.caching import LatentPassOptions  # noqa: E402
from library.options.dataset import DatasetOptions  # noqa: E402
from library.options.group import parse_options  # noqa: E402
from library.options.model import AutoencoderOptions  # noqa: E402
from library.options.training import PrecisionOptions  # noqa: E402
from lumina_train_network import LUMINA2  # noqa: E402


@dataclass(frozen=True)
class Options:
    """The options of this tool."""

    model: AutoencoderOptions
    precision: PrecisionOptions
    dataset: DatasetOptions
    caching: LatentPassOptions


def main() -> None:
    """Check everything that can be checked cheaply, then encode what is missing."""
    options = parse_options(Options, description=__doc__.partition("\n")[0])
    setup_logging("INFO")
    ledger = HashLedger()
    identity = latent_identity(options.model, options.precision.mixed_precision, ledger)
    datasets = load_datasets(options.dataset, stride=LUMINA2.pixel_stride)
    check_latents_cacheable(datasets)
    manifest = scan(datasets, skip_bad_images=options.dataset.skip_bad_images, ledger=ledger)
    ledger.save()
    fill(options, manifest, identity)


def fill(options: Options, manifest: Manifest, identity: str) -> None:
    """Run the pass; torch is imported here."""
    from library.core.device import dtype_named
    from library.core.dist import Processes
    from library.data.sources import CachePlace, LatentSource
    from library.training.caching import PassRun, cache_latents

    processes = Processes.start()
    setup_logging("INFO", is_main=processes.is_main)

    def load_encoder():
        from library.models.flux_vae import load_flux_vae

        precision = autoencoder_precision(options.model, options.precision.mixed_precision)
        return load_flux_vae(
            options.model.ae, device=processes.device, dtype=dtype_named(precision)
        ).encode_mean

    place = CachePlace(True, options.caching.cache_directory, options.caching.cache_dtype)
    run = PassRun(
        options.caching.vae_batch_size,
        processes.rank,
        processes.world,
        processes.barrier,
        device=processes.device,
    )
    cache_latents(LatentSource(place, identity), manifest.items, load_encoder, run)


if __name__ == "__main__":
    run_script(main)
