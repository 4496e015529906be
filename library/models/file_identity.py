"""What identifies weight files to caches and states: their content, and what was made of it. No torch.

A cache entry is found only under the identity it was made with, so trainers and cache tools both ask here.
"""

from __future__ import annotations

from library.core.checkpoint_files import Checkpoint
from library.core.hashing import HashLedger, sha256_text
from library.models.flux_vae_format import FluxVAECheckpoint

# Raise when the same weights begin to give other numbers.
_LATENTS_VERSION = 1


def content(checkpoint: Checkpoint, ledger: HashLedger) -> str:
    """Return the digests of a checkpoint's files; where they lie and what they are called does not count."""
    return " ".join(ledger.sha256(file) for file in checkpoint.files)


def latent_identity(autoencoder: FluxVAECheckpoint, precision: str, ledger: HashLedger) -> str:
    """Return the identity of scaled posterior means.

    `precision`: of the autoencoder, as --mixed_precision names it ("no" is fp32).
    """
    return sha256_text(
        f"flux autoencoder, posterior mean, {_LATENTS_VERSION}",
        content(autoencoder.checkpoint, ledger),
        repr(autoencoder.params),  # scale and shift may come from a config.json, or are the family's own
        precision,
    )
