"""The nano checkpoints: the formats of the real ones, the same numbers in each, and sane ones."""

import hashlib

import pytest
import torch
from diffusers import AutoencoderKL, Lumina2Transformer2DModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma2Model

from library.models.lumina2_format import NextDiTParams
from tools.make_nano_models import LAYOUT_NAMES, make_nano_models
from tools.nano.layouts import LAYOUTS
from tools.nano.nextdit import nextdit_shapes


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_seed_gives_the_same_files_and_another_gives_others(tmp_path, layout):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_nano_models(tmp_path / name, seed, layout)
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    weights = [name for name in first if name.endswith((".safetensors", ".model"))]
    assert weights and all(first[name] != other[name] for name in weights)


def test_the_tool_offers_every_layout():
    assert tuple(LAYOUTS) == LAYOUT_NAMES


def test_transformer_names_are_those_of_the_real_file():
    """400 tensors and 2,609,771,456 parameters: the published file."""
    shapes = nextdit_shapes(NextDiTParams())
    assert len(shapes) == 400
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_609_771_456


@pytest.mark.parametrize("layout", ["diffusers", "sharded"])
@pytest.mark.parametrize(
    ("part", "model"),
    [("transformer", Lumina2Transformer2DModel), ("vae", AutoencoderKL), ("text_encoder", Gemma2Model)],
)
def test_other_libraries_load_the_folders_completely(nano_in, layout, part, model):
    _, info = model.from_pretrained(nano_in(layout).tokenizer.parent / part, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_other_libraries_load_the_tokenizer(nano_in):
    tokenizer = AutoTokenizer.from_pretrained(nano_in("diffusers").tokenizer)
    ids = tokenizer("a portrait photograph")["input_ids"]
    assert ids[0] == 2 and 3 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a portrait photograph"


def test_every_layout_holds_the_same_numbers(nano_in):
    original = {
        k: t for p in (nano_in("original").dit, nano_in("original").ae) for k, t in load_file(p).items()
    }
    gemma2 = load_file(nano_in("original").gemma2)
    files = nano_in("comfyui").dit, nano_in("comfyui").ae
    comfyui = {k: t for path in files for k, t in load_file(path).items()}
    everything = load_file(nano_in("all_in_one").dit)
    for name, tensor in original.items():
        prefix = "vae." if name.startswith(("encoder.", "decoder.")) else "model.diffusion_model."
        assert torch.equal(comfyui[prefix + name].float(), tensor), name
        assert torch.equal(everything[prefix + name].float(), tensor), name
    for name, tensor in load_file(nano_in("diffusers").gemma2 / "model.safetensors").items():
        assert torch.equal(gemma2[f"model.{name}"].float(), tensor), name
        nested = everything[f"text_encoders.gemma2_2b.transformer.model.{name}"]
        assert torch.equal(nested.float(), tensor), name


def test_transformer_works_and_nothing_in_it_is_off(nano_in):
    model = Lumina2Transformer2DModel.from_pretrained(nano_in("diffusers").dit)
    x = torch.randn((2, 16, 8, 12), generator=torch.Generator().manual_seed(0))
    text = torch.randn((2, 9, 128), generator=torch.Generator().manual_seed(1)) * 3
    out = model(x, torch.tensor([0.2, 0.9]), text, torch.ones(2, 9, dtype=torch.bool), return_dict=False)[0]
    assert 0.3 < out.std() < 3
    out.square().mean().backward()
    assert all(parameter.grad.abs().max() > 1e-8 for parameter in model.parameters())


def test_command_line(run_script, tmp_path):
    done = run_script("tools/make_nano_models.py", "--output_dir", tmp_path, "--layout", "comfyui", cold=True)
    assert done.code == 0
    assert done.out.split() == [str(tmp_path / f"{name}.safetensors") for name in ("lumina", "gemma2", "ae")]
    assert all((tmp_path / f"{name}.safetensors").is_file() for name in ("lumina", "gemma2", "ae"))


def test_command_line_mistakes(run_script, tmp_path):
    wrong = run_script("tools/make_nano_models.py", "--output_dir", tmp_path, "--layout", "comfy")
    assert wrong.code == 2 and "comfyui" in wrong.err and "Traceback" not in wrong.err
    (tmp_path / "file").write_text("")
    blocked = run_script("tools/make_nano_models.py", "--output_dir", tmp_path / "file")
    assert blocked.code == 2 and "--output_dir" in blocked.err
