"""All options of a training script, by subject."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from library.options.budget import BudgetOptions
from library.options.caching import CachingOptions
from library.options.compute import ComputeOptions
from library.options.dataset import DatasetOptions
from library.options.deepspeed import DeepSpeedOptions
from library.options.ema import EmaOptions
from library.options.hub import HubOptions
from library.options.legacy import LuminaLegacyOptions
from library.options.loss import LossOptions
from library.options.model import LuminaModelOptions
from library.options.network import MetadataOptions, NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.quant import QuantOptions
from library.options.rollout import RolloutOptions
from library.options.sampling import SampleOptions
from library.options.saving import LoggingOptions, ModelLoggingOptions, ModelSavingOptions, SavingOptions
from library.options.state import ModelStateOptions, StateOptions
from library.options.swap import SwapOptions
from library.options.timesteps import TimestepOptions
from library.options.trainee import TraineeOptions
from library.options.training import TrainingOptions, ValidationOptions
from library.options.tread import TreadOptions
from library.options.weights import ExactQuantOptions, TrainedSampleOptions, WeightsOptions


@dataclass(frozen=True)
class TrainOptions:
    """What every family's training script can be told."""

    trainee: TraineeOptions
    dataset: DatasetOptions
    caching: CachingOptions
    training: TrainingOptions
    compute: ComputeOptions
    swap: SwapOptions
    quant: QuantOptions
    deepspeed: DeepSpeedOptions
    budget: BudgetOptions
    optimizer: OptimizerOptions
    timesteps: TimestepOptions
    noise: NoiseOptions
    tread: TreadOptions
    loss: LossOptions
    rollout: RolloutOptions
    ema: EmaOptions
    saving: SavingOptions
    state: StateOptions
    hub: HubOptions
    sampling: SampleOptions
    validation: ValidationOptions
    logging: LoggingOptions
    metadata: MetadataOptions

    def adjustments(self) -> tuple[str, ...]:
        """Return a sentence for each flag that is given but has no effect, with the reason."""
        groups = [getattr(self, f.name) for f in fields(self)]
        return (*(sentence for group in groups for sentence in group.adjustments()), *self._across_groups())

    def _across_groups(self) -> Iterator[str]:
        """Yield such sentences about flags whose reason is in another group."""
        if not self.trainee.trains_dit:
            reason = "--network_train_text_encoder_only leaves the DiT as it is"
            yield from self.optimizer.without_effect(("unet_lr",), reason)
        if self.training.max_batch_tokens is not None:
            reason = "--max_batch_tokens decides how many pictures a batch has"
            yield from self.dataset.without_effect(("train_batch_size",), reason)
        if self.tread.tread_routes and not self.dataset.masked_loss:
            reason = "masks are read with --masked_loss only"
            yield from self.tread.without_effect(("tread_keep_mask",), reason)
        if self.hub.huggingface_repo_id is not None and not self.state.any:
            reason = "no states are saved (--save_state, --save_state_on_train_end)"
            yield from self.hub.without_effect(("save_state_to_huggingface",), reason)


@dataclass(frozen=True)
class LuminaTrainOptions(TrainOptions):
    """The options of lumina_train_network.py."""

    trainee: NetworkOptions
    model: LuminaModelOptions
    legacy: LuminaLegacyOptions


@dataclass(frozen=True)
class FinetuneOptions(TrainOptions):
    """What every family's script for whole models can be told."""

    trainee: WeightsOptions
    quant: ExactQuantOptions
    saving: ModelSavingOptions
    state: ModelStateOptions
    sampling: TrainedSampleOptions
    logging: ModelLoggingOptions


@dataclass(frozen=True)
class LuminaFinetuneOptions(FinetuneOptions):
    """The options of lumina_train.py."""

    model: LuminaModelOptions
    legacy: LuminaLegacyOptions
