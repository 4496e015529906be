"""How long to train, in which precision, and what is checked on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(OptionGroup):
    """Precision."""

    mixed_precision: str = option("no", "precision in which models compute", choices=("no", "fp16", "bf16"))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(PrecisionOptions):
    """Training."""

    max_train_steps: int = option(1600, "optimizer steps to train")
    max_train_epochs: int | None = option(None, "epochs to train; wins over --max_train_steps")
    seed: int | None = option(None, "seed of everything random; default: a random one, printed")
    full_bf16: bool = option(
        False,
        "keep trained weights in bf16 only, which saves memory; of a LoRA small updates get lost then, and "
        "those of a whole model are rounded up or down at random",
    )
    gradient_accumulation_steps: int = option(1, "batches added up for one optimizer step")
    max_batch_tokens: int | None = option(
        None,
        "fill batches with pictures of any size up to so many image tokens (16x16 pixels each, 4096 for "
        "1024x1024), instead of batch_size pictures of one bucket",
    )
    max_data_loader_n_workers: int = option(
        8, "threads that prepare batches ahead; 0 prepares them in the main thread"
    )
    persistent_data_loader_workers: bool = option(
        False, "keep those threads over epochs, which is what happens without it too"
    )
    lowram: bool = option(
        False, "read weights straight to the GPU, one by one, which is what happens without it too"
    )
    highvram: bool = option(
        False, "do not empty the GPU's cache between batches, which is what happens without it too"
    )
    prior_loss_weight: float = option(1.0, "weight of the loss of regularisation pictures")
    dry_run: bool = option(
        False,
        "do not train; print what would be done, and draw a sheet of what the model would see",
        saved=False,
    )
    debug_dataset: bool = option(
        False, "do not train; draw sheets of all pictures as the model would see them", saved=False
    )
    ddp_timeout: int | None = option(None, "minutes that processes wait for each other before giving up")

    @property
    def only_looks(self) -> bool:
        """Whether nothing is trained."""
        return self.dry_run or self.debug_dataset

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.max_train_epochs is not None and self.max_train_epochs < 1:
            raise ConfigError(f"--max_train_epochs is {self.max_train_epochs}; it must be 1 or more.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed is {self.seed}; it must be from 0 to 2^63 - 1.")
        if self.ddp_timeout is not None and self.ddp_timeout < 1:
            raise ConfigError(f"--ddp_timeout is {self.ddp_timeout} minutes; it must be 1 or more.")
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise ConfigError(f"--max_batch_tokens is {self.max_batch_tokens}; it must be 1 or more.")
        if self.full_bf16 and self.mixed_precision != "bf16":
            raise ConfigError("--full_bf16 needs --mixed_precision bf16.")
        if self.max_data_loader_n_workers < 0:
            raise ConfigError(
                f"--max_data_loader_n_workers is {self.max_data_loader_n_workers}; it must be 0 or more."
            )

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that another one overrules or leaves without work."""
        yield from super().adjustments()
        if self.max_train_epochs is not None:
            yield from self.without_effect(("max_train_steps",), "--max_train_epochs is given and wins")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup):
    """Validation.

    The loss on held-out pictures (--validation_split, --validation_count, or datasets with validation = true)
    on a fixed grid of sigmas with fixed noise.
    """

    validate_every_n_steps: int | None = option(None, "validate after every N steps")
    validate_every_n_epochs: int | None = option(
        None, "validate after every N epochs (default: every epoch, unless --validate_every_n_steps is given)"
    )
    validate_at_first: bool = option(False, "validate before the first step too")
    max_validation_steps: int | None = option(
        None, "validate on so many batches at most, of batch_size pictures each, which are always the same"
    )

    def __post_init__(self) -> None:
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be 1 or more.")

    def without_pictures(self) -> Iterator[str]:
        """Yield a sentence for each flag that is given although no picture is held out."""
        names = (f.name for f in fields(self))
        return self.without_effect(
            names,
            "no pictures are held out (--validation_split, --validation_count, or a dataset with "
            "validation = true)",
        )
