"""DeepSpeed's flags, as sd-scripts has them: what its stages do, done without the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.core.launch import PLAIN_STAGES, WEIGHTS_STAY
from library.options.group import OptionGroup, inert, option, refused

_ALWAYS = "an optimizer's memory of a LoRA is a few megabytes, and stays on the GPU"
_WHOLE = "only the trained network is saved, and it lies on every process"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions(OptionGroup):
    """DeepSpeed.

    Its stages without the package; see docs/multi_gpu.md. `accelerate launch --use_deepspeed` does the same.
    """

    deepspeed: bool = option(False, "spread the frozen model over the processes if --zero_stage is 3")
    zero_stage: int = option(
        2,
        "DeepSpeed's stage; 0 to 2 change nothing, 3 spreads the frozen model with FSDP2",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer_device: str | None = inert(_ALWAYS)
    offload_optimizer_nvme_path: str | None = inert(_ALWAYS)
    offload_param_device: str | None = refused(WEIGHTS_STAY, harmless=("none",))
    offload_param_nvme_path: str | None = refused(WEIGHTS_STAY)
    zero3_init_flag: bool = inert("weights are always loaded block by block", default=False)
    zero3_save_16bit_model: bool = inert(_WHOLE, default=False)
    fp16_master_weights_and_gradients: bool = refused(
        "small updates get lost in 16 bits, and fp32 costs a LoRA a few megabytes; leave it out",
        default=False,
    )

    @property
    def spreads_model(self) -> bool:
        """Whether every process shall keep a part of the frozen model only."""
        return self.deepspeed and self.zero_stage == 3

    def adjustments(self) -> Iterator[str]:
        """Tell of stages that have nothing to do."""
        yield from super().adjustments()
        if self.deepspeed and not self.spreads_model:
            yield f"--deepspeed --zero_stage {self.zero_stage} has no effect: {PLAIN_STAGES}"
        elif not self.deepspeed:
            yield from self.without_effect(("zero_stage",), "--deepspeed is not given")
