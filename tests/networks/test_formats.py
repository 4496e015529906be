"""Names of other tools: what they write is read with the right strength, and what is written they load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.core.errors import CheckpointError
from library.options.ema import EmaOptions
from library.options.saving import SavingOptions
from library.training.events import Moment
from library.training.output.ema import Ema
from library.training.output.network_file import NetworkFile
from networks import lora_kandinsky5, lora_lumina
from networks.family_lora import LoRAModule
from networks.files import inspect_lora
from networks.formats import to_comfyui, to_diffusers
from networks.from_file import create_network_from_file
from networks.lora import LoRANetwork
from networks.request import NetworkRequest
from tests.models import kandinsky5_pairs, lumina2_pairs
from tests.training.test_metadata import make_facts

RANK, ALPHA = 4, 6.0
TARGETS = [
    "text_transformer_blocks.1.feed_forward.out_layer",
    *(f"visual_transformer_blocks.0.cross_attention.{name}" for name in ("to_key", "out_layer")),
]


class Case:
    """A family's tiny model, ours and diffusers', and inputs for both."""

    def __init__(self, module: LoRAModule, ours: nn.Module, theirs: nn.Module, run: Callable) -> None:
        self.module, self.ours, self.theirs, self._run = module, ours, theirs, run

    def with_network(self, network: LoRANetwork) -> Tensor:
        """Our model's output with a network on it."""
        network.apply_to(self.ours)
        made = self._run(self.ours, "ours")
        network.remove()
        return made

    @torch.no_grad()
    def with_file(self, path: Path) -> Tensor:
        """The output of diffusers' model with a file that it has loaded by itself."""
        self.theirs.load_lora_adapter(
            path.parent, weight_name=path.name, use_safetensors=True, adapter_name="one"
        )
        made = self._run(self.theirs, "theirs")
        self.theirs.delete_adapters("one")
        return made


@pytest.fixture(scope="module", params=["lumina", "kandinsky5"])
def case(request: pytest.FixtureRequest) -> Case:
    pairs, module = {
        "lumina": (lumina2_pairs, lora_lumina),
        "kandinsky5": (kandinsky5_pairs, lora_kandinsky5),
    }[request.param]
    params = pairs.make_params()
    pair, inputs = pairs.make_pair(params), pairs.make_inputs(params, (5, 9), (4, 6))
    pair.ours.requires_grad_(False)

    def run(model: nn.Module, side: str) -> Tensor:
        outputs = inputs.ours(model) if side == "ours" else inputs.theirs(model)
        return torch.cat([output.flatten() for output in outputs]).detach()

    return Case(module, pair.ours, pair.theirs, run)


ARGS = {
    "ranks of their own": {"mod_dim": "2", "network_reg_dims": ".*out.*=5", "embedder_dims": "[1,2,3]"},
    "pissa": {"init": "pissa"},
    "dora": {"dora_wd": "True", "wd_on_output": "True"},
}


def trained(case: Case, args: dict[str, str]) -> LoRANetwork:
    if case.module is lora_kandinsky5 and "embedder_dims" in args:
        args = args | {"embedder_dims": "[1,2,3,4]"}
    network = case.module.create_network(case.ours, NetworkRequest(dim=RANK, alpha=ALPHA, args=args))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, network.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    return network


def near(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((one - other).norm() < tolerance * other.norm())


@pytest.mark.parametrize("args", ARGS.values(), ids=ARGS)
def test_diffusers_loads_what_a_run_saves(case: Case, args: dict[str, str], tmp_path: Path) -> None:
    network = trained(case, args)
    expected = case.with_network(network)
    plain = case.with_network(case.module.create_network(case.ours, NetworkRequest(dim=1)))
    saving = SavingOptions(output_dir=tmp_path, save_format="diffusers")
    writer = NetworkFile(network, make_facts(), saving)
    (path,) = writer.write(tmp_path / "last.safetensors", Moment(7, 2, epoch_ended=True, run_ended=True))
    assert near(case.with_file(path), expected) and not near(plain, expected, 0.01)
    stored = load_file(path)
    assert all(key.startswith("transformer.") for key in stored)
    assert not any("alpha" in key for key in stored)
    metadata = inspect_lora(path).metadata
    assert metadata["ss_steps"] == "7" and metadata["sshs_model_hash"]
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.r"] in (RANK, 2 * RANK)
    again = create_network_from_file(case.ours, path)
    assert near(case.with_network(again), expected)
    without = tmp_path / "without.safetensors"  # a reader that knows nothing of settings takes scale 1
    if "dora_wd" not in args:
        save_file(stored, without)
        assert near(case.with_network(create_network_from_file(case.ours, without)), expected)


def test_averages_and_precision_go_through_the_same_writer(case: Case, tmp_path: Path) -> None:
    network = trained(case, {})
    ema = Ema(network.named_parameters(), EmaOptions(ema=True, ema_decay=0.5))
    for parameter in network.parameters():
        parameter.data.mul_(1.5)
    saving = SavingOptions(output_dir=tmp_path, save_format="diffusers", save_precision="bf16")
    writer = NetworkFile(network, make_facts(), saving, ema)
    files = writer.write(tmp_path / "last.safetensors", Moment(7, 2, epoch_ended=True, run_ended=True))
    assert [path.name for path in files] == ["last.safetensors", "last-ema.safetensors"]
    trained_file, average = map(load_file, files)
    assert trained_file.keys() == average.keys()
    for key, tensor in trained_file.items():
        assert tensor.dtype == torch.bfloat16
        assert near(tensor.float(), 1.5 * average[key].float(), 0.01)


def test_split_qkv_needs_no_more_ranks_in_diffusers(randomise: Callable, lumina_like: Callable) -> None:
    model = lumina_like()
    ranks = {}
    for split in ("True", "False"):
        request = NetworkRequest(dim=3, args={"split_qkv": split, "include_patterns": r"layers\.0.*qkv"})
        network = lora_lumina.create_network(model, request)
        randomise(network)
        tensors = to_diffusers(network.export_state(), "x").tensors
        downs = [tensors[f"layers.0.attn.to_{part}.lora_A.weight"] for part in "qkv"]
        ranks[split] = [len(down) for down in downs]
        assert torch.equal(downs[0], downs[1]) == (split == "False")
        ups = [tensors[f"layers.0.attn.to_{part}.lora_B.weight"] for part in "qkv"]
        assert [len(up) for up in ups] == [12, 4, 4]
        (lora,) = network.loras.values()
        delta = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)])
        assert near(delta, lora.delta(model.get_submodule("layers.0.attention.qkv").weight), 1e-5)
    assert ranks == {"True": [3, 3, 3], "False": [3, 3, 3]}


def rows(down: Tensor, up: Tensor) -> dict[str, tuple[dict[str, Tensor], dict[str, str], float]]:
    """The rows of the table of formats: tensors of one layer, {} being its name; metadata; strength."""
    lora = {".lora_A.weight": down, ".lora_B.weight": up}
    kohya = {".lora_down.weight": down, ".lora_up.weight": up, ".alpha": torch.tensor(ALPHA)}
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    named = {"lora_adapter_metadata": json.dumps(settings)}
    official = {".lora_A.default.weight": down.bfloat16(), ".lora_B.default.weight": up.bfloat16()}

    def of(prefix: str, tensors: dict[str, Tensor], *, dots: bool = True) -> dict[str, Tensor]:
        name = prefix + ("{}" if dots else "{_}")
        return {name + ending: tensor for ending, tensor in tensors.items()}

    alpha = {".alpha": torch.tensor(ALPHA)}
    scale = ALPHA / RANK
    return {
        "diffusers, with settings": (of("transformer.", lora), named, scale),
        "diffusers, without": (of("transformer.", lora), {}, 1.0),
        "diffusers, baked": (of("transformer.", lora | {".lora_B.weight": up * scale}), {}, scale),
        "diffusers, .alpha": (of("transformer.", lora | alpha), {}, scale),
        "diffusers, .lora_alpha": (
            of("transformer.", lora | {".lora_alpha": torch.tensor(ALPHA)}),
            {},
            scale,
        ),
        "kohya, musubi": (of("lora_unet_", kohya, dots=False), {}, scale),
        "comfyui": (of("diffusion_model.", lora | alpha), {}, scale),
        "comfyui, no alpha": (of("diffusion_model.", lora), {}, 1.0),
        "whole checkpoint": (of("model.diffusion_model.", lora | alpha), {}, scale),
        "bare": (of("", lora), {}, 1.0),
        "official trainer": (of("base_model.model.", official), {}, 1.0),
        "peft": (of("base_model.model.", lora), {}, 1.0),
        "lycoris": (of("lycoris_", kohya, dots=False), {}, scale),
        "onetrainer": (of("lora_transformer_", kohya, dots=False), {}, scale),
        "onetrainer, dots": (of("transformer.", kohya), {}, scale),
    }


@pytest.fixture(scope="module")
def kandinsky5() -> nn.Module:
    return kandinsky5_pairs.make_pair(kandinsky5_pairs.make_params()).ours.requires_grad_(False)


@pytest.mark.parametrize("row", rows(torch.zeros(1), torch.zeros(1)))
def test_every_format_of_kandinsky_is_read_with_its_strength(
    kandinsky5: nn.Module, row: str, tmp_path: Path
) -> None:
    state, expected, metadata = {}, {}, {}
    random = torch.Generator().manual_seed(4)
    for path in TARGETS:
        layer = kandinsky5.get_submodule(path)
        down = torch.randn(RANK, layer.in_features, generator=random).bfloat16().float()
        up = torch.randn(layer.out_features, RANK, generator=random).bfloat16().float()
        tensors, metadata, scale = rows(down, up)[row]
        names = {"{}": path, "{_}": path.replace(".", "_")}
        for key, tensor in tensors.items():
            place = "{_}" if "{_}" in key else "{}"
            state[key.replace(place, names[place])] = tensor
        expected[path] = scale * up @ down
    save_file(state, tmp_path / "a.safetensors", metadata)
    network = create_network_from_file(kandinsky5, tmp_path / "a.safetensors")
    assert set(network.paths.values()) == set(TARGETS)
    for name, path in network.paths.items():
        delta = network.loras[name].delta(kandinsky5.get_submodule(path).weight)
        assert near(delta, expected[path], 1e-5), path


@pytest.mark.parametrize("official", [True, False])
def test_settings_beside_a_file_are_for_files_of_peft(
    kandinsky5: nn.Module, official: bool, tmp_path: Path
) -> None:
    prefix = "base_model.model." if official else ""
    layer = kandinsky5.get_submodule(TARGETS[0])
    state = {
        f"{prefix}{TARGETS[0]}.lora_A.default.weight": torch.ones(RANK, layer.in_features),
        f"{prefix}{TARGETS[0]}.lora_B.default.weight": torch.ones(layer.out_features, RANK),
    }
    save_file(state, tmp_path / "lora_1000.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2 * RANK}))
    network = create_network_from_file(kandinsky5, tmp_path / "lora_1000.safetensors")
    assert [lora.scale for lora in network.loras.values()] == [2.0 if official else 1.0]


def test_what_has_no_names_elsewhere_is_told(lumina_like: Callable) -> None:
    name = "lora_unet_layers_0_attention_out"
    lora = {
        f"{name}.lora_down.weight": torch.ones(2, 12),
        f"{name}.lora_up.weight": torch.ones(12, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }
    with pytest.raises(
        CheckpointError, match="x has a DoRA of 'layers.0.attention.out' with a length for each col"
    ):
        to_diffusers(lora | {f"{name}.dora_scale": torch.ones(1, 12)}, "x")
    other = {key.replace("out", "qkv"): tensor for key, tensor in lora.items()}
    with pytest.raises(CheckpointError, match="x has LoRAs and DoRAs"):
        to_diffusers(lora | other | {f"{name}.dora_scale": torch.ones(12, 1)}, "x")
    with pytest.raises(CheckpointError, match="'layers.0.attention.out', which is neither a LoRA nor"):
        to_diffusers({f"{name}.diff": torch.ones(12, 12)}, "x")
    with pytest.raises(CheckpointError, match="x has 'lora_te_layers_0_q_proj', which is no layer"):
        to_comfyui(lora | {"lora_te_layers_0_q_proj.alpha": torch.ones(())}, "x")


def test_settings_are_only_what_peft_knows(lumina_like: Callable, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = lumina_like()
    request = NetworkRequest(dim=RANK, args={"mlp_dim": "2"})
    adapter = to_diffusers(lora_lumina.create_network(model, request).export_state(), "x")
    config = LoraConfig(**adapter.settings)
    assert config.r == config.lora_alpha == RANK and set(config.rank_pattern.values()) == {2}
    save_file(adapter.prefixed("transformer"), tmp_path / "a.safetensors", adapter.metadata())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.metadata()) == {"lora_adapter_metadata"}
