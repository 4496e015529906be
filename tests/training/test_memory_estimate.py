"""What is foretold on the meta device is what a real step takes, to the word of torch's own allocator."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import allocated
from library.data.batch import Condition
from library.models.gemma2 import load_gemma2
from library.models.lumina2 import load_nextdit, velocities
from library.nn.running.runner import MODES
from library.nn.swap.block_swap import chosen_blocks, spared_bytes
from library.options.optimizer import OptimizerOptions
from library.options.quant import QuantOptions
from library.options.swap import SwapOptions
from library.training.look.holdings import Upkeep
from library.training.look.meter import Meter, Speeds
from library.training.look.simulate import GradientRules, Simulation, Work, peak_of, weight_bytes
from library.training.optim.optimizer import create_optimizer
from networks.from_file import text_model
from networks.lora_lumina import create_network, create_text_network
from networks.request import NetworkRequest

FEW, MANY = Work(((96, 64),), 20), Work(((96, 64),) * 4, 20)


def simulation(nano, device, *, dtype=torch.float32, mode="none", kind="cpu", **loading):
    """The nano model with a LoRA, on a device; on meta it stands for the CPU, or for `kind`."""
    device = torch.device(device)
    model = load_nextdit(nano.dit, device=device, dtype=dtype, **loading)
    network = create_network(model, NetworkRequest(dim=4, alpha=1.0, device=device))
    network.apply_to(model)
    network.train()
    model.runner.keep(mode)
    width = model.params.cap_feat_dim
    trainer = SimpleNamespace(
        family=SimpleNamespace(latent_channels=16, latent_stride=8),
        options=SimpleNamespace(trainee=SimpleNamespace(trains_text_encoder=False)),
        velocities=velocities,
        blank_condition=lambda tokens, place: Condition(torch.empty(tokens, width, device=place)),
    )
    return Simulation(trainer, model, network, device, kind)


def bare_step(simulation, work):
    """A step that nothing is counted of."""
    simulation.backward(work)
    for parameter in simulation.trainee.parameters():
        parameter.grad = None


@pytest.mark.parametrize(
    ("work", "dtype"), [(FEW, torch.float32), (MANY, torch.bfloat16)], ids=["one-fp32", "four-bf16"]
)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_takes_what_was_foretold(nano, mode, work, dtype):
    foretold = simulation(nano, "meta", dtype=dtype, mode=mode).step(work).peak
    real = simulation(nano, "cpu", dtype=dtype, mode=mode)
    bare_step(real, work)  # makes tables that stay
    assert foretold == pytest.approx(allocated(lambda: bare_step(real, work)), rel=0.05)


@pytest.mark.parametrize(
    ("scheme", "mode", "fast"),
    [
        *(("fp8", "none", False), ("int8", "full", False), ("nf4", "none", False), ("nf4", "full", False)),
        *(("int8", "none", True), ("int8", "full", True)),
    ],
)
def test_a_quantised_model_takes_what_was_foretold(nano, scheme, mode, fast):
    """In fp32, because for a product in bf16 a CPU copies the weight, which is most of what is there."""
    choice = {"mode": mode, "quant": QuantOptions(base_quant=scheme, quant_matmul=fast)}
    foretold, real = (simulation(nano, device, **choice) for device in ("meta", "cpu"))
    assert weight_bytes(foretold.model) == weight_bytes(real.model)
    for each in (foretold.step, lambda work: bare_step(real, work)):
        each(FEW)  # makes tables that stay
    found = allocated(lambda: bare_step(real, FEW))
    assert foretold.step(FEW).peak == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(("count", "mode"), [(3, "none"), (6, "full")])
def test_swapped_blocks_take_what_was_foretold(nano, count, mode):
    swap = SwapOptions(blocks_to_swap=count)
    meta = simulation(nano, "meta", mode=mode)
    blocks = chosen_blocks(meta.model.runner.blocks, swap)
    foretold = weight_bytes(meta.model) - spared_bytes(blocks, swap.block_swap_ring_size)
    foretold += meta.step(FEW).peak
    real = simulation(nano, "cpu", mode=mode, swap=swap)
    masters = chosen_blocks(real.model.runner.blocks, swap)
    there = weight_bytes(real.model) - weight_bytes(*masters)
    found = there + allocated(lambda: bare_step(real, FEW))  # the ring is made in the first step
    assert foretold == pytest.approx(found, rel=0.05)


def test_each_mode_takes_less_memory_and_more_time_than_the_one_before(nano):
    steps = [simulation(nano, "meta", mode=mode, kind="cuda").step(MANY, speeds=Speeds()) for mode in MODES]
    assert [step.peak for step in steps] == sorted((step.peak for step in steps), reverse=True)
    times = [step.forward + step.backward for step in steps]
    assert times == sorted(times) and times[0] > 0
    forward = [step.forward for step in steps[:-1]]  # what is done again is done in backward
    assert forward == pytest.approx([forward[0]] * len(forward), rel=0.01)  # the first makes constants


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_products_in_8_bits_count_as_products(nano, scheme):
    """In the same time as others, though they are faster: by how much, no GPU has told."""
    flops = []
    for fast in (False, True):
        quant = QuantOptions(base_quant=scheme, quant_matmul=fast)
        simulated = simulation(nano, "meta", kind="cuda", dtype=torch.bfloat16, quant=quant)
        step = simulated.step(FEW, speeds=Speeds(products=1e6, memory=1e30, launch=0))
        flops.append(step.forward + step.backward)
    assert flops[1] == pytest.approx(flops[0], rel=1e-3)


def test_gradients_of_an_earlier_batch_are_there_already(nano):
    simulated = simulation(nano, "meta")
    count = simulated.trainee.parameter_count()
    more = simulated.step(FEW).peak_with(GradientRules(there=True)) - simulated.step(FEW).peak
    assert 0 < more <= 4 * count


def test_a_text_encoder_takes_what_was_foretold(nano):
    """Its forward looks at values, and its attention keeps the table of scores."""

    def prepared(device):
        encoder = load_gemma2(nano.gemma2, device=torch.device(device), dtype=torch.float32)
        network = create_text_network(text_model(encoder), NetworkRequest(dim=4, alpha=1.0, lr=1e-3))
        network.apply_to(text_model(encoder))
        network.train()
        return encoder, network

    told, network = prepared("meta")
    peak, kept = peak_of(lambda: told.encode([[0] * 24, [0] * 24]), told, network)
    real, _ = prepared("cpu")
    with Meter(("cpu",)) as meter:
        features = real.encode([[0] * 24, [0] * 24])
        found = meter.live
    assert len(features) == 2
    assert kept == pytest.approx(found, rel=0.02) and peak == pytest.approx(meter.peak, rel=0.02)


def test_the_meter_counts_what_is_alive():
    old = torch.zeros(1000)
    with Meter(("cpu",)) as meter:
        view = old[:10]
        assert meter.live == 0  # nothing new
        new = view + 1
        both = torch.cat([new, new])
        assert meter.live == 40 + 80
        new.add_(1)
        del new
        assert meter.live == 80 and meter.peak == 120
    assert both.numel() == 20


def test_fake_tensors_take_no_real_memory_and_count_where_the_meta_device_does():
    """Wherever they say that they are."""
    fake = FakeTensorMode()
    with Meter(("cpu",)) as meter, fake:
        kept = [torch.zeros(1000), nn.Linear(10, 10)(torch.ones(3, 10))]
    assert (meter.live, meter.peak) == (0, 0) and kept[0].device.type == "cpu"
    with fake, Meter() as meter:
        there, here = torch.zeros(1000, device="meta") + 1, torch.zeros(1000)
        assert meter.live == there.nbytes == here.nbytes
    with fake, Meter(("meta", "cpu")) as meter:
        kept = torch.zeros(1000) + 1
        assert meter.live == kept.nbytes


@pytest.mark.parametrize(
    ("name", "least", "most"), [("AdamW", 8, 8.1), ("Lion", 4, 4.1), ("AdamW8bit", 2, 2.2)]
)
def test_an_optimizer_is_measured_by_its_steps(name, least, most):
    options = OptimizerOptions(optimizer_type=name)
    upkeep = Upkeep.of(
        lambda sample: create_optimizer(sample.parameter_groups(1e-4), options),
        torch.float32,
        torch.device("cpu"),
    )
    assert least <= upkeep.state <= most
    assert upkeep.rest == 0 and 0 <= upkeep.room <= 16
