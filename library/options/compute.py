"""How the model is computed: attention, what is kept for backward, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.attention import AttentionOptions
from library.options.group import inert, option, refused

BACKENDS = ("inductor", "aot_eager", "eager")
_FOREIGN_BACKENDS = (
    *("aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt", "tensort", "ipex"),
    "tvm",
)
_COMPILER_CHOOSES = ("selective", "feed_forward", "outputs")
CHECKPOINTS = ("feed_forward", "outputs", "full", "offload")  # modes that compute products again


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(AttentionOptions):
    """Computing the model.

    See docs/performance.md for what each of these costs and saves.
    """

    gradient_checkpointing: bool = option(
        False, "keep less of each block for backward and compute the rest again, see --checkpoint_mode"
    )
    checkpoint_mode: str | None = option(
        None,
        "what a block keeps for backward: none computes nothing again, so it keeps everything; selective "
        "keeps results of products and attention, and is the default; with --gradient_checkpointing: "
        "feed_forward the same without the wide middle of its feed-forward, outputs its input and results of "
        "attention and of the feed-forward (the default there), full its input only (the default there with "
        "--torch_compile), offload that in the computer's memory",
        choices=("none", "selective", *CHECKPOINTS),
    )
    checkpoint_every_n_blocks: int = option(
        1, "with --gradient_checkpointing: do that in every Nth block; the others keep as much as without it"
    )
    cpu_offload_checkpointing: bool = option(
        False, "with --gradient_checkpointing: the same as --checkpoint_mode offload"
    )
    torch_compile: bool = option(False, "compile the blocks of the model; the first steps wait for that")
    dynamo_backend: str = option(
        "inductor",
        "what --torch_compile compiles with: inductor, or aot_eager and eager, which make nothing faster and "
        "are for finding faults",
        choices=(*BACKENDS, "no", *_FOREIGN_BACKENDS),
        parse=str.lower,
    )
    activation_memory_budget: float = option(
        1.0,
        "with --torch_compile: share of what a compiled block wants to keep for backward that it may keep, "
        "0 to 1; the compiler chooses what to compute again",
    )
    fused_kernels: str = option(
        "auto",
        "what computes norms, gates, rotary embedding and SwiGLU: torch, or triton, with one kernel for each "
        "chain of operations, on NVIDIA GPUs of the Ampere generation and later; auto: triton where it can "
        "be had and --torch_compile does not write such kernels itself",
        choices=("auto", "torch", "triton"),
    )
    sdpa: bool = option(False, "the same as --attn_mode torch")
    use_sage_attn: bool = refused(
        "SageAttention has no backward pass, so nothing could be trained through it; use --use_flash_attn",
        default=False,
    )
    xformers: bool = inert(
        "torch's own attention has kernels of the same kind and is used without a flag; --attn_mode xformers "
        "insists on the package",
        default=False,
    )
    mem_eff_attn: bool = inert(
        "attention never builds the full table of scores here, so memory is saved already", default=False
    )

    def __post_init__(self) -> None:
        AttentionOptions.__post_init__(self)
        if self.attention == "sage":
            raise ConfigError(
                "--attn_mode sage cannot train: SageAttention has no backward pass. Use flash or torch."
            )
        if self.checkpoint_every_n_blocks < 1:
            raise ConfigError(
                f"--checkpoint_every_n_blocks is {self.checkpoint_every_n_blocks}; it must be 1 or more."
            )
        self._check_mode()
        self._check_compiling()

    def _check_mode(self) -> None:
        mode = self.checkpoint_mode
        if not self.gradient_checkpointing:
            if self.checkpoint_every_n_blocks > 1:
                raise ConfigError("--checkpoint_every_n_blocks needs --gradient_checkpointing.")
            if mode in CHECKPOINTS:
                raise ConfigError(f"--checkpoint_mode {mode} needs --gradient_checkpointing.")
        elif self.cpu_offload_checkpointing and mode not in (None, "offload"):
            raise ConfigError(
                f"--checkpoint_mode {mode} and --cpu_offload_checkpointing are two modes; choose one."
            )
        elif mode == "none":
            raise ConfigError(
                "--checkpoint_mode none keeps everything, and --gradient_checkpointing is there to keep "
                "less; leave one of them out."
            )

    def _check_compiling(self) -> None:
        if not 0 <= self.activation_memory_budget <= 1:
            raise ConfigError(
                f"--activation_memory_budget is {self.activation_memory_budget:g}; it is a share, 0 to 1."
            )
        if not self.compiles:
            if self.activation_memory_budget != 1:
                raise ConfigError("--activation_memory_budget needs --torch_compile.")
            return
        if self.activation_memory_budget != 1 and self.dynamo_backend in ("aot_eager", "eager"):
            raise ConfigError(
                f"--dynamo_backend {self.dynamo_backend} knows no --activation_memory_budget; leave it out."
            )
        if self.dynamo_backend not in BACKENDS:
            raise ConfigError(
                f"--dynamo_backend {self.dynamo_backend} cannot be used to train here; choose one of "
                f"{', '.join(BACKENDS)}."
            )
        if self.fused_kernels == "triton":
            raise ConfigError(
                "--fused_kernels triton and --torch_compile do not go together: the compiler writes such "
                "kernels itself. Choose one."
            )
        if self.checkpoint_mode in _COMPILER_CHOOSES:
            raise ConfigError(
                f"--checkpoint_mode {self.checkpoint_mode} and --torch_compile do not go together: the "
                "compiler itself chooses what to compute again. Leave out --checkpoint_mode and "
                "--gradient_checkpointing; with --activation_memory_budget 0.5 it keeps half."
            )

    def check_swapping(self) -> None:
        """Raise ConfigError if no block can be swapped because of how blocks are compiled."""
        if self.compiles and self.dynamo_backend == "eager":
            raise ConfigError(
                "Block swap and --dynamo_backend eager do not go together: for backward that keeps weights "
                "themselves, which are elsewhere by then. Use --dynamo_backend aot_eager or inductor."
            )

    def check_measuring(self) -> None:
        """Raise ConfigError if --plan_memory cannot measure such steps."""
        if self.compiles:
            raise ConfigError(
                "--plan_memory measures steps that are not compiled: leave out --torch_compile, or leave it "
                "to --vram_budget alone, whose estimate has what compiled blocks keep more."
            )

    @property
    def compiles(self) -> bool:
        """Whether the blocks are compiled."""
        return self.torch_compile and self.dynamo_backend != "no"

    @property
    def kernels(self) -> str:
        """Who computes the memory-bound parts: "torch", "triton", or "auto", whichever the device allows."""
        return "torch" if self.compiles else self.fused_kernels

    @property
    def keeps(self) -> str:
        """What a block keeps for backward: a mode of `library.nn.running.runner`."""
        if self.checkpoint_mode is not None:
            return self.checkpoint_mode
        if self.gradient_checkpointing:
            if self.cpu_offload_checkpointing:
                return "offload"
            return "full" if self.compiles else "outputs"
        return "none" if self.compiles else "selective"

    def keeps_between(self, mode: str) -> str:
        """What the others keep where every Nth block is in `mode`."""
        return "none" if self.compiles or mode not in CHECKPOINTS else "selective"

    @property
    def attention(self) -> str:
        """The kernel of `library.nn.attention` that the flags ask for."""
        chosen = super().attention
        return "torch" if chosen == "auto" and self.sdpa else chosen

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that another one overrules or leaves without work."""
        yield from super().adjustments()
        if self.attention not in ("torch", "sdpa"):
            winner = "--use_flash_attn" if self.attn_mode is None else f"--attn_mode {self.attn_mode}"
            yield from self.without_effect(("sdpa",), f"{winner} is given and wins")
        if not self.gradient_checkpointing:
            reason = "--gradient_checkpointing is not given, so that no block's input is kept for it"
            yield from self.without_effect(("cpu_offload_checkpointing",), reason)
        if self.dynamo_backend == "no":
            yield from self.without_effect(("torch_compile",), "--dynamo_backend no compiles nothing")
        elif not self.torch_compile:
            yield from self.without_effect(("dynamo_backend",), "--torch_compile is not given")
