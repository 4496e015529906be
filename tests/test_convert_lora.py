"""tools/convert_lora.py: diffusers and PEFT load what it writes with equal output; it goes back exactly."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.core.errors import CheckpointError, ConfigError
from networks import lora_kandinsky5, lora_lumina
from networks.files import inspect_lora, save_network
from networks.from_file import create_network_from_file
from networks.request import NetworkRequest
from tests.models import kandinsky5_pairs, lumina2_pairs
from tools.convert_lora import main

NAMES = {"kohya": "lora_unet_", "comfyui": "diffusion_model.", "diffusers": "transformer."}


class Made:
    """A family's tiny models, a trained file in bf16, and our model's output with it."""

    def __init__(self, ours: nn.Module, theirs: nn.Module, run: Callable, path: Path) -> None:
        self.ours, self.theirs, self.run, self.path = ours, theirs, run, path
        self.plain, self.expected = run(ours, "ours"), self.output(path)

    def output(self, path: Path) -> Tensor:
        """Our model's output with a file."""
        network = create_network_from_file(self.ours, path)
        network.apply_to(self.ours)
        made = self.run(self.ours, "ours")
        network.remove()
        return made


@pytest.fixture(scope="module", params=["lumina", "kandinsky5"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    pairs, module = {
        "lumina": (lumina2_pairs, lora_lumina),
        "kandinsky5": (kandinsky5_pairs, lora_kandinsky5),
    }[request.param]
    params = pairs.make_params()
    pair, inputs = pairs.make_pair(params), pairs.make_inputs(params, (5, 9), (4, 6))
    pair.ours.requires_grad_(False)
    path = tmp_path_factory.mktemp("lora") / "trained.safetensors"
    args = {"network_reg_dims": r".*\.out.*=3"}
    network = module.create_network(pair.ours, NetworkRequest(dim=4, alpha=2, args=args))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    save_network(path, network.export_state(torch.bfloat16), {"ss_steps": "7"})

    @torch.no_grad()
    def run(model: nn.Module, side: str) -> Tensor:
        outputs = inputs.ours(model) if side == "ours" else inputs.theirs(model)
        return torch.cat([output.flatten() for output in outputs])

    return Made(pair.ours, pair.theirs, run, path)


def convert(monkeypatch: pytest.MonkeyPatch, source: Path, output: Path, to: str, *more: str) -> Path:
    words = [f"--input={source}", f"--output={output}", f"--to={to}", *more]
    monkeypatch.setattr(sys, "argv", ["convert_lora.py", *words])
    main()
    return output


def near(one: Tensor, other: Tensor, tolerance: float = 5e-3) -> bool:
    return bool((one - other).norm() < tolerance * other.norm())


def test_diffusers_and_peft_load_it_with_equal_output(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = convert(monkeypatch, made.path, tmp_path / "a.safetensors", "diffusers")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert near(made.output(path), made.expected) and not near(made.plain, made.expected, 0.02)
    made.theirs.load_lora_adapter(tmp_path, weight_name=path.name, use_safetensors=True, adapter_name="one")
    assert near(made.run(made.theirs, "theirs"), made.expected)
    made.theirs.delete_adapters("one")
    folder = convert(monkeypatch, made.path, tmp_path / "peft", "peft", "--dtype=float")
    assert near(made.output(folder), made.expected)
    wrapped = peft.PeftModel.from_pretrained(made.theirs, folder)
    assert near(made.run(wrapped, "theirs"), made.expected)
    wrapped.unload()


def test_kandinskys_own_code_loads_the_folder(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its steps: settings as they are, prefixes and `.default` cut off; no key may be left over."""
    folder = convert(monkeypatch, made.path, tmp_path / "peft", "peft")
    config = peft.LoraConfig(**json.loads((folder / "adapter_config.json").read_text()))
    model = copy.deepcopy(made.theirs)
    inject_adapter_in_model(config, model, "official")
    state = load_file(folder / "adapter_model.safetensors")
    state = {key.removeprefix("base_model.model.").replace(".default", ""): t for key, t in state.items()}
    result = set_peft_model_state_dict(model, state, "official")
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    assert near(made.run(model, "theirs"), made.expected)


def same(one: Path, other: Path) -> bool:
    tensors, others = load_file(one), load_file(other)
    return tensors.keys() == others.keys() and all(
        tensor.dtype == others[key].dtype and torch.equal(tensor, others[key])
        for key, tensor in tensors.items()
    )


def test_there_and_back_is_exact(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By ComfyUI's names bit for bit, alphas too; by diffusers' names once alpha is in the weights."""
    comfyui = convert(monkeypatch, made.path, tmp_path / "comfyui.safetensors", "comfyui")
    assert all(key.startswith(NAMES["comfyui"]) for key in load_file(comfyui))
    back = convert(monkeypatch, comfyui, tmp_path / "back.safetensors", "kohya")
    assert same(back, made.path) and inspect_lora(back).metadata["ss_steps"] == "7"
    diffusers = convert(monkeypatch, made.path, tmp_path / "diffusers.safetensors", "diffusers")
    kohya = convert(monkeypatch, diffusers, tmp_path / "kohya.safetensors", "kohya")
    assert all(key.startswith(NAMES["kohya"]) for key in load_file(kohya))
    assert {k: t.shape for k, t in load_file(kohya).items()} == {
        k: t.shape for k, t in load_file(made.path).items()
    }
    assert "lora_adapter_metadata" not in inspect_lora(kohya).metadata
    again = convert(monkeypatch, kohya, tmp_path / "again.safetensors", "diffusers")
    assert same(again, diffusers)
    folder = convert(monkeypatch, kohya, tmp_path / "peft", "peft")
    from_peft = convert(monkeypatch, folder, tmp_path / "from_peft.safetensors", "kohya")
    assert same(from_peft, kohya)


def test_an_adapter_of_peft_with_ranks_of_its_own_comes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """q, k and v of different ranks, v without any: fused for kohya, and apart again as they were."""
    random = torch.Generator().manual_seed(0)
    state = {}
    for part, rank, out in (("q", 2, 48), ("k", 3, 24)):
        name = f"transformer.layers.0.attn.to_{part}"
        state[f"{name}.lora_A.weight"] = torch.randn(rank, 48, generator=random)
        state[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=random)
    save_file(state, tmp_path / "a.safetensors")
    kohya = convert(monkeypatch, tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya")
    assert inspect_lora(kohya).ranks == {"lora_unet_layers_0_attention_qkv": 5}
    back = convert(monkeypatch, kohya, tmp_path / "b.safetensors", "diffusers")
    assert same(back, tmp_path / "a.safetensors")


def test_precision_and_names_of_lycoris(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "visual_transformer_blocks_0_cross_attention_to_query"
    tensors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.full((32, 32), 0.1), "alpha": torch.tensor(0.1)}
    source = tmp_path / "a.safetensors"
    save_file({f"lycoris_{name}.{key}": tensor for key, tensor in tensors.items()}, source)
    path = convert(monkeypatch, source, tmp_path / "b.safetensors", "comfyui", "--dtype=bf16")
    path_name = "diffusion_model.visual_transformer_blocks.0.cross_attention.to_query"
    written = load_file(path)
    assert {key: tensor.dtype for key, tensor in written.items()} == {
        f"{path_name}.lokr_w1": torch.bfloat16,
        f"{path_name}.lokr_w2": torch.bfloat16,
        f"{path_name}.alpha": torch.float32,
    }
    back = convert(monkeypatch, source, tmp_path / "k.safetensors", "kohya")
    assert set(load_file(back)) == {f"lora_unet_{name}.{key}" for key in tensors}
    with pytest.raises(CheckpointError, match="is neither a LoRA nor a DoRA"):
        convert(monkeypatch, source, tmp_path / "d.safetensors", "diffusers")
    assert not (tmp_path / "d.safetensors").exists()


def test_the_part_for_the_text_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    names = ("lora_unet_layers_0_attention_out", "lora_te_layers_0_mlp_up_proj")
    save_file({f"{n}.lora_{side}.weight": torch.ones(4, 4) for n in names for side in ("up", "down")}, source)
    kohya = convert(monkeypatch, source, tmp_path / "k.safetensors", "kohya")
    assert set(inspect_lora(kohya).ranks) == set(names)
    with pytest.raises(ConfigError, match="a part for the text encoder, for which --to comfyui .*--dit_only"):
        convert(monkeypatch, source, tmp_path / "c.safetensors", "comfyui")
    path = convert(monkeypatch, source, tmp_path / "c.safetensors", "comfyui", "--dit_only")
    assert set(inspect_lora(path).ranks) == {names[0]}


@pytest.mark.parametrize(
    ("output", "to", "message"),
    [
        ("b.ckpt", "kohya", "must end in .safetensors"),
        ("b.safetensors", "peft", "must name a folder"),
        ("a.safetensors", "kohya", "exists already"),
        ("b.safetensors", "musubi", "invalid choice"),
    ],
)
def test_mistakes_are_told(
    output: str, to: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.safetensors").write_text("")
    with pytest.raises(ConfigError, match=message):
        convert(monkeypatch, tmp_path / "a.safetensors", tmp_path / output, to)


def test_another_models_lora_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = {f"lora_unet_blocks_0_x.lora_{side}.weight": torch.ones(4, 4) for side in ("up", "down")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="'lora_unet_blocks_0_x', which is no layer of a model"):
        convert(monkeypatch, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
