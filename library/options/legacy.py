"""Flags of sd-scripts that mean nothing to a flow-matching transformer, or cannot be used yet: each says why.

They are declared so that a command line which was written for sd-scripts, or a file that kohya_ss wrote, is
answered with a reason and a way out, and never with silence. `refused` are those without which something else
would be trained than they ask for; `inert` are those that ask for nothing but speed, memory or a wrapper that
is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options.elsewhere import SIMPLETUNER
from library.options.group import OptionGroup, inert, refused

_LEAVE_OUT = "leave it out"
_NO_SNR = (
    "it weighs the loss of models that predict noise by their signal-to-noise ratio, and a flow-matching "
    "model predicts a velocity; --weighting_scheme and --timestep_sampling do that job here"
)
_NO_DDP = (
    "the model is not wrapped in DistributedDataParallel; gradients are summed over the processes after the "
    "last batch of a step"
)
_NOISE_TYPE = "it says which of --noise_offset and --multires_noise_iterations kohya_ss shows"
_NOISE_TYPES = ("Original", "Multires")


@dataclass(frozen=True, kw_only=True)
class LegacyOptions(OptionGroup):
    """Flags of sd-scripts that cannot be used, or have no effect.

    A command line that has one of them is told the reason, and where it matters what to use instead;
    docs/flags.md has the list.
    """

    elsewhere = SIMPLETUNER

    v2: bool = refused(f"it tells versions of Stable Diffusion apart; {_LEAVE_OUT}", default=False)
    v_parameterization: bool = refused(
        "it is for Stable Diffusion models that predict v; a flow-matching model always predicts its "
        f"velocity; {_LEAVE_OUT}",
        default=False,
    )

    min_snr_gamma: float | None = refused(_NO_SNR, harmless=(0,))
    scale_v_pred_loss_like_noise_pred: bool = refused(_NO_SNR, default=False)
    v_pred_like_loss: float | None = refused(_NO_SNR, harmless=(0,))
    debiased_estimation_loss: bool = refused(_NO_SNR, default=False)
    zero_terminal_snr: bool = refused(
        "it mends the noise schedule of Stable Diffusion; the path of flow matching ends in pure noise "
        f"anyway; {_LEAVE_OUT}",
        default=False,
    )

    dataset_class: str | None = refused(
        "batches are planned ahead so that a run can be repeated and resumed exactly, which a foreign class "
        "cannot do; describe the data with --dataset_config",
        harmless=("",),
    )
    noise_offset_type: str | None = refused(
        f"{_NOISE_TYPE}, and these are Original and Multires; {_LEAVE_OUT}", harmless=_NOISE_TYPES
    )
    epoch: int | None = inert(
        "kohya_ss counts steps with it; --max_train_epochs and --max_train_steps decide"
    )
    ddp_gradient_as_bucket_view: bool = inert(_NO_DDP, default=False)
    ddp_static_graph: bool = inert(_NO_DDP, default=False)

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that has no effect."""
        yield from super().adjustments()
        yield from self.without_effect(("noise_offset_type",), f"{_NOISE_TYPE}; those decide")


@dataclass(frozen=True, kw_only=True)
class LuminaLegacyOptions(LegacyOptions):
    """Flags of sd-scripts that cannot be used, or have no effect.

    A command line that has one of them is told the reason, and where it matters what to use instead;
    docs/flags.md has the list.
    """

    vae: str | None = refused("Lumina's autoencoder is named with --ae; use that", harmless=("",))
    clip_skip: int | None = refused(
        "it chooses a layer of CLIP, and the text is read by Gemma2, whose last layer but one is used as in "
        f"Lumina's own training; {_LEAVE_OUT}",
        harmless=(1,),
    )
    max_token_length: int | None = refused(
        "it is CLIP's limit, and the text is read by Gemma2; set --gemma2_max_token_length", harmless=(75,)
    )
    weighted_captions: bool = refused(
        f"(word:1.3) weights scale CLIP's features; Gemma2 reads the brackets as text; {_LEAVE_OUT}",
        default=False,
    )


@dataclass(frozen=True, kw_only=True)
class Kandinsky5LegacyOptions(LegacyOptions):
    """Flags of sd-scripts that cannot be used, or have no effect."""

    clip_skip: int | None = refused(
        f"of CLIP the model takes the pooled output, which comes from its last layer; {_LEAVE_OUT}",
        harmless=(1,),
    )
    max_token_length: int | None = refused(
        "it is CLIP's limit, and captions are read by Qwen; set --qwen_max_token_length", harmless=(75,)
    )
    weighted_captions: bool = refused(
        f"(word:1.3) weights scale CLIP's features; Qwen reads the brackets as text; {_LEAVE_OUT}",
        default=False,
    )
