"""Every way of running the blocks gives the same numbers; what each keeps; compiled; on the meta device."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from library.models.kandinsky5_dit import Kandinsky5DiT
from library.models.kandinsky5_format import linear_layers, quantisable_layers
from library.nn import products
from library.nn.running.compiling import part_compiler
from library.nn.running.runner import MODES
from library.nn.stand_in import meta_standing_for
from library.options.compute import ComputeOptions
from networks.layer import Dropouts
from networks.lora import LoRANetwork, LoRASize
from tests.models.kandinsky5_pairs import make_inputs, make_params, randomise

ONE = [((9,), (8, 6)), ((30,), (4, 10))]
SEVERAL = [((9, 1, 40), (8, 6), (4, 4), (2, 12)), ((5, 3), (8, 8))]


def make_model(dtype=torch.float32, *, layers=linear_layers, dropout=0.0, **changes):
    """A model with a LoRA on every linear layer, modulation and embedders included; nothing is zero."""
    torch.manual_seed(0)
    model = Kandinsky5DiT(make_params(**changes))
    randomise(model)
    model.requires_grad_(False).to(dtype).time_embeddings.float()
    network = LoRANetwork(model, {path: LoRASize(4, 4) for path in layers(model.params)})
    network.apply_to(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    for lora in network.loras.values():
        lora.dropouts = Dropouts(neuron=dropout, module=dropout)
    return model, network.train()


def train(model, network, inputs):
    """Outputs and gradients of a step."""
    network.zero_grad()
    torch.manual_seed(5)
    outputs = inputs.ours(model)
    sum(output.float().square().sum() for output in outputs).backward()
    grads = [p.grad if p.grad is not None else torch.zeros(()) for p in network.parameters()]
    return [*(output.detach() for output in outputs), *grads]


@pytest.mark.parametrize(
    ("dtype", "fast", "dropout"),
    [(torch.float32, True, 0.3), (torch.bfloat16, True, 0.0), (torch.bfloat16, False, 0.3)],
    ids=["fp32 with dropout", "bf16", "bf16 multiplied in fp32, with dropout"],
)
def test_bit_for_bit(monkeypatch, dtype, fast, dropout):
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda _: fast)
    model, network = make_model(dtype, dropout=dropout)
    inputs = make_inputs(model.params, *SEVERAL[0])
    expected = train(model, network, inputs)
    assert all(grad.abs().sum() > 0 for grad in expected if grad.dim()) or dropout
    for mode in MODES:
        model.runner.keep(mode)
        found = train(model, network, inputs)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True)), mode


def kept_bytes(model, inputs):
    """Bytes that are kept for backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        alive = inputs.ours(model)
    del alive
    return sum(sizes.values())


def test_what_is_kept(monkeypatch):
    """A visual block in bf16, in widths of a token. Nothing is kept in fp32, as it is with plain operations.

    There are 19: inputs of 3 norms and their results; 3 queries and keys before and after their norm;
    values; 2 results of attention; 4 before GELU. The rest is the text's, and statistics.
    """
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda _: True)
    sizes = {"model_dim": 128, "ff_dim": 512, "n_text_blocks": 1, "n_visual_blocks": 4}
    model, _ = make_model(torch.bfloat16, layers=quantisable_layers, **sizes)
    inputs = make_inputs(model.params, (2,), (32, 32))
    kept = {}
    for mode in MODES:
        model.runner.keep(mode)
        kept[mode] = kept_bytes(model, inputs) / (4 * 256 * 128 * 2)
    assert 19 < kept["none"] < 21.5
    assert 0.65 < kept["selective"] / kept["none"] < 0.85
    assert 0.4 < kept["feed_forward"] / kept["none"] < 0.6
    assert 0.1 < kept["outputs"] / kept["none"] < 0.3
    assert kept["full"] < 0.1 * kept["none"]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No graphs of other tests, and torch's settings as they were."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def _queries(params):
    """Few layers, because each makes a graph longer, and with it the time to compile it."""
    return [path for path in quantisable_layers(params) if path.endswith("to_query")]


@pytest.mark.usefixtures("fresh")
def test_compiled_parts_are_few_and_whole_for_all_sizes():
    sizes = {"n_text_blocks": 1, "n_visual_blocks": 1, "layers": _queries}
    plain, model = make_model(**sizes), make_model(**sizes)
    options = ComputeOptions(torch_compile=True, dynamo_backend="eager")
    model[0].runner.compile(part_compiler(options))
    graphs = []
    for batch in (*SEVERAL, *ONE):
        inputs = make_inputs(model[0].params, *batch)
        for ours, reference in zip(train(*model, inputs), train(*plain, inputs), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == 5 and graphs[2] == graphs[3] <= 10
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh")
def test_inductor_agrees_over_two_sizes_of_pictures(monkeypatch):
    """With one block, the kind that all but two of the real model are, because each takes half a minute.

    And without vector instructions: to find out which there are, inductor compiles a program for each.
    """
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    sizes = {"n_text_blocks": 0, "n_visual_blocks": 1, "layers": _queries}
    plain, model = make_model(**sizes), make_model(**sizes)
    model[0].runner.compile(part_compiler(ComputeOptions(torch_compile=True)))
    for batch in ONE:
        inputs = make_inputs(model[0].params, *batch)
        for ours, reference in zip(train(*model, inputs), train(*plain, inputs), strict=True):
            torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4 * reference.abs().max().item())
        assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.float32)])
def test_on_the_meta_device(kind, dtype):
    """What a step takes of memory is found out there."""
    with torch.device("meta"):
        model = Kandinsky5DiT(make_params(n_visual_blocks=2)).to(dtype).requires_grad_(False)
        network = LoRANetwork(model, {path: LoRASize(4, 4) for path in linear_layers(model.params)})
        x = [torch.empty(16, 8, 6), torch.empty(16, 4, 4)]
        tokens, pooled = [torch.empty(5, 20), torch.empty(9, 20)], torch.empty(2, 24)
        time = torch.empty(2)
    network.apply_to(model)
    for mode in ("none", "feed_forward", "outputs", "full"):
        model.runner.keep(mode)
        with meta_standing_for(kind):
            outputs = model(x, time, tokens, pooled)
            assert [(out.shape, out.dtype) for out in outputs] == [(each.shape, dtype) for each in x]
            sum(out.float().sum() for out in outputs).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
