"""Compiled blocks: whole, few graphs for all sizes, the same numbers, and a clear word where it cannot be."""

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from library.core.errors import ConfigError, MissingPackageError
from library.nn.activations import swiglu
from library.nn.products import Fp32Linear, Linear
from library.nn.running import compiling
from library.nn.running.compiling import check_compiler, part_compiler
from library.nn.swap.block_swap import BlockSwap
from library.nn.weights.quant import QuantLinear
from library.nn.weights.schemes import SCHEMES
from library.options.compute import ComputeOptions
from networks.dora import Magnitude
from networks.layer import Dropouts, LoRA, LoRALinear
from networks.lycoris.kinds import Settings
from networks.lycoris.layer import LycorisSize
from tests.models.lumina2_pairs import make_inputs
from tests.nn.test_runner import make_model, train

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ONE = ((9,), (8, 6))
SEVERAL = [((5, 3), (8, 8)), ((9, 30, 4), (6, 8)), ((40, 2, 3, 1), (12, 8)), ((1, 1), (4, 12))]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No graphs of other tests, and torch's settings as they were."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit
    torch._functorch.config.activation_memory_budget = 1.0


def test_settings_hold_in_every_thread_that_computes():
    """Blocks are computed again for backward by a thread of autograd's, where torch 2.12 has none of them."""
    part = part_compiler(ComputeOptions(torch_compile=True, activation_memory_budget=0.25))(torch.neg)
    found = []

    def compute():
        part(torch.ones(3))
        config = torch._inductor.config, torch._functorch.config, torch._dynamo.config
        found.append((config[0].shape_padding, config[1].activation_memory_budget, config[2].recompile_limit))

    for _ in range(2):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert found == [(False, 0.25, compiling._MOST_GRAPHS)] * 2


def compiled_model(backend, **changes):
    model, network = make_model(**changes)
    options = ComputeOptions(torch_compile=True, dynamo_backend=backend)
    model.runner.compile(part_compiler(options))
    return model, network


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_close(ours, reference):
    for one, other in zip(ours[:-1], reference[:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_few_graphs_for_all_sizes_of_pictures_captions_and_batches():
    plain, plain_network = make_model()
    model, network = compiled_model("eager")

    def run(lengths, size):
        inputs = make_inputs(model.params, lengths, size)
        assert_close(train(model, network, inputs), train(plain, plain_network, inputs))
        return graphs()

    assert run(*SEVERAL[0]) == 6  # two parts of: text, first picture block, later blocks
    for lengths, size in SEVERAL[1:]:
        assert run(lengths, size) == 6
    after_one = run(*ONE)
    assert after_one <= 12
    for size in ((4, 4), (10, 8), (20, 14)):
        assert run((7,), size) == after_one
    for mode in ("full", "offload", "none"):
        model.runner.keep(mode)
        assert run(*ONE) == run(*SEVERAL[1]) == after_one
    model.runner.ring = BlockSwap(model.runner.blocks, CPU, ring_size=1)
    assert run(*SEVERAL[2]) == after_one
    assert not counters["graph_break"]


def test_strengths_and_previews():
    """A LoRA's strength becomes a number that a graph takes, and drawing needs graphs of its own, once."""
    model, network = compiled_model("eager", n_layers=1, n_context_refiners=0, n_noise_refiners=0)
    plain, plain_network = make_model(n_layers=1, n_context_refiners=0, n_noise_refiners=0)
    inputs = make_inputs(model.params, *SEVERAL[0])
    seen = []
    for strength in (1.0, 0.5, 0.25):
        network.multiplier = plain_network.multiplier = strength
        assert_close(train(model, network, inputs), train(plain, plain_network, inputs))
        seen.append(graphs())
    assert seen == [2, 4, 4]
    with torch.no_grad():
        for lengths, size in SEVERAL:
            some = make_inputs(model.params, lengths, size)
            torch.testing.assert_close(some.ours(model), some.ours(plain), rtol=1e-3, atol=1e-4)
    assert graphs() == 6


def test_dropout_is_drawn_in_the_graph_and_again_in_a_checkpoint():
    changes = {"n_layers": 1, "n_context_refiners": 0, "n_noise_refiners": 0, "dropout": 0.4}
    model, network = compiled_model("aot_eager", **changes)
    inputs = make_inputs(model.params, *ONE)
    plain = train(model, network, inputs)
    model.runner.keep("full")
    assert all(torch.equal(a, b) for a, b in zip(plain, train(model, network, inputs), strict=True))
    network.eval()
    assert not torch.equal(plain[0], train(model, network, inputs)[0])
    assert not counters["graph_break"]


def test_inductor_agrees_and_what_it_compiled_is_kept(monkeypatch, tmp_path):
    """With a single layer, because compiling whole blocks takes a minute; benchmarks/modes.py does that.

    And without vector instructions: to find out which there are, inductor compiles a program for each.
    """
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    plain, network = make_model(n_layers=1, n_context_refiners=0, n_noise_refiners=0)
    layer = plain.layers[0].feed_forward.w1

    def part(x):
        y = layer(x)
        return swiglu(y, y)

    x = torch.randn(40, 48, requires_grad=True)
    wanted = [x, *(p for name, p in network.named_parameters() if "feed_forward_w1" in name)]

    def outcome(function):
        output = function(x)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), wanted)]

    for hits in (0, 1):
        torch._dynamo.reset()
        counters.clear()
        compiled = part_compiler(ComputeOptions(torch_compile=True))(part)
        for ours, reference in zip(outcome(compiled), outcome(part), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())
        found = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert (found > 0) == bool(hits)
    assert any(tmp_path.rglob("*.so"))


def layer_of(kind):
    """A layer 16 -> 32 with an operation of its own, and those of its weights that are trained."""
    if kind == "Fp32Linear":
        layer = Fp32Linear(16, 32, dtype=torch.bfloat16)
        return layer, list(layer.parameters())
    if kind.startswith("int8"):
        layer = QuantLinear(16, 32, False, "int8")
        layer.quantise(torch.randn(32, 16), CPU)
        layer.multiplies_in_8_bits = kind != "int8"
        return layer, []
    layer = LoRALinear(Linear(16, 32))
    turned = kind.startswith("DoRA")
    magnitude = Magnitude(layer.base.weight, on_output=kind != "DoRA") if turned else None
    lora = LoRA(16, 32, 4, alpha=2.0, magnitude=magnitude)
    lora.reset(seed=1, name="layer")
    torch.nn.init.normal_(lora.up)
    layer.loras = (lora,)
    return layer, list(lora.parameters())


@pytest.mark.parametrize("kind", ["Fp32Linear", "int8", "int8 products", "LoRA", "DoRA", "DoRA on output"])
def test_gradients_come_through_every_operation(kind):
    """Of operations that the compiler looks into: it has lost gradients of those that work in place."""
    layer, trained = layer_of(kind)
    x = torch.randn(40, 16, requires_grad=True)
    compiled = part_compiler(ComputeOptions(torch_compile=True, dynamo_backend="aot_eager"))(layer)
    plain, ours = (torch.autograd.grad(f(x).square().sum(), [x, *trained]) for f in (layer, compiled))
    for one, other in zip(ours, plain, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


LOKR = LycorisSize("lokr", {"lokr_w1": (4, 4), "lokr_w2": (8, 4)}, Settings(2.0))


def adapted(kind, base):
    """A layer (16 -> 32) with what is trained on it, nothing of which is zero."""
    layer = LoRALinear(base)
    if kind == "LyCORIS":
        lora = LOKR.make("layer", base, CPU)
    else:
        lora = LoRA(16, 32, 4, alpha=2.0, magnitude=Magnitude(base.weight, on_output=False))
    with torch.no_grad():
        for tensor in lora.parameters():
            tensor.normal_(1.0, 0.5)
    layer.loras = (lora,)
    return layer


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("kind", ["LyCORIS", "DoRA"])
def test_quantised_layers_with_other_kinds_of_networks(kind, scheme):
    """Without gradients too: there torch's compiler guesses from the number of arguments how to call."""
    base = QuantLinear(16, 32, True, scheme)
    base.bias.data.normal_()
    base.quantise(torch.randn(32, 16), CPU)
    layer = adapted(kind, base)
    compiled = part_compiler(ComputeOptions(torch_compile=True, dynamo_backend="eager"))(layer)
    x = torch.randn(40, 16)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert not counters["graph_break"]


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("kind", ["nothing", "LoRA", "DoRA"])
def test_weights_are_not_restored_for_backward_before_it(kind, scheme):
    """The compiler sees forward and backward at once, and of two alike results keeps the first."""
    base = QuantLinear(192, 128, True, scheme)
    base.bias.data.normal_()
    base.quantise(torch.randn(128, 192), CPU)
    layer = base
    if kind != "nothing":
        magnitude = Magnitude(base.weight, on_output=False) if kind == "DoRA" else None
        lora = LoRA(192, 128, 4, alpha=2.0, magnitude=magnitude)
        lora.reset(seed=1, name="layer")
        torch.nn.init.normal_(lora.up, std=0.1)
        layer = LoRALinear(base)
        layer.loras = (lora,)
    trained = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(40, 192, requires_grad=True)
    options = ComputeOptions(torch_compile=True)
    object.__setattr__(options, "dynamo_backend", "aot_eager_decomp_partition")
    compiled, whole = part_compiler(options)(layer), 0

    def count(tensor):
        nonlocal whole
        whole += tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() == 128 * 192
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y = compiled(x)
    assert whole == 0
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *trained])
    for one, other in zip(torch.autograd.grad(y.square().sum(), [x, *trained]), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", ["LyCORIS", "DoRA"])
def test_a_layer_left_out_at_random(kind):
    layer, x = adapted(kind, Linear(16, 32)), torch.randn(40, 16)
    base, whole = layer.base(x), layer(x)
    (lora,) = layer.loras
    lora.dropouts = Dropouts(module=0.5)
    compiled = part_compiler(ComputeOptions(torch_compile=True, dynamo_backend="aot_eager"))(layer)
    left_out = 0
    for _ in range(40):
        out = compiled(x)
        left_out += (gone := torch.allclose(out, base, atol=1e-5))
        assert gone or torch.allclose(out, whole, atol=1e-3)
    assert 8 < left_out < 32


def test_the_memory_budget_reaches_the_compiler():
    """With the part of inductor that divides a graph into forward and backward, and without its compiler."""
    plain, network = make_model(n_layers=1, n_context_refiners=0, n_noise_refiners=0)
    weights = {p.data_ptr() for p in (*plain.parameters(), *network.parameters())}
    part, x = plain.layers[0].feed_forward.forward, torch.randn(200, 48, requires_grad=True)

    def kept(budget):
        """Widths of the input that a call keeps for backward."""
        sizes = {}

        def count(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.nbytes / x.nbytes
            return tensor

        torch._dynamo.reset()
        options = ComputeOptions(torch_compile=True, activation_memory_budget=budget)
        object.__setattr__(options, "dynamo_backend", "aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            part_compiler(options)(part)(x)
        return sum(sizes.values())

    assert kept(0.0) <= 1.1 < 0.6 * kept(1.0)


class TestWhatCannotBe:
    options = ComputeOptions(torch_compile=True)

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler \('g\+\+'.*install one or leave it"):
            check_compiler(self.options, CPU)
        check_compiler(ComputeOptions(torch_compile=True, dynamo_backend="eager"), CPU)
        check_compiler(ComputeOptions(), CPU)

    def test_no_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        with pytest.raises(MissingPackageError, match="--torch_compile on a GPU .* `pip install triton`"):
            check_compiler(self.options, CUDA)

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
    def test_the_check_needs_nothing_that_only_the_compiler_imports(self):
        """In a process of its own: here other tests have imported it."""
        program = (
            "import torch; from library.nn.running.compiling import check_compiler as check, ComputeOptions; "
            "torch.cuda.get_device_capability = lambda _: (8, 0); "
            "check(ComputeOptions(torch_compile=True), torch.device('cuda'))"
        )
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def test_a_part_that_breaks_is_an_error_and_not_slow(self):
        def part(x):
            torch._dynamo.graph_break()
            return x + 1

        with pytest.raises(torch._dynamo.exc.Unsupported):
            part_compiler(ComputeOptions(torch_compile=True, dynamo_backend="eager"))(part)(torch.zeros(3))


def test_code_is_kept_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    part_compiler(ComputeOptions(torch_compile=True))
    assert compiling.cache_folder() == tmp_path
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    part_compiler(ComputeOptions(torch_compile=True))
    assert compiling.cache_folder() == tmp_path / "xdg" / "flow-scripts" / "compiled"
