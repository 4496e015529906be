"""A model's own weights: full fine-tuning."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from library.core.errors import ConfigError
from library.core.log import logger
from library.data.items import PRESERVED, Manifest
from library.options.train import TrainOptions
from library.training.trainee.kind import FoundModel, Trainee, TraineeKind

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.nn.transformer import Transformer
    from library.training.context import RunContext
    from library.training.output.ema import Ema
    from library.training.output.metadata import TrainingFacts
    from library.training.output.model_file import ModelFile
    from library.training.trainee.learner import Learner
    from library.training.trainee.whole_model import WholeModel
    from library.training.trainer import NetworkTrainer
    from networks.fit import Shapes

_log = logger("trainee")
_LORA_INSTEAD = "train a LoRA on it with the ..._train_network.py script"


class WeightsKind(TraineeKind):
    """All weights of the DiT."""

    def check(self, options: TrainOptions) -> None:
        """Refuse what only a network on a frozen model can do; the options themselves refuse more."""
        if options.training.mixed_precision == "fp16":
            raise ConfigError(
                "--mixed_precision fp16 cannot train whole models: gradients of their weights overflow it. "
                "Use --mixed_precision bf16, or no."
            )
        _check_fused(options)

    def check_model(self, trainer: NetworkTrainer, found: FoundModel, layers: Shapes) -> None:
        """Refuse a file of quantised weights, and a folder for diffusers that cannot be."""
        if found.quant.scheme is not None:
            raise ConfigError(
                f"--pretrained_model_name_or_path holds weights that are quantised ({found.quant.scheme}), "
                f"which cannot be trained. Name the unquantised file, or {_LORA_INSTEAD}."
            )
        if trainer.options.saving.in_folder:
            trainer.weight_layout(found.params, diffusers=True)

    def check_data(self, manifest: Manifest) -> None:
        """Refuse what asks for the untrained model, or for a network's strength."""
        for item in manifest.items:
            if item.preserved:
                raise ConfigError(
                    f"{PRESERVED} asks the untrained model, which is not there any more once its own "
                    f"weights are trained. Take it out of the dataset file, or {_LORA_INSTEAD}."
                )
            if item.dataset.network_multiplier != 1:
                raise ConfigError(
                    f"network_multiplier = {item.dataset.network_multiplier:g} is the strength of a network, "
                    f"and none is trained. Take it out of the dataset file, or {_LORA_INSTEAD}."
                )

    def check_device(self, context: RunContext) -> None:
        """Let the optimizer make a step wherever it will have weights; refuse FSDP."""
        if context.processes.sharding is not None:
            raise ConfigError(
                "Full fine-tuning does not spread the model over processes with FSDP: start without it. To "
                "save memory: --blocks_to_swap, --full_bf16, and with one process --fused_backward_pass."
            )
        self.check_optimizer(context.options, context.device)
        if context.options.swap.count:
            self.check_swapping(context.options)
        _log.info("all weights of the DiT are trained, %s", _precision(context.options))

    def check_optimizer(self, options: TrainOptions, device: torch.device) -> None:
        """Let it step matrices and vectors, together or one by one."""
        from library.training.trainee.weights_learner import check_weights_optimizer

        check_weights_optimizer(options, device)

    def check_swapping(self, options: TrainOptions) -> None:
        """Let the optimizer step where swapped blocks have their weights, too: in the computer's memory."""
        import torch

        super().check_swapping(options)
        try:
            self.check_optimizer(options, torch.device("cpu"))
        except ConfigError as error:
            raise ConfigError(
                f"Block swap is not possible with this optimizer, which would have to step the weights of "
                f"swapped blocks in the computer's memory. {error}"
            ) from error

    def make(
        self,
        options: TrainOptions,
        model: Transformer,
        load_encoder: Callable[[], nn.Module],
        *,
        seed: int,
        device: torch.device | None = None,
        started: bool = True,
    ) -> WholeModel:
        """Let the model's weights take gradients."""
        from library.training.trainee.whole_model import WholeModel

        return WholeModel(model)

    def optimizer(self, trainee: Trainee, options: TrainOptions, *, seed: int) -> torch.optim.Optimizer:
        """Return the optimizer of all weights."""
        from library.training.trainee.weights_learner import weights_optimizer

        return weights_optimizer(trainee, options, seed=seed)

    def learner(self, trainee: WholeModel, context: RunContext) -> Learner:
        """Return the optimizer of all weights, and where their gradients are."""
        from library.training.trainee.weights_learner import weights_learner

        return weights_learner(trainee, context)

    def file(
        self,
        trainee: WholeModel,
        learner: Learner,
        context: RunContext,
        facts: TrainingFacts,
        ema: Ema | None,
    ) -> ModelFile:
        """Return what writes a weight file of the family."""
        from library.training.output.model_file import ModelFile

        saving, model = context.options.saving, trainee.model
        layout = context.trainer.weight_layout(model.params, diffusers=saving.in_folder)
        return ModelFile(model, layout, facts, saving, ema=ema, exact=learner.exact)

    def lines(self, trainee: WholeModel) -> Iterator[str]:
        """Yield how many numbers are trained, in all and in each part of the model."""
        numbers = Counter[str]()
        for name, parameter in trainee.model.named_parameters():
            numbers[name.partition(".")[0]] += parameter.numel()
        yield f"{trainee.parameter_count():,} trained numbers: all of the DiT"
        for part, count in numbers.items():
            yield f"  {part}: {count:,}"


def _precision(options: TrainOptions) -> str:
    if options.training.full_bf16:
        return "in bf16: every update is rounded up or down at random"
    if options.training.mixed_precision == "bf16":
        return "in bf16, with what that cannot hold of them beside it: no update is lost"
    return "in fp32"


def _check_fused(options: TrainOptions) -> None:
    if options.trainee.fused and options.training.gradient_accumulation_steps > 1:
        raise ConfigError(
            "--fused_backward_pass drops each gradient at once, so that --gradient_accumulation_steps has "
            "none to add up. Leave one of them out."
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.trainee.fused and processes > 1:
        raise ConfigError(
            f"--fused_backward_pass updates each weight as soon as its gradient is there, and that of "
            f"{processes} processes is there at the end only. Leave it out, or start one process."
        )
