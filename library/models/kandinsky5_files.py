"""The weight files of Kandinsky 5.0 Image together: each whole, and all of one family. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from library.core.errors import CheckpointError, ConfigError
from library.models import kandinsky5_format, qwen2_5_vl_format
from library.models.clip_text_format import ClipTextCheckpoint, inspect_clip_text
from library.models.clip_tokenizer import ClipTokenizerFiles, find_clip_tokenizer
from library.models.flux_vae_format import FluxVAECheckpoint, inspect_flux_vae
from library.models.kandinsky5_format import Kandinsky5Checkpoint, inspect_kandinsky5
from library.models.kandinsky5_prompt import Kandinsky5Tokenizers
from library.models.quant_file import check_widths
from library.models.qwen2_5_vl_format import Qwen2_5_VLCheckpoint, inspect_qwen2_5_vl
from library.models.qwen_tokenizer import QwenTokenizerFiles, find_qwen_tokenizer
from library.options.kandinsky5 import I2I, T2I, Kandinsky5EncoderOptions, task_named
from library.options.quant import QuantOptions

# Kandinsky scales FLUX's latents as FLUX does, but never shifts them (official code: `sample() * 0.3611`).
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.0


def inspect_autoencoder(path: Path) -> FluxVAECheckpoint:
    """Read the headers of FLUX's autoencoder; scale and shift are Kandinsky's, whatever a config.json says.

    Raises:
        CheckpointError: as `inspect_flux_vae` does.
    """
    found = inspect_flux_vae(path)
    return replace(found, params=replace(found.params, scale=LATENT_SCALE, shift=LATENT_SHIFT))


def inspect_transformer(path: Path, task: str) -> Kandinsky5Checkpoint:
    """Read the headers of the DiT, and check that it is for the task that `--task` names.

    Raises:
        CheckpointError: as `inspect_kandinsky5` does. ConfigError: the file is for the other task.
    """
    found = inspect_kandinsky5(path)
    wanted = task_named(task)
    if wanted not in (None, found.params.task):
        what = {T2I: "draws from text (t2i)", I2I: "edits pictures (i2i)"}[found.params.task]
        raise ConfigError(f"--task is {task}, but {path} {what}; name another file, or leave --task out.")
    return found


def inspect_encoders(
    qwen: Path, clip: Path, transformer: Kandinsky5Checkpoint
) -> tuple[Qwen2_5_VLCheckpoint, ClipTextCheckpoint]:
    """Read the headers of both text encoders; Qwen's eyes are wanted only where pictures are edited.

    Raises:
        CheckpointError: a file that is missing, damaged or of another kind, or one that does not go with the
            transformer.
    """
    found_qwen = inspect_qwen2_5_vl(qwen, vision=transformer.params.task == I2I)
    found_clip = inspect_clip_text(clip)
    wanted, path = transformer.params, transformer.checkpoint.path
    _require_width(path, "text features", wanted.text_dim, qwen, found_qwen.params.hidden)
    _require_width(path, "pooled text features", wanted.pooled_dim, clip, found_clip.params.hidden)
    return found_qwen, found_clip


def check_models(
    dit: Path, qwen: Path, clip: Path, vae: Path, *, task: str, quant: QuantOptions
) -> Kandinsky5Checkpoint:
    """Read the headers of the four files; return what is found of the transformer.

    Raises:
        CheckpointError: a file that is missing, damaged or of another kind, or files that do not go together.
        ConfigError: the transformer is for another task, or quantised in another way than is wanted, or a
            model has layers that cannot be.
    """
    found = inspect_transformer(dit, task)
    found.quant.check(quant)
    layers = kandinsky5_format.quantisable_layers(found.params)
    check_widths(quant.transformer, layers, kandinsky5_format.parameter_shapes(found.params), dit)
    encoder = inspect_encoders(qwen, clip, found)[0].params
    layers = qwen2_5_vl_format.quantisable_layers(encoder)
    check_widths(quant.text_encoder_quant, layers, qwen2_5_vl_format.parameter_shapes(encoder), qwen)
    autoencoder = inspect_autoencoder(vae).params
    if found.params.latent_channels != autoencoder.latent_channels:
        raise CheckpointError(
            f"{dit} was made for latents of {found.params.latent_channels} channels, but {vae} gives "
            f"{autoencoder.latent_channels}; name the autoencoder that belongs to the model."
        )
    return found


def find_tokenizers(options: Kandinsky5EncoderOptions) -> tuple[QwenTokenizerFiles, ClipTokenizerFiles]:
    """Return where the tokenizers of Qwen and of CLIP are.

    Raises:
        ConfigError: one of them is not found.
    """
    cache = options.tokenizer_cache_dir
    return (
        find_qwen_tokenizer(options.text_encoder_qwen, options.qwen_tokenizer, cache),
        find_clip_tokenizer(options.text_encoder_clip, options.clip_tokenizer, cache),
    )


def build_tokenizers(options: Kandinsky5EncoderOptions) -> Kandinsky5Tokenizers:
    """Build both tokenizers. Raises ConfigError or CheckpointError for one that cannot be had."""
    qwen, clip = find_tokenizers(options)
    return Kandinsky5Tokenizers(qwen.build(), clip.build())


def _require_width(dit: Path, what: str, wanted: int, encoder: Path, found: int) -> None:
    if wanted != found:
        raise CheckpointError(
            f"{dit} was made for {what} of width {wanted}, but {encoder} gives {found}; name the text "
            f"encoder that belongs to the model."
        )
