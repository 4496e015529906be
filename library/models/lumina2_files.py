"""The three weight files of Lumina Image 2.0 together: each whole, and all of one family. No torch."""

from __future__ import annotations

from pathlib import Path

from library.core.errors import CheckpointError
from library.models import gemma2_format
from library.models.flux_vae_format import inspect_flux_vae
from library.models.gemma2_format import inspect_gemma2
from library.models.lumina2_format import (
    Lumina2Checkpoint,
    inspect_lumina2,
    parameter_shapes,
    quantisable_layers,
)
from library.models.quant_file import check_widths
from library.options.quant import QuantOptions


def check_models(dit: Path, gemma2: Path, ae: Path, quant: QuantOptions) -> Lumina2Checkpoint:
    """Read the headers of the three files; return what is found of the transformer.

    Raises:
        CheckpointError: a file that is missing, damaged or of another kind, or files that do not go together.
        ConfigError: the transformer's file is quantised in another way than is wanted, or a model has layers
            that cannot be.
    """
    found = inspect_lumina2(dit)
    found.quant.check(quant)
    transformer = found.params
    check_widths(quant.transformer, quantisable_layers(transformer), parameter_shapes(transformer), dit)
    encoder = inspect_gemma2(gemma2).params
    layers = gemma2_format.quantisable_layers(encoder)
    check_widths(quant.text_encoder_quant, layers, gemma2_format.parameter_shapes(encoder), gemma2)
    autoencoder = inspect_flux_vae(ae).params
    if transformer.cap_feat_dim != encoder.hidden:
        raise CheckpointError(
            f"{dit} was made for text features of width {transformer.cap_feat_dim}, but {gemma2} gives "
            f"{encoder.hidden}; name the text encoder that belongs to the model."
        )
    if transformer.in_channels != autoencoder.latent_channels:
        raise CheckpointError(
            f"{dit} was made for latents of {transformer.in_channels} channels, but {ae} gives "
            f"{autoencoder.latent_channels}; name the autoencoder that belongs to the model."
        )
    return found
