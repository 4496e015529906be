"""DeepSpeed's flags, as sd-scripts has them: what its stages do, done without the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.core.launch import PLAIN_STAGES, WEIGHTS_STAY
from library.options.group import OptionGroup, inert, option, refused

_BESIDE = (
    "an optimizer's memory lies beside the weights that it updates: on the GPU, and in the computer's memory "
    "for those of --blocks_to_swap"
)
_WHOLE = "a file is always saved whole, and --save_precision says in how many bits"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions(OptionGroup):
    """DeepSpeed.

    Its stages without the package; see docs/multi_gpu.md. `accelerate launch --use_deepspeed` does the same.
    """

    deepspeed: bool = option(False, "spread a frozen model over the processes if --zero_stage is 3")
    zero_stage: int = option(
        2,
        "DeepSpeed's stage; 0 to 2 change nothing, 3 spreads a frozen model with FSDP2",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer_device: str | None = inert(_BESIDE)
    offload_optimizer_nvme_path: str | None = inert(_BESIDE)
    offload_param_device: str | None = refused(WEIGHTS_STAY, harmless=("none",))
    offload_param_nvme_path: str | None = refused(WEIGHTS_STAY)
    zero3_init_flag: bool = inert("weights are always loaded block by block", default=False)
    zero3_save_16bit_model: bool = inert(_WHOLE, default=False)
    fp16_master_weights_and_gradients: bool = refused(
        "small updates get lost in fp16, and gradients overflow it; leave it out",
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
