"""How a model's own weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from library.options.elsewhere import OF_NETWORKS, SIMPLETUNER_WHOLE
from library.options.group import inert, option, refused
from library.options.quant import QuantOptions
from library.options.sampling import SampleOptions
from library.options.trainee import TraineeOptions

_NOT_QUANTISED = (
    "the weights themselves are trained, and 8 or 4 bits round them to a few values that no small step can "
    "leave; leave it out, or train a LoRA on the quantised model with the ..._train_network.py script"
)


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(TraineeOptions):
    """Full fine-tuning.

    All weights of the DiT are trained. With --mixed_precision bf16 the model computes with bf16 weights, and
    the rest of each fp32 weight is kept beside it, so no update is lost; with --full_bf16 there is only the
    bf16 weight, and updates are rounded up or down at random, so that they are right on average.
    """

    elsewhere = SIMPLETUNER_WHOLE | OF_NETWORKS
    new_start: ClassVar[str] = "start a new run from the saved model with --pretrained_model_name_or_path"
    stays: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"mixed_precision": "the state holds weights of this precision"}
    )

    fused_backward_pass: bool = option(
        False,
        "update each weight as soon as its gradient is there, so that the gradients of a whole model are "
        "never in memory; --max_grad_norm then limits the gradient of each of them",
    )
    blockwise_fused_optimizers: bool = option(
        False, "the same as --fused_backward_pass, which needs no optimizer a block"
    )
    fused_optimizer_groups: int | None = refused(
        "it sorts weights into groups that are updated together, which saves less than "
        "--fused_backward_pass; use that",
        harmless=(0,),
    )
    full_fp16: bool = refused(
        "gradients of whole models overflow fp16, and small updates get lost in it; use --mixed_precision "
        "bf16, alone or with --full_bf16",
        default=False,
    )
    mem_eff_save: bool = inert("a model is always written tensor by tensor", default=False)
    use_safetensors: bool = inert("a model is always saved as safetensors", default=False)

    def settings(self) -> dict[str, object]:
        """Return one setting for the two flags that mean the same."""
        return {"fused_backward_pass": self.fused}

    @property
    def freezes_dit(self) -> bool:
        """Whether the DiT's own weights stay as they are: they are what is trained."""
        return False

    @property
    def fused(self) -> bool:
        """Whether weights are updated while gradients are still being computed."""
        return self.fused_backward_pass or self.blockwise_fused_optimizers


@dataclass(frozen=True, kw_only=True)
class ExactQuantOptions(QuantOptions):
    """Quantised text encoder. See docs/memory.md."""

    base_quant: str | None = refused(_NOT_QUANTISED)
    quant_matmul: bool = refused(_NOT_QUANTISED, default=False)
    fp8_base: bool = refused(_NOT_QUANTISED, default=False)
    fp8_base_unet: bool = refused(_NOT_QUANTISED, default=False)
    fp8_scaled: bool = refused(_NOT_QUANTISED, default=False)


@dataclass(frozen=True, kw_only=True)
class TrainedSampleOptions(SampleOptions):
    """Sample pictures during training."""

    sample_compare_base: bool = refused(
        "it draws with the untrained model, which is not there any more once its own weights are trained; "
        "draw with it before, with --sample_at_first",
        default=False,
    )
