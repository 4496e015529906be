"""Two thousand steps need no more memory and no more open files than five hundred."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch
from torch import nn

from library.core.dist import Processes
from library.data.batch import Batch
from library.data.items import Draw
from library.options.ema import EmaOptions
from library.options.saving import SavingOptions
from library.options.state import StateOptions
from library.training.events import Moment
from library.training.gradients import PlainGradients
from library.training.output.ema import Ema
from library.training.state.contents import (
    RunFacts,
    StateSaver,
    numbers_part,
    optimizer_part,
    tensors_part,
    weights_part,
)
from library.training.update import Share, Updater, UpdateSettings
from library.training.watch.metrics import Metrics
from library.training.watch.trackers import JsonLines

WARM, STEPS, SAVE_EVERY = 500, 2000, 200


class Objective:
    """The loss of a small network on noise."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def training_losses(self, batch: Batch) -> torch.Tensor:
        x_BD = torch.randn(len(batch.draws), 32)
        return (self.network(x_BD) - x_BD).square().mean(1)

    def sigmas(self, batch: Batch) -> torch.Tensor:
        return torch.zeros(len(batch.draws))


def shares(step: int) -> list[Share]:
    draws = tuple(Draw(slot, 0, 0, step, 0, slot) for slot in range(4))
    return [Share(Batch(draws, ("x.png",) * 4, ("",) * 4, torch.ones(4)), 4)]


def test_memory_and_files_stay_what_they_are(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    network = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    processes = Processes.start()
    updater = Updater(
        Objective(network),
        PlainGradients(network.parameters(), processes.device),
        optimizer,
        processes,
        UpdateSettings(seed=1, max_grad_norm=1.0),
    )
    ema = Ema(network.named_parameters(), EmaOptions(ema=True))
    metrics = Metrics([JsonLines(tmp_path / "m.jsonl", "s")], total_steps=STEPS, window=100, shown=False)
    saving = SavingOptions(output_dir=tmp_path, output_name="kiwi", save_every_n_steps=SAVE_EVERY)
    options = StateOptions(save_state=True, save_last_n_steps_state=SAVE_EVERY)
    facts = RunFacts(run="r", seed=1, world=1, steps_per_epoch=100, dataset="", settings={})
    parts = {
        "network": weights_part(network),
        "optimizer": optimizer_part(optimizer),
        "ema": tensors_part(ema.export_state, ema.import_state),
        "metrics": numbers_part(metrics.export_state, metrics.import_state),
    }
    states = StateSaver(options, saving, facts, parts, total_epochs=20)
    process, before = psutil.Process(), (0, 0)
    for step in range(STEPS):
        result = updater.step(step, shares(step))
        ema.update(step + 1)
        metrics.step(step + 1, result.loss, {"grad_norm": result.grad_norm}, 0)
        moment = Moment(step + 1, 1, epoch_ended=False, run_ended=False)
        if states.due(moment):
            states.save(moment)
        if step + 1 == WARM:
            gc.collect()
            before = process.memory_info().rss, len(process.open_files())
    gc.collect()
    after = process.memory_info().rss, len(process.open_files())
    metrics.close()
    assert after[0] - before[0] < 5 * 2**20
    assert after[1] == before[1]
