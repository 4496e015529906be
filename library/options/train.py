"""All options of a training script, by subject."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.caching import CachingOptions
from library.options.dataset import DatasetOptions
from library.options.loss import LossOptions
from library.options.model import LuminaModelOptions
from library.options.network import MetadataOptions, NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SampleOptions
from library.options.saving import LoggingOptions, SavingOptions
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
    loss: LossOptions
    saving: SavingOptions
    sampling: SampleOptions
    validation: ValidationOptions
    logging: LoggingOptions
    metadata: MetadataOptions

    def __post_init__(self) -> None:
        images = self.dataset
        if self.caching.latents and (images.random_crop or images.color_aug):
            name = "--random_crop" if images.random_crop else "--color_aug"
            raise ConfigError(
                f"{name} changes the pixels at every use, so latents cannot be cached: leave out one."
            )


@dataclass(frozen=True)
class LuminaTrainOptions(TrainOptions):
    """The options of lumina_train_network.py."""

    model: LuminaModelOptions
