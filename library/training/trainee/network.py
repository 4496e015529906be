"""A network (LoRA, LyCORIS) on a frozen model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from library.options.train import TrainOptions
from library.training.trainee.kind import FoundModel, Trainee, TraineeKind
from networks.module import (
    check_layers,
    check_network,
    check_saving,
    install_network,
    install_new_network,
    network_facts,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.nn.transformer import Transformer
    from library.training.context import RunContext
    from library.training.output.ema import Ema
    from library.training.output.metadata import TrainingFacts
    from library.training.output.network_file import NetworkFile
    from library.training.trainee.learner import Learner
    from library.training.trainer import NetworkTrainer
    from networks.fit import Shapes
    from networks.lora import LoRANetwork


class NetworkKind(TraineeKind):
    """What `--network_module` names."""

    def check(self, options: TrainOptions) -> None:
        """Check module, arguments, start weights and the names in files."""
        check_network(options.trainee)
        check_saving(options.trainee, options.saving)

    def check_model(self, trainer: NetworkTrainer, found: FoundModel, layers: Shapes) -> None:
        """Check arguments and files against the layers; how these are kept does not matter."""
        check_layers(trainer.options.trainee, layers)

    def check_device(self, context: RunContext) -> None:
        """Let the optimizer make a step."""
        self.check_optimizer(context.options, context.device)

    def check_optimizer(self, options: TrainOptions, device: torch.device) -> None:
        """Let it step a matrix."""
        from library.training.optim.optimizer import check_optimizer

        check_optimizer(options.optimizer, device)

    def make(
        self,
        options: TrainOptions,
        model: Transformer,
        load_encoder: Callable[[], nn.Module],
        *,
        seed: int,
        device: torch.device | None = None,
        started: bool = True,
    ) -> LoRANetwork:
        """Make a network and put it on the model; what it starts from is --network_weights."""
        import torch

        network = (install_network if started else install_new_network)(
            options.trainee,
            model,
            load_encoder,
            seed=seed,
            learning_rate=options.optimizer.learning_rate,
            device=device,  # a layer that it is made for may lie elsewhere, with block swap
        )
        network.train()
        if not started:  # sizes count, and no chance
            network.use_every_layer()
        if options.training.full_bf16:
            for name, parameter in network.named_parameters():
                if not name.endswith("dora_scale"):  # its steps are below what bf16 can tell from 1
                    parameter.data = parameter.data.to(torch.bfloat16)
        return network

    def optimizer(self, trainee: Trainee, options: TrainOptions, *, seed: int) -> torch.optim.Optimizer:
        """Return the optimizer of all its matrices."""
        from library.training.trainee.network_learner import network_optimizer

        return network_optimizer(trainee, options)

    def learner(self, trainee: LoRANetwork, context: RunContext) -> Learner:
        """Return that optimizer, with gradients in one piece and what is watched of them."""
        from library.training.trainee.network_learner import network_learner

        return network_learner(trainee, context)

    def file(
        self,
        trainee: LoRANetwork,
        learner: Learner,
        context: RunContext,
        facts: TrainingFacts,
        ema: Ema | None,
    ) -> NetworkFile:
        """Return what writes it under kohya's or diffusers' names."""
        from library.training.output.network_file import NetworkFile

        return NetworkFile(trainee, facts, context.options.saving, ema)

    def found_sizes(self, options: TrainOptions, trainee: LoRANetwork) -> dict[str, object]:
        """Return rank and alpha with --dim_from_weights."""
        return network_facts(trainee) if options.trainee.dim_from_weights else {}

    def lines(self, trainee: LoRANetwork) -> Iterator[str]:
        """Yield how many numbers are trained, in all and in each part of the model."""
        layers, numbers = Counter[str](), Counter[str]()
        for name, lora in trainee.loras.items():
            of_text = name.startswith("lora_te_")
            part = "text encoder" if of_text else trainee.paths[name].partition(".")[0]
            layers[part] += 1
            numbers[part] += sum(p.numel() for p in lora.parameters() if p.requires_grad)
        yield f"{trainee.parameter_count():,} trained numbers on {len(trainee.loras)} layers"
        for part in layers:
            yield f"  {part}: {numbers[part]:,} on {layers[part]} layers"
