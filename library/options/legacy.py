"""Flags of sd-scripts that cannot be used with a flow-matching transformer, or not yet: each says why.

They are declared so that a command line which was written for sd-scripts is answered with a reason and a way
out, and never with silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from library.options.group import OptionGroup, refused

_LEAVE_OUT = "leave it out"
_NO_SNR = (
    "it weighs the loss of models that predict noise by their signal-to-noise ratio, and a flow-matching "
    "model predicts a velocity; --weighting_scheme and --timestep_sampling do that job here"
)
_NO_FP8 = (
    "keeping the base model in 8 bits is not built yet; bf16 (--mixed_precision bf16) with "
    "--gradient_checkpointing and cached text outputs is what needs least memory"
)
_NO_COMPILE = f"compiling the model is not built yet; {_LEAVE_OUT}"
_NO_DDP = (
    "the model is not wrapped in DistributedDataParallel: the few gradients of the network are summed after "
    f"each step; {_LEAVE_OUT}"
)
_NO_DEEPSPEED = (
    "DeepSpeed is not used: it shards optimizer states, and those of a LoRA are small; leave it out and "
    "start several processes with `accelerate launch --num_processes N`"
)


@dataclass(frozen=True, kw_only=True)
class LegacyOptions(OptionGroup):
    """Flags of sd-scripts that cannot be used.

    A command line that has one of them is answered with the reason and with what to use instead;
    docs/flags.md has the list.
    """

    v2: bool = refused(f"it tells versions of Stable Diffusion apart; {_LEAVE_OUT}", default=False)
    v_parameterization: bool = refused(
        "it is for Stable Diffusion models that predict v; a flow-matching model always predicts its "
        f"velocity; {_LEAVE_OUT}",
        default=False,
    )
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

    min_snr_gamma: float | None = refused(_NO_SNR, harmless=(0,))
    scale_v_pred_loss_like_noise_pred: bool = refused(_NO_SNR, default=False)
    v_pred_like_loss: float | None = refused(_NO_SNR, harmless=(0,))
    debiased_estimation_loss: bool = refused(_NO_SNR, default=False)
    zero_terminal_snr: bool = refused(
        "it mends the noise schedule of Stable Diffusion; the path of flow matching ends in pure noise "
        f"anyway; {_LEAVE_OUT}",
        default=False,
    )

    use_sage_attn: bool = refused(
        "SageAttention has no backward pass, so nothing could be trained through it; use --use_flash_attn",
        default=False,
    )
    xformers: bool = refused(
        "xFormers is not used; torch's own attention has kernels of the same kind and is chosen without a "
        "flag (--sdpa insists on it); --use_flash_attn takes the flash-attn package",
        default=False,
    )
    mem_eff_attn: bool = refused(
        f"attention never builds the full table of scores here, so memory is saved already; {_LEAVE_OUT}, or "
        "use --use_flash_attn",
        default=False,
    )
    torch_compile: bool = refused(_NO_COMPILE, default=False)
    dynamo_backend: str = refused(_NO_COMPILE, default="inductor", harmless=("no", "NO"))
    blocks_to_swap: int | None = refused(
        "moving blocks between CPU and GPU is not built yet; --gradient_checkpointing, "
        "--cache_latents_to_disk and --cache_text_encoder_outputs_to_disk save memory",
        harmless=(0,),
    )
    fp8_base: bool = refused(_NO_FP8, default=False)
    fp8_base_unet: bool = refused(_NO_FP8, default=False)
    full_fp16: bool = refused(
        "fp16 cannot hold the updates of a network, which then stops learning or becomes NaN; --full_bf16 "
        "does that in bf16, and saves a few megabytes",
        default=False,
    )
    fused_backward_pass: bool = refused(
        f"it updates weights while gradients are still computed, to save the memory of a whole model's "
        f"gradients; those of a LoRA are small, and clipping needs them together; {_LEAVE_OUT}",
        default=False,
    )

    dataset_class: str | None = refused(
        "batches are planned ahead so that a run can be repeated and resumed exactly, which a foreign class "
        "cannot do; describe the data with --dataset_config",
        harmless=("",),
    )
    ddp_gradient_as_bucket_view: bool = refused(_NO_DDP, default=False)
    ddp_static_graph: bool = refused(_NO_DDP, default=False)

    deepspeed: bool = refused(_NO_DEEPSPEED, default=False)
    zero_stage: int = refused(_NO_DEEPSPEED, default=2)
    offload_optimizer_device: str | None = refused(_NO_DEEPSPEED, harmless=("none",))
    offload_optimizer_nvme_path: str | None = refused(_NO_DEEPSPEED)
    offload_param_device: str | None = refused(_NO_DEEPSPEED, harmless=("none",))
    offload_param_nvme_path: str | None = refused(_NO_DEEPSPEED)
    zero3_init_flag: bool = refused(_NO_DEEPSPEED, default=False)
    zero3_save_16bit_model: bool = refused(_NO_DEEPSPEED, default=False)
    fp16_master_weights_and_gradients: bool = refused(_NO_DEEPSPEED, default=False)
