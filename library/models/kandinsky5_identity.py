"""What latents and text features of Kandinsky 5.0 Image depend on besides the picture or text. No torch."""

from __future__ import annotations

from library.core.hashing import HashLedger, sha256_text
from library.models.clip_text_format import inspect_clip_text
from library.models.file_identity import content
from library.models.kandinsky5_files import (
    find_tokenizers,
    inspect_autoencoder,
    inspect_transformer,
)
from library.models.qwen2_5_vl_format import inspect_qwen2_5_vl
from library.options.kandinsky5 import Kandinsky5EncoderOptions, Kandinsky5ModelOptions

# Raise when the same weights begin to give other numbers.
_TEXTS_VERSION = 1


def text_identity(
    options: Kandinsky5EncoderOptions,
    mixed_precision: str,
    ledger: HashLedger,
    *,
    vision: bool,
    quant: str | None = None,
) -> str:
    """Return the identity of Qwen's features and CLIP's pooled output.

    `vision`: whether Qwen looks at pictures. `quant` tells how its weights are quantised. Streaming is not
    part of it: it changes no number. The source picture is part of an entry's key.

    Raises:
        CheckpointError: a file cannot be read, or is of another kind. ConfigError: no tokenizer is found.
    """
    qwen = inspect_qwen2_5_vl(options.text_encoder_qwen, vision=vision)
    clip = inspect_clip_text(options.text_encoder_clip)
    return sha256_text(
        f"kandinsky 5, qwen2.5-vl after the last norm and clip pooled, {_TEXTS_VERSION}",
        content(qwen.checkpoint, ledger),
        repr(qwen.params),  # constants may come from a config.json
        content(clip.checkpoint, ledger),
        repr(clip.params),
        *(found.digest for found in find_tokenizers(options)),
        str(options.qwen_max_token_length),
        options.edit_prompt_crop,
        mixed_precision,
        *([f"in {quant}"] if quant else []),
    )


def file_digests(options: Kandinsky5ModelOptions, ledger: HashLedger) -> dict[str, str]:
    """Return digests of the content of the weight files and the tokenizers, by flag.

    Raises:
        CheckpointError: a file cannot be read, or is of another kind. ConfigError: no tokenizer is found.
    """
    transformer = inspect_transformer(options.pretrained_model_name_or_path, options.task)
    checkpoints = {
        "pretrained_model_name_or_path": transformer.checkpoint,
        "text_encoder_qwen": inspect_qwen2_5_vl(options.text_encoder_qwen, vision=False).checkpoint,
        "text_encoder_clip": inspect_clip_text(options.text_encoder_clip).checkpoint,
        "vae": inspect_autoencoder(options.vae).checkpoint,
    }
    digests = {flag: sha256_text(content(part, ledger)) for flag, part in checkpoints.items()}
    qwen, clip = find_tokenizers(options)
    return digests | {"qwen_tokenizer": qwen.digest, "clip_tokenizer": clip.digest}
