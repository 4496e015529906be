"""What latents and text features of Lumina Image 2.0 depend on besides the picture or text. No torch."""

from __future__ import annotations

from library.core.hashing import HashLedger, sha256_text
from library.models import file_identity
from library.models.file_identity import content
from library.models.flux_vae_format import inspect_flux_vae
from library.models.gemma2_format import inspect_gemma2
from library.models.gemma2_tokenizer import find_tokenizer
from library.models.lumina2_format import inspect_lumina2
from library.options.model import AutoencoderOptions, LuminaModelOptions, TextEncoderOptions

# Raise when the same weights begin to give other numbers.
_TEXTS_VERSION = 1


def autoencoder_precision(options: AutoencoderOptions, mixed_precision: str) -> str:
    """Return the precision that the autoencoder runs in, as --mixed_precision names it ("no" is fp32)."""
    return "no" if options.no_half_vae else mixed_precision


def latent_identity(options: AutoencoderOptions, mixed_precision: str, ledger: HashLedger) -> str:
    """Return the identity of scaled posterior means.

    Raises:
        CheckpointError: the file cannot be read, or is not a FLUX autoencoder.
    """
    return file_identity.latent_identity(
        inspect_flux_vae(options.ae), autoencoder_precision(options, mixed_precision), ledger
    )


def text_identity(
    options: TextEncoderOptions,
    mixed_precision: str,
    ledger: HashLedger,
    *,
    merged: str = "",
    quant: str | None = None,
) -> str:
    """Return the identity of Gemma2's features.

    `merged` tells what is merged into its weights, nothing if empty; `quant` how they are quantised. The
    system prompt is not part of it: an entry's key has the whole text as it is encoded.

    Raises:
        CheckpointError: the file cannot be read, or is not a Gemma2.
        ConfigError: no tokenizer is found.
    """
    found = inspect_gemma2(options.gemma2)
    tokenizer = find_tokenizer(options.gemma2, options.gemma2_tokenizer, options.tokenizer_cache_dir)
    return sha256_text(
        f"gemma2, hidden states before the last layer, {_TEXTS_VERSION}",
        content(found.checkpoint, ledger),
        repr(found.params),  # constants may come from a config.json
        tokenizer.digest,
        str(options.gemma2_max_token_length),
        mixed_precision,
        *([merged] if merged else []),
        *([f"in {quant}"] if quant else []),
    )


def file_digests(options: LuminaModelOptions, ledger: HashLedger) -> dict[str, str]:
    """Return digests of the content of the weight files and the tokenizer, by flag.

    Raises:
        CheckpointError: a file cannot be read, or is of another kind. ConfigError: no tokenizer is found.
    """
    found = {
        "pretrained_model_name_or_path": inspect_lumina2(options.pretrained_model_name_or_path),
        "gemma2": inspect_gemma2(options.gemma2),
        "ae": inspect_flux_vae(options.ae),
    }
    digests = {flag: sha256_text(content(part.checkpoint, ledger)) for flag, part in found.items()}
    tokenizer = find_tokenizer(options.gemma2, options.gemma2_tokenizer, options.tokenizer_cache_dir)
    return digests | {"gemma2_tokenizer": tokenizer.digest}
