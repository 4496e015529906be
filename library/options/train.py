"""All options of a training script, by subject."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.caching import CachingOptions
from library.options.dataset import DatasetOptions
from library.options.ema import EmaOptions
from library.options.hub import HubOptions
from library.options.legacy import LegacyOptions
from library.options.loss import LossOptions
from library.options.model import LuminaModelOptions
from library.options.network import MetadataOptions, NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SampleOptions
from library.options.saving import LoggingOptions, SavingOptions
from library.options.state import StateOptions
from library.options.timesteps import TimestepOptions
from library.options.training import TrainingOptions, ValidationOptions


@dataclass(frozen=True)
class TrainOptions:
    """What every family's training script can be told."""

    network: NetworkOptions
    dataset: DatasetOptions
    caching: CachingOptions
    training: TrainingOptions
    optimizer: OptimizerOptions
    timesteps: TimestepOptions
    noise: NoiseOptions
    loss: LossOptions
    ema: EmaOptions
    saving: SavingOptions
    state: StateOptions
    hub: HubOptions
    sampling: SampleOptions
    validation: ValidationOptions
    logging: LoggingOptions
    metadata: MetadataOptions


@dataclass(frozen=True)
class LuminaTrainOptions(TrainOptions):
    """The options of lumina_train_network.py."""

    model: LuminaModelOptions
    legacy: LegacyOptions
