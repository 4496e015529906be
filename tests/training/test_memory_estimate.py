"""The memory that is told on the meta device is what a real step keeps."""

import pytest
import torch

from library.data.batch import Condition
from library.models.lumina2 import load_nextdit, velocity
from library.options.optimizer import OptimizerOptions
from library.training.look.memory_estimate import kept_for_backward, optimizer_bytes, weight_bytes
from networks.lora_lumina import create_network


def kept_on(device, path):
    device = torch.device(device)
    model = load_nextdit(path, device=device, dtype=torch.float32)
    network = create_network(model, dim=4, alpha=1.0)
    network.apply_to(model)
    x, sigma = torch.zeros(2, 16, 16, 24, device=device), torch.full((2,), 0.5, device=device)
    conditions = [Condition(torch.zeros(20, model.params.cap_feat_dim, device=device))] * 2
    kept = kept_for_backward(
        model, network.parameters(), lambda: velocity(model, x, sigma, conditions).square().mean()
    )
    return kept, model


def test_without_data_as_much_is_counted_as_with_it(nano):
    told, _ = kept_on("meta", nano.dit)
    real, _ = kept_on("cpu", nano.dit)
    assert told.inputs_of_blocks == real.inputs_of_blocks > 0
    assert told.everything == pytest.approx(real.everything, rel=0.1)
    assert told.largest_block == pytest.approx(real.largest_block, rel=0.1)


def test_checkpointing_keeps_inputs_and_one_block(nano):
    kept, model = kept_on("meta", nano.dit)
    tokens, blocks = 2 * 8 * 12, len(model.layers) + len(model.noise_refiner)
    width = model.params.dim
    assert kept.inputs_of_blocks > 4 * tokens * width * blocks
    assert kept.offloaded < kept.checkpointed < kept.everything
    assert kept.largest_block < kept.everything / len(model.layers)


def test_weights_are_counted_once(nano):
    _, model = kept_on("meta", nano.dit)
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "least", "most"), [("AdamW", 8, 8.1), ("Lion", 4, 4.1), ("AdamW8bit", 2, 2.2)]
)
def test_an_optimizer_is_measured_by_one_step(name, least, most):
    assert least <= optimizer_bytes(OptimizerOptions(optimizer_type=name), torch.device("cpu")) <= most
