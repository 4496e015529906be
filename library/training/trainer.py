"""The template of a trainer: what a family must say, and the order in which a run asks for it.

This module does not import torch, so a script can parse its options, check its files and read its dataset
before the slow imports begin. The run itself is in `library/training/run.py`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, final

from library.core.collecting import uncollected
from library.core.hashing import HashLedger
from library.data.items import Manifest, Size
from library.data.token_batches import TokenBudget
from library.options.group import OptionGroup
from library.options.request import ImageRequest
from library.options.train import TrainOptions
from library.training.family import FamilySpec, ModelFiles
from library.training.trainee.kind import CheckedModel, TraineeKind
from library.training.trainee.network import NetworkKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.core.weight_layout import WeightLayout
    from library.data.batch import Condition
    from library.data.prompt import Prompt
    from library.nn.running.routing import Routing


class NetworkTrainer(ABC):
    """Trains a network (LoRA) on a frozen model, or the model itself, as its `trainee_kind` is.

    A family writes the hooks; nothing else may be overridden.

    Shapes: pixels_BCHW in [-1, 1]; latents (C = family.latent_channels) scaled as the model takes them;
    sigma_B in [0, 1] with 0 clean and 1 noise; velocity = noise - x0.
    """

    family: ClassVar[FamilySpec]
    trainee_kind: ClassVar[TraineeKind] = NetworkKind()

    def __init__(self, options: TrainOptions) -> None:
        self.options = options

    # --- what a family must write ---

    @abstractmethod
    def check_files(self) -> CheckedModel:
        """Check the weight files by their headers; return what the DiT's tells. What is trained, swapped and
        routed is checked against that afterwards. Torch-free; raises UserError."""

    @abstractmethod
    def model_files(self, ledger: HashLedger) -> ModelFiles:
        """Identify the weight files by content, and describe them for the metadata. Torch-free."""

    @abstractmethod
    def latent_identity(self, ledger: HashLedger) -> str:
        """Return everything that the latents of a picture depend on besides it. Torch-free.

        Only the files and options that decide that are read: tools have no others.
        """

    @abstractmethod
    def text_identity(self, ledger: HashLedger) -> str:
        """Return everything that the features of a formatted text depend on besides it and its source.

        As for `latent_identity`.
        """

    @abstractmethod
    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Load the autoencoder."""

    @abstractmethod
    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> object:
        """Load what `encode_prompts` needs."""

    @abstractmethod
    def load_transformer(
        self, device: torch.device, dtype: torch.dtype, *, weights_on: torch.device | None = None
    ) -> nn.Module:
        """Load the model, frozen, to run on `device`.

        Its weights go to `weights_on` first, where that is given: they are spread from there.
        """

    @abstractmethod
    def encode_images(self, vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
        """Return scaled latents; deterministic, so that they can be cached."""

    @abstractmethod
    def decode_latents(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Return pixels in [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, encoders: object, prompts: Sequence[Prompt]) -> list[Condition]:
        """Encode prompts, one unpadded condition each; the latents of their sources are put in afterwards."""

    @abstractmethod
    def velocities(
        self,
        model: nn.Module,
        x: Sequence[Tensor],
        sigma_B: Tensor,
        conditions: Sequence[Condition],
        routing: Routing | None = None,
    ) -> list[Tensor]:
        """Return the model's velocities in the house convention; `x` and they are (C, h, w) a picture, fp32.

        Pictures may differ in size. `routing` is for training: which tokens skip which blocks.
        """

    @abstractmethod
    def count_tokens(self, prompt: Prompt) -> tuple[int, int]:
        """Return how many tokens a prompt has, and how many the text encoder takes. Torch-free.

        Those of its source, which are never cut, count in both.
        """

    @abstractmethod
    def blank_condition(self, tokens: int, device: torch.device) -> Condition:
        """Return a condition of so many tokens with nothing in it, of which only the shape counts."""

    @abstractmethod
    def encode_blank(self, encoders: object, tokens: int, count: int) -> list[Condition]:
        """Encode `count` texts of so many tokens with nothing in them, of which only the shapes count."""

    @abstractmethod
    def weight_layout(self, params: object, *, diffusers: bool) -> WeightLayout:
        """Return what the file of a trained model of these sizes has, as first released or for diffusers.

        Torch-free; raises ConfigError if diffusers has no model of these sizes.
        """

    # --- what a family may write ---

    def see_blank(self, encoders: object, source: Size, count: int) -> object:
        """Let the text encoder look at `count` source pictures with nothing in them, of which only the shapes
        count. Returns what it keeps of them until it reads the text: nothing, where it looks at none.
        """
        return None

    def format_prompt(self, text: str, *, negative: bool = False) -> str:
        """Return the text that the encoder sees for a caption or prompt."""
        return text

    def edits_pictures(self) -> bool:
        """Whether the model makes pictures out of others: `conditioning_data_dir` then has those, and not
        masks, and sample prompts may name one. Torch-free.
        """
        return False

    def check_data(self, manifest: Manifest, samples: Sequence[ImageRequest]) -> list[str]:
        """Check what is trained on, and what is drawn meanwhile, before hours pass until it is met.

        Torch-free; raises UserError for what the model cannot take. Returns a sentence for each of the
        family's flags that has no effect on these files and pictures.
        """
        return []

    def source_dropout(self) -> float:
        """Return the share of the draws of an edited picture that are trained without its source. Torch-free.

        0 to 1.
        """
        return 0.0

    def text_encoder_bytes(self, encoders: nn.Module) -> int:
        """Return how many bytes the weights of the text encoders take on the device."""
        from library.training.look.simulate import weight_bytes

        return weight_bytes(encoders)

    def count_of_others(self, prompt: Prompt) -> dict[str, tuple[int, int]]:
        """Return what `count_tokens` does of further text encoders, by their names. Torch-free."""
        return {}

    def texts_at_once(self, batch_size: int) -> int:
        """Return how many prompts `encode_prompts` is given at once, where `batch_size` are asked for.

        More, for an encoder that divides them itself and does better if it knows them all.
        """
        return batch_size

    def sample_defaults(self) -> ImageRequest:
        """Return what sample prompts do not set, but for seed and sampler. Torch-free."""
        return ImageRequest(discrete_flow_shift=self.options.timesteps.discrete_flow_shift)

    def sampler_sigmas(self, steps: int, shift: float) -> list[float]:
        """Return the steps + 1 sigmas of sample pictures, from 1 to 0."""
        from library.flow.solver import sampler_sigmas

        return sampler_sigmas(steps, shift)

    def recorded_options(self) -> tuple[OptionGroup, ...]:
        """Return the groups whose options go into the metadata, under their flags' names."""
        options = self.options
        return (
            options.caching.with_implied(),
            options.training,
            options.compute,
            options.optimizer,
            options.timesteps,
            options.noise,
            options.tread,
            options.loss,
            options.rollout,
            options.ema,
            options.validation,
        )

    # --- the same for every family ---

    @property
    def token_budget(self) -> TokenBudget | None:
        """What --max_batch_tokens says."""
        limit = self.options.training.max_batch_tokens
        return None if limit is None else TokenBudget(limit, self.family.pixel_stride)

    @final
    def with_options(self, options: TrainOptions) -> Self:
        """Return the same trainer with other options."""
        other = copy(self)
        other.options = options
        return other

    @final
    def train(self) -> Path:
        """Check everything that can be checked cheaply, then train. Returns the saved network's path.

        With --dry_run or --debug_dataset it only looks, and returns the path of what it drew; with
        --plan_memory it measures, and returns the path of the figures.
        """
        # Imported as they are needed: --help need not wait for the dataset code, nor a mistake for torch.
        from library.core.launch import complete_launch, spread_model
        from library.core.versions import require_torch
        from library.training.prepare import prepare
        from library.training.state.stop import StopSignals

        require_torch()
        complete_launch()
        if self.options.deepspeed.spreads_model:
            spread_model(os.environ)
        with StopSignals().caught() as signals:
            prepared = prepare(self)
            if self.options.training.only_looks:
                with uncollected():
                    from library.training.look.dry_run import look

                return look(self, prepared)
            with uncollected():
                from library.training.context import RunContext
                from library.training.look.budget import planned
                from library.training.run import TrainingRun

            if self.options.budget.plan_memory:
                from library.training.look.measure import measure

                return measure(RunContext.decide(self, prepared))
            context = planned(RunContext.decide(self, prepared))
            with context.processes.tied():
                return TrainingRun(context, signals).run()
