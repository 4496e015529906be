"""Loading the transformer, quantised or swapped, and the house convention around it."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.core.errors import CheckpointError, ConfigError
from library.data.batch import Condition
from library.models.kandinsky5 import load_kandinsky5, velocities, velocity
from library.models.kandinsky5_format import inspect_kandinsky5, quantisable_layers, settings_of
from library.models.quant_file import SCHEME_KEY
from library.nn.running.runner import MODES
from library.nn.swap.block_swap import BlockSwap
from library.nn.weights.quant import QuantLinear
from library.nn.weights.schemes import SCHEMES
from library.options.quant import PRODUCTS, QuantOptions
from library.options.swap import SwapOptions
from networks.lora import LoRANetwork, LoRASize, merge
from tests.models.kandinsky5_pairs import Inputs, make_inputs, make_params, make_theirs
from tests.models.scaled_fp8 import in_scaled_fp8
from tests.strict_copier import StrictCopier
from tools import quantize_model

CPU = torch.device("cpu")
TASKS = {"t2i": 16, "i2i": 33}
# How far a quantised tiny transformer's output may be from the whole one's, relative; measured about half.
LIMITS = {"fp8": 0.08, "int8": 0.02, "int4": 0.25, "nf4": 0.25}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A transformer in a file for each task."""
    folder = tmp_path_factory.mktemp("kandinsky5")
    paths = {task: folder / f"{task}.safetensors" for task in TASKS}
    for task, path in paths.items():
        weights = make_theirs(make_params(in_channels=TASKS[task])).state_dict()
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return paths


def load(path, dtype=torch.float32, *, scheme=None, **how):
    return load_kandinsky5(path, device=CPU, dtype=dtype, quant=QuantOptions(base_quant=scheme), **how)


def conditions_of(inputs: Inputs, sources=()):
    sources = sources or [None] * len(inputs.x)
    return [
        Condition(tokens, pooled, source)
        for tokens, pooled, source in zip(inputs.tokens, inputs.pooled_BP, sources, strict=True)
    ]


def with_lora(model):
    """A LoRA on the layers of the blocks that has learnt something."""
    network = LoRANetwork(model, {path: LoRASize(4, 4) for path in quantisable_layers(model.params)})
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    network.apply_to(model)
    return network.train()


def step(model, network, *sizes):
    """Output and gradients; `sizes` of latents."""
    network.zero_grad()
    output = make_inputs(model.params, (9, 4), *(sizes or ((8, 6), (4, 4)))).ours(model)
    sum(part.float().square().mean() for part in output).backward()
    return _flat(output).detach(), _flat([parameter.grad for parameter in network.parameters()])


def _flat(tensors):
    return torch.cat([tensor.float().flatten() for tensor in tensors])


class TestLoading:
    @pytest.mark.parametrize("newer", [False, True])
    def test_fp8_with_scales_is_multiplied_out(self, files, tmp_path, newer):
        tensors = load_file(files["t2i"])
        linear = {f"{path}.weight" for path in quantisable_layers(make_params(in_channels=16))}
        stored = in_scaled_fp8(tensors, linear.__contains__, newer=newer, rows=newer)
        paths = [tmp_path / name for name in ("fp8.safetensors", "plain.safetensors")]
        for path, content in zip(paths, stored, strict=True):
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
        found, expected = (load(path).state_dict() for path in paths)
        assert found.keys() == expected.keys() and len(stored[0]) > len(stored[1])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())

    @pytest.mark.parametrize("task", TASKS)
    def test_the_model_is_that_of_the_file_and_frozen(self, files, task):
        model = load(files[task])
        tensors = load_file(files[task])
        assert all(torch.equal(weight, tensors[name]) for name, weight in model.state_dict().items())
        assert not model.training and not any(weight.requires_grad for weight in model.parameters())
        assert model.params.task == task
        assert torch.equal(
            *(_flat(load(each).parameters()) for each in (files[task], inspect_kandinsky5(files[task])))
        )

    def test_other_layouts(self, files, tmp_path):
        expected = load(files["t2i"]).state_dict()
        prefixed = {
            f"model.diffusion_model.{name}": weight for name, weight in load_file(files["t2i"]).items()
        }
        save_file(prefixed, tmp_path / "comfyui.safetensors")
        make_theirs(make_params()).save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
        for path in (tmp_path / "comfyui.safetensors", tmp_path / "transformer"):
            found = load(path, mmap=False).state_dict()
            assert all(torch.equal(found[name], weight) for name, weight in expected.items())

    def test_all_but_time_is_in_the_chosen_dtype(self, files):
        model = load(files["t2i"], torch.bfloat16)
        dtypes = {}
        for name, weight in model.named_parameters():
            dtypes.setdefault(name.partition(".")[0], set()).add(weight.dtype)
        assert dtypes.pop("time_embeddings") == {torch.float32}
        assert set.union(*dtypes.values()) == {torch.bfloat16} and model.dtype == torch.bfloat16

    def test_what_cannot_work_is_refused_before_loading(self, files, tmp_path):
        with pytest.raises(ConfigError, match="'varlen' needs a CUDA device"):
            load(tmp_path / "not even there", attention="varlen")
        with pytest.raises(ConfigError, match="--blocks_to_swap is 6, but the model has 5 blocks"):
            load(files["t2i"], swap=SwapOptions(blocks_to_swap=6))
        save_file({"cap_embedder.0.weight": torch.zeros(3)}, tmp_path / "lumina.safetensors")
        with pytest.raises(CheckpointError, match="it looks like a Lumina Image 2.0 transformer"):
            load(tmp_path / "lumina.safetensors")

    def test_on_the_meta_device(self, files):
        how = {"swap": SwapOptions(blocks_to_swap=5), "attention": "flash"}
        model = load_kandinsky5(files["t2i"], device=torch.device("meta"), dtype=torch.bfloat16, **how)
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
        assert model.runner.ring is None
        assert {block.self_attention.kernel for block in model.runner.blocks} == {"auto"}


class TestVelocity:
    def test_it_is_the_networks_own_output_at_1000_sigma(self, files):
        model, inputs = load(files["t2i"]), make_inputs(make_params(), (5, 9), (8, 6), (4, 4))
        sigma = torch.tensor([0.3, 0.7])
        with torch.no_grad():
            own = model(inputs.x, 1000 * sigma, inputs.tokens, inputs.pooled_BP)
            ours = velocities(model, inputs.x, sigma, conditions_of(inputs))
            half = velocities(load(files["t2i"], torch.bfloat16), inputs.x, sigma, conditions_of(inputs))
        assert all(torch.equal(*pair) for pair in zip(own, ours, strict=True))
        assert {v.dtype for v in (*ours, *half)} == {torch.float32}

    def test_pictures_of_one_size(self, files):
        model, inputs = load(files["t2i"]), make_inputs(make_params(), (5, 9), (4, 6))
        x, sigma = torch.stack(inputs.x), torch.tensor([0.3, 0.7])
        with torch.no_grad():
            ours = velocity(model, x, sigma, conditions_of(inputs))
            assert torch.equal(ours, torch.stack(velocities(model, inputs.x, sigma, conditions_of(inputs))))

    def test_sources_stand_beside_the_latents_with_a_mask(self, files):
        """One picture with a source and one without, in a batch."""
        model = load(files["i2i"])
        x = [torch.randn(16, 4, 6), torch.randn(16, 2, 2)]
        source = torch.randn(16, 4, 6, dtype=torch.float64)
        inputs, sigma = make_inputs(model.params, (5, 9), (4, 6), (2, 2)), torch.tensor([0.3, 0.7])
        ones, zeros = torch.ones(1, 4, 6), torch.zeros(17, 2, 2)
        given = [torch.cat((x[0], source.float(), ones)), torch.cat((x[1], zeros))]
        with torch.no_grad():
            own = model(given, 1000 * sigma, inputs.tokens, inputs.pooled_BP)
            ours = velocities(model, x, sigma, conditions_of(inputs, [source, None]))
        assert all(torch.equal(*pair) for pair in zip(own, ours, strict=True))
        assert [tuple(each.shape) for each in ours] == [(16, 4, 6), (16, 2, 2)]

    def test_a_source_for_a_model_that_takes_none(self, files):
        inputs = make_inputs(make_params(), (5,), (4, 6))
        conditions = conditions_of(inputs, [torch.zeros(16, 4, 6)])
        with pytest.raises(ConfigError, match="text-to-image.* cannot take a source picture"):
            velocities(load(files["t2i"]), inputs.x, torch.tensor([0.5]), conditions)


class TestQuantised:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_training_is_near_that_of_the_whole_model(self, files, scheme):
        whole, quantised = load(files["t2i"]), load(files["t2i"], scheme=scheme)
        output, gradient = step(whole, with_lora(whole))
        near_output, near_gradient = step(quantised, with_lora(quantised))
        assert 0 < (near_output - output).norm() / output.norm() < LIMITS[scheme]
        assert (near_gradient - gradient).norm() / gradient.norm() < 2 * LIMITS[scheme]

    @pytest.mark.parametrize("scheme", PRODUCTS)
    def test_products_in_8_bits_are_near_those_of_the_whole_model(self, files, scheme):
        whole, restored = load(files["t2i"]), load(files["t2i"], scheme=scheme)
        quant = QuantOptions(base_quant=scheme, quant_matmul=True)
        fast = load_kandinsky5(files["t2i"], device=CPU, dtype=torch.float32, quant=quant)
        sizes = (16, 12), (8, 8)  # the least that gives enough rows for such a product
        output, gradient = step(whole, with_lora(whole), *sizes)
        near_output, near_gradient = step(fast, with_lora(fast), *sizes)
        assert not torch.equal(near_output, step(restored, with_lora(restored), *sizes)[0])
        assert (near_output - output).norm() / output.norm() < 2 * LIMITS[scheme]
        assert (near_gradient - gradient).norm() / gradient.norm() < 3 * LIMITS[scheme]

    def test_biases_stay_and_only_layers_of_blocks_are_quantised(self, files):
        model, tensors = load(files["t2i"], torch.bfloat16, scheme="int8"), load_file(files["t2i"])
        for path, module in model.named_modules():
            inside = "_transformer_blocks." in path and "_modulation." not in path
            if isinstance(module, torch.nn.Linear):
                assert isinstance(module, QuantLinear) == inside, path
                assert (module.bias is None) == (".feed_forward." in path)
                if module.bias is not None and inside:
                    assert torch.equal(module.bias, tensors[f"{path}.bias"].bfloat16())
        assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 2 * 6 + 3 * 10

    def test_training_is_that_of_a_plain_model_with_the_restored_weights(self, files):
        quantised, plain = load(files["i2i"], scheme="nf4"), load(files["i2i"])
        for path, layer in quantised.named_modules():
            if isinstance(layer, QuantLinear):
                plain.get_submodule(path).weight.data = layer.weight
        for mine, reference in zip(
            step(quantised, with_lora(quantised)), step(plain, with_lora(plain)), strict=True
        ):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)

    def test_merging_quantises_anew(self, files):
        model = load(files["t2i"], scheme="int8")
        network = with_lora(model)
        applied, _ = step(model, network)
        network.remove()
        merge(model, [network])
        merged = _flat(make_inputs(model.params, (9, 4), (8, 6), (4, 4)).ours(model))
        assert (merged - applied).norm() / applied.norm() < LIMITS["int8"]

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_quantised_file_is_the_model_that_was_saved(self, files, tmp_path, scheme):
        now = load(files["i2i"], torch.bfloat16, scheme=scheme)
        path = tmp_path / "quantised.safetensors"
        save_file(now.state_dict(), path, settings_of(now.params) | {SCHEME_KEY: scheme})
        found = inspect_kandinsky5(path)
        assert found.params == now.params and found.quant.scheme == scheme
        again = load(path, torch.bfloat16)
        assert now.state_dict().keys() == again.state_dict().keys()
        assert all(torch.equal(now.state_dict()[n], tensor) for n, tensor in again.state_dict().items())

    def test_the_tool_that_writes_such_files_knows_the_family(self, files, monkeypatch, tmp_path):
        saved = tmp_path / "quantised.safetensors"
        flags = ("--pretrained_model_name_or_path", files["i2i"], "--output", saved, "--base_quant", "nf4")
        monkeypatch.setattr(sys, "argv", ["quantize_model.py", *map(str, flags)])
        quantize_model.main()
        assert inspect_kandinsky5(saved).params == make_params(in_channels=33)
        now = load(files["i2i"], torch.bfloat16, scheme="nf4").state_dict()
        assert all(torch.equal(now[n], t) for n, t in load(saved, torch.bfloat16).state_dict().items())

    @pytest.mark.parametrize("kind", ["a CLIP text encoder", "a Qwen2.5-VL", "a LoRA"])
    def test_the_tool_says_what_it_was_given(self, hollow_file, monkeypatch, tmp_path, kind):
        name = {
            "a CLIP text encoder": "text_model.embeddings.token_embedding.weight",
            "a Qwen2.5-VL": "visual.blocks.0.mlp.gate_proj.weight",
            "a LoRA": "lora_unet_visual_transformer_blocks_0_feed_forward_in_layer.lora_up.weight",
        }[kind]
        given = hollow_file(tmp_path / "a.safetensors", {name: (2, 2)})
        flags = ("--pretrained_model_name_or_path", given, "--output", tmp_path / "b.safetensors")
        monkeypatch.setattr(sys, "argv", ["quantize_model.py", *map(str, flags), "--base_quant=nf4"])
        with pytest.raises(ConfigError, match=f"Lumina Image 2.0 or Kandinsky .* looks like {kind}"):
            quantize_model.main()


class TestSwapped:
    @pytest.mark.parametrize("mode", MODES)
    def test_swapping_changes_no_bit(self, files, mode):
        """Every other block of both kinds, quantised ones too."""
        scheme = "nf4" if mode == "none" else None
        stays = load(files["t2i"], torch.bfloat16, scheme=scheme)
        swap = SwapOptions(blocks_to_swap=4, block_swap_ring_size=2)
        moves = load(files["t2i"], torch.bfloat16, scheme=scheme, swap=swap)
        assert isinstance(moves.runner.ring, BlockSwap)
        copier = moves.runner.ring.copier = StrictCopier()
        outcomes = []
        for model in (stays, moves):
            network = with_lora(model)
            model.runner.keep(mode)
            outcomes.append([*step(model, network), *step(model, network)])
        assert len(copier.rooms) == 2 and len(copier.asked) > 4
        assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
