"""Lumina's models with quantised layers: outputs, training, files, and what of them is quantised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.core.errors import CheckpointError, ConfigError
from library.core.hashing import HashLedger
from library.models import transformer_loading
from library.models.gemma2 import load_gemma2
from library.models.lumina2 import load_nextdit
from library.models.lumina2_files import check_models
from library.models.lumina2_format import inspect_lumina2, parameter_shapes
from library.models.lumina2_identity import text_identity
from library.nn.running.runner import MODES
from library.nn.weights import eight_bit
from library.nn.weights.quant import QuantLinear
from library.nn.weights.schemes import SCHEMES
from library.options.model import TextEncoderOptions
from library.options.quant import PRODUCTS, QuantOptions, TextQuantOptions
from library.options.swap import SwapOptions
from networks.lora import merge
from networks.lora_lumina import create_network
from networks.request import NetworkRequest
from tests.models.scaled_fp8 import in_scaled_fp8

CPU = torch.device("cpu")
# How far a quantised nano transformer's output may be from the whole one's, relative; measured about half.
LIMITS = {"fp8": 0.08, "int8": 0.02, "int4": 0.25, "nf4": 0.25}


def _load(nano, dtype, scheme, **more):
    return load_nextdit(nano.dit, device=CPU, dtype=dtype, quant=QuantOptions(base_quant=scheme), **more)


def _inputs(model):
    random = torch.Generator().manual_seed(0)
    x = [torch.randn(16, 8, 6, generator=random), torch.randn(16, 4, 8, generator=random)]
    captions = [torch.randn(length, model.params.cap_feat_dim, generator=random) for length in (5, 9)]
    return x, torch.tensor([0.3, 0.8]), captions


def _flat(tensors):
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def _step(model, args=None):
    """Output and gradients with a LoRA that has learnt something already."""
    network = create_network(model, NetworkRequest(dim=4, alpha=4, args=args or {}, seed=3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.02)
    network.apply_to(model)
    network.train()
    output = model(*_inputs(model))
    sum(part.float().square().mean() for part in output).backward()
    return _flat(output).detach(), _flat([p.grad for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("args", [{}, {"dora_wd": "True"}, {"dora_wd": "True", "wd_on_output": "True"}])
def test_training_is_near_that_of_the_whole_model(nano, scheme, args):
    output, gradient = _step(load_nextdit(nano.dit, device=CPU, dtype=torch.float32), args)
    quantised = _load(nano, torch.float32, scheme)
    near_output, near_gradient = _step(quantised, args)
    assert 0 < (near_output - output).norm() / output.norm() < LIMITS[scheme]
    assert (near_gradient - gradient).norm() / gradient.norm() < 2 * LIMITS[scheme]


@pytest.mark.parametrize("scheme", PRODUCTS)
@pytest.mark.parametrize("args", [{}, {"dora_wd": "True"}])
def test_products_in_8_bits_are_near_those_of_the_whole_model(nano, scheme, args):
    output, gradient = _step(load_nextdit(nano.dit, device=CPU, dtype=torch.float32), args)
    quant = QuantOptions(base_quant=scheme, quant_matmul=True)
    fast = load_nextdit(nano.dit, device=CPU, dtype=torch.float32, quant=quant)
    near_output, near_gradient = _step(fast, args)
    exact_output, _ = _step(_load(nano, torch.float32, scheme), args)
    assert 0 < (near_output - output).norm() / output.norm() < 2 * LIMITS[scheme]
    assert (near_gradient - gradient).norm() / gradient.norm() < 3 * LIMITS[scheme]
    assert torch.equal(near_output, exact_output) == bool(args)  # DoRA multiplies restored weights


@pytest.mark.parametrize("mode", MODES)
def test_products_in_8_bits_are_the_same_in_every_mode(nano, mode):
    """Backward makes again what forward made, and rounds it alike; with blocks swapped or not."""
    quant = QuantOptions(base_quant="int8", quant_matmul=True)
    results = []
    for keeps, swap in (("none", SwapOptions()), (mode, SwapOptions(blocks_to_swap=4))):
        model = load_nextdit(nano.dit, device=CPU, dtype=torch.bfloat16, quant=quant, swap=swap)
        model.runner.keep(keeps)
        results.append(_step(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_model_without_suitable_layers_is_refused(nano, monkeypatch):
    monkeypatch.setattr(eight_bit, "_MULTIPLE", 1000)
    quant = QuantOptions(base_quant="int8", quant_matmul=True)
    with pytest.raises(ConfigError, match="widths are multiples of 16, and this model has none"):
        load_nextdit(nano.dit, device=CPU, dtype=torch.float32, quant=quant)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_is_that_of_a_plain_model_with_the_restored_weights(nano, scheme):
    quantised = _load(nano, torch.float32, scheme)
    plain = load_nextdit(nano.dit, device=CPU, dtype=torch.float32)
    for path, layer in quantised.named_modules():
        if isinstance(layer, QuantLinear):
            plain.get_submodule(path).weight.data = layer.weight
    for mine, reference in zip(_step(quantised), _step(plain), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


def test_only_the_linear_layers_of_blocks_are_quantised(nano):
    model = _load(nano, torch.bfloat16, "int8")
    params = model.params
    for path, module in model.named_modules():
        inside = ".attention." in path or ".feed_forward." in path
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module, QuantLinear) == inside, path
    quantised = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(quantised) == 5 * params.n_blocks
    assert {p.dtype for n, p in model.named_parameters() if n.startswith("t_embedder.")} == {torch.float32}


def test_quantised_and_swapped(nano):
    stays = _step(_load(nano, torch.bfloat16, "nf4"))
    swap = SwapOptions(blocks_to_swap=4)
    moves = _step(_load(nano, torch.bfloat16, "nf4", swap=swap))
    assert all(torch.equal(a, b) for a, b in zip(stays, moves, strict=True))


@pytest.mark.parametrize(("flag", "place"), [("cuda", "cuda"), ("cpu", "cpu")])
def test_weights_that_wait_elsewhere_are_quantised_by_the_gpu_too(nano, monkeypatch, flag, place):
    class Loading(Exception):
        """What would be loaded, and where."""

    def load(*_, device, quantise_on, **__):
        raise Loading(
            {device(f"layers.{number}.attention.qkv.weight").type for number in range(4)}, quantise_on
        )

    monkeypatch.setattr(transformer_loading, "load_module", load)
    quant = QuantOptions(base_quant="nf4", quantize_device=flag)
    with pytest.raises(Loading) as found:
        load_nextdit(
            nano.dit,
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
            attention="torch",
            quant=quant,
            swap=SwapOptions(blocks_to_swap=4),
        )
    weights_on, quantised_on = found.value.args
    assert weights_on == {"cpu", "cuda"} and torch.device(quantised_on).type == place


def test_merging_quantises_anew(nano):
    model = _load(nano, torch.float32, "int8")
    network = create_network(model, NetworkRequest(dim=4, alpha=4, args={}, seed=3))
    for lora in network.loras.values():
        torch.nn.init.normal_(lora.up, std=0.05, generator=torch.Generator().manual_seed(1))
    network.apply_to(model)
    applied = _flat(model(*_inputs(model)))
    network.remove()
    merge(model, [network])
    merged = _flat(model(*_inputs(model)))
    assert (merged - applied).norm() / applied.norm() < LIMITS["int8"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_model_is_the_one_that_was_quantised(nano, run_script, tmp_path, scheme):
    saved = tmp_path / "quantised.safetensors"
    flags = ("--pretrained_model_name_or_path", nano.dit, "--output", saved, "--base_quant", scheme)
    done = run_script("tools/quantize_model.py", *flags, cold=scheme == "int8")  # one as users start it
    assert done.code == 0, done.err
    now = _load(nano, torch.bfloat16, scheme).state_dict()
    again = load_nextdit(saved, device=CPU, dtype=torch.bfloat16)
    assert again.params == inspect_lumina2(nano.dit).params
    assert now.keys() == again.state_dict().keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in again.state_dict().items())
    assert saved.stat().st_size < nano.dit.stat().st_size
    with pytest.raises(ConfigError, match="quantised to " + scheme):
        other = QuantOptions(base_quant="fp8" if scheme != "fp8" else "int8")
        inspect_lumina2(saved).quant.check(other)
    assert run_script("tools/quantize_model.py", *flags).code == 2  # it would overwrite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_quantised_is_saved_as_it_was(nano, run_script, tmp_path, dtype):
    """Embedders, norms, modulation: digits that bf16 does not have are kept, and none are made up."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: (tensor.float() * (1 + 1e-3 * torch.rand(tensor.shape, generator=draw))).to(dtype)
        for name, tensor in load_file(nano.dit).items()
    }
    file, saved = tmp_path / "model.safetensors", tmp_path / "quantised.safetensors"
    save_file(weights, file)
    flags = ("--pretrained_model_name_or_path", file, "--output", saved, "--base_quant", "int8")
    assert run_script("tools/quantize_model.py", *flags).code == 0
    found = {name: tensor for name, tensor in load_file(saved).items() if name in weights}
    assert len(found) > 20 and all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
    kept = {tensor.dtype for name, tensor in found.items() if not name.startswith("t_embedder.")}
    assert kept == {dtype}
    now = load_nextdit(file, device=CPU, dtype=torch.float32, quant=QuantOptions(base_quant="int8"))
    again = load_nextdit(saved, device=CPU, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in now.state_dict().items())


def test_a_quantised_file_that_is_not_whole(nano, tmp_path):
    model = _load(nano, torch.bfloat16, "int8")
    tensors = {name: t for name, t in model.state_dict().items() if name != "layers.0.attention.qkv.scale"}
    save_file(tensors, tmp_path / "broken.safetensors", {"flow_scripts.quant": "int8"})
    with pytest.raises(CheckpointError, match=r"lacks 'layers\.0\.attention\.qkv\.scale'"):
        inspect_lumina2(tmp_path / "broken.safetensors")
    save_file(tensors, tmp_path / "newer.safetensors", {"flow_scripts.quant": "int3"})
    with pytest.raises(CheckpointError, match="'int3', which is not known"):
        inspect_lumina2(tmp_path / "newer.safetensors")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_text_encoder_is_near_the_whole_one(nano, scheme):
    ids = [[2, 5, 9, 30], [2, 7]]
    with torch.no_grad():
        whole = _flat(load_gemma2(nano.gemma2, device=CPU, dtype=torch.float32).encode(ids))
        quant = TextQuantOptions(text_encoder_quant=scheme)
        encoder = load_gemma2(nano.gemma2, device=CPU, dtype=torch.float32, quant=quant)
        near = _flat(encoder.encode(ids))
    assert not isinstance(encoder.model.embed_tokens, QuantLinear)
    assert 0 < (near - whole).norm() / whole.norm() < 1.5 * LIMITS[scheme]


def test_caches_of_a_quantised_text_encoder_are_its_own(nano):
    options, ledger = TextEncoderOptions(gemma2=nano.gemma2), HashLedger()
    found = {text_identity(options, "bf16", ledger, quant=scheme) for scheme in (None, *SCHEMES)}
    assert len(found) == 1 + len(SCHEMES)


@pytest.mark.parametrize("flags", [{"base_quant": "int4"}, {"base_quant": "nf4"}])
def test_widths_that_cannot_be_grouped_are_told_by_the_headers(nano, tmp_path, flags):
    odd = tmp_path / "odd.safetensors"
    params = replace(inspect_lumina2(nano.dit).params, ffn_dim=200)
    save_file({name: torch.zeros(shape) for name, shape in parameter_shapes(params)}, odd)
    with pytest.raises(ConfigError, match=r"odd.safetensors: '.*w2.weight' with 200 inputs .* int8 or fp8"):
        check_models(odd, nano.gemma2, nano.ae, QuantOptions(**flags))
    check_models(odd, nano.gemma2, nano.ae, QuantOptions(base_quant="int8"))
    check_models(nano.dit, nano.gemma2, nano.ae, QuantOptions(**flags, text_encoder_quant="nf4"))


def test_files_in_fp8_with_scales_are_what_they_say(nano, tmp_path):
    for name, load in (("dit", load_nextdit), ("gemma2", load_gemma2)):
        tensors = load_file(getattr(nano, name))
        matrices = {key for key, t in tensors.items() if key.endswith(".weight") and t.ndim == 2}
        files = in_scaled_fp8(tensors, {k for k in matrices if "embed" not in k}.__contains__, rows=True)
        paths = [tmp_path / f"{name}-{kind}.safetensors" for kind in ("fp8", "plain")]
        for path, content in zip(paths, files, strict=True):
            save_file({key: t.contiguous() for key, t in content.items()}, path)
        found, expected = (load(path, device=CPU, dtype=torch.float32).state_dict() for path in paths)
        assert found.keys() == expected.keys() and len(files[0]) > len(files[1])
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
