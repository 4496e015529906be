"""What a script trains, as far as shared code must know: a network on a frozen model, or the model itself.

Kinds of trainees can be imported before torch; what needs it is imported where it is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from library.data.items import Manifest
from library.options.train import TrainOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.nn.transformer import Transformer
    from library.training.context import RunContext
    from library.training.output.ema import Ema
    from library.training.output.metadata import TrainingFacts
    from library.training.output.trainee_file import TraineeFile
    from library.training.trainee.learner import Learner
    from library.training.trainer import NetworkTrainer
    from networks.fit import Shapes


class Trainee(Protocol):
    """What is trained, once it is there: an `nn.Module` whose parameters are the trained ones.

    enabled: whether it acts. multiplier: how strongly.
    """

    enabled: bool
    multiplier: float

    def parameter_groups(self, lr: float) -> list[dict[str, object]]:
        """Return optimizer groups: `params`, `lr`, `name`."""

    def parameter_count(self) -> int:
        """Return how many numbers are trained."""


class FoundQuant(Protocol):
    """How a weight file has its weights: `scheme` is None where they are whole."""

    @property
    def scheme(self) -> str | None: ...


class FoundModel(Protocol):
    """A DiT's weight file whose headers were checked. `params`: its family's sizes."""

    @property
    def params(self) -> object: ...
    @property
    def quant(self) -> FoundQuant: ...


@dataclass(frozen=True)
class CheckedModel:
    """What a DiT has, to check against it what is asked of it.

    found: its weight file. layers: its linear layers. blocks: how many there are. routed: how many of these
    tokens can skip.
    """

    found: FoundModel
    layers: Shapes
    blocks: int
    routed: int


class TraineeKind(ABC):
    """A kind of trainee."""

    @abstractmethod
    def check(self, options: TrainOptions) -> None:
        """Check the options of a run before any file of the model is opened. Torch-free; raises UserError."""

    @abstractmethod
    def check_model(self, trainer: NetworkTrainer, found: FoundModel, layers: Shapes) -> None:
        """Check them against the DiT's weight file and its linear layers. Torch-free; raises UserError."""

    def check_data(self, manifest: Manifest) -> None:
        """Check the dataset. Torch-free; raises ConfigError for what this kind cannot do with it."""
        return

    @abstractmethod
    def check_device(self, context: RunContext) -> None:
        """Check what shows on the run's device, or with its processes. Raises UserError."""

    @abstractmethod
    def check_optimizer(self, options: TrainOptions, device: torch.device) -> None:
        """Let the optimizer step weights that lie on a device, in the way in which it will.

        Raises:
            ConfigError: it cannot.
        """

    def check_swapping(self, options: TrainOptions) -> None:
        """Check that blocks can be swapped, however many. Raises ConfigError with the reason if none can."""
        options.compute.check_swapping()

    @abstractmethod
    def make(
        self,
        options: TrainOptions,
        model: Transformer,
        load_encoder: Callable[[], nn.Module],
        *,
        seed: int,
        device: torch.device | None = None,
        started: bool = True,
    ) -> Trainee:
        """Make what is trained and join it to the model, ready to train.

        Args:
            load_encoder: returns the text encoder; called only if that is trained.
            device: where what is new shall lie; None: where the model's weights lie.
            started: False where only sizes count: without what it starts from besides the model, and
                without leaving out layers at random.
        """

    @abstractmethod
    def optimizer(self, trainee: Trainee, options: TrainOptions, *, seed: int) -> torch.optim.Optimizer:
        """Return what steps its weights. Any object with weights does, to see what that takes."""

    @abstractmethod
    def learner(self, trainee: Trainee, context: RunContext) -> Learner:
        """Return what turns gradients into its next weights."""

    @abstractmethod
    def file(
        self, trainee: Trainee, learner: Learner, context: RunContext, facts: TrainingFacts, ema: Ema | None
    ) -> TraineeFile:
        """Return what writes it, and its running average."""

    def found_sizes(self, options: TrainOptions, trainee: Trainee) -> dict[str, object]:
        """Return what the metadata must say of its sizes, if they came from a file."""
        return {}

    @abstractmethod
    def lines(self, trainee: Trainee) -> Iterator[str]:
        """Yield what people want to know of its size."""
