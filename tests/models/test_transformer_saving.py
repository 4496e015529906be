"""A model's weights in a file again: bit for bit, in the original layout or as diffusers reads them."""

import inspect
import json
import os
import stat
import weakref
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel, Lumina2Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library.core.checkpoint_files import open_checkpoint
from library.core.errors import ConfigError, NonFiniteError, StorageError
from library.models import kandinsky5_format, lumina2_format
from library.models.kandinsky5 import load_kandinsky5
from library.models.kandinsky5_format import inspect_kandinsky5
from library.models.lumina2 import load_nextdit
from library.models.lumina2_format import inspect_lumina2
from library.models.nextdit import NextDiT
from library.nn.weights.writer import WeightFile
from library.training.guards import require_finite
from tests.models import kandinsky5_pairs, lumina2_pairs
from tests.models.scaled_fp8 import in_scaled_fp8
from tools.make_nano_models import make_nano_kandinsky5

LUMINA, KANDINSKY, EDITING = "lumina", "kandinsky", "kandinsky i2i"


@dataclass(frozen=True)
class Family:
    """What the tests need of a family."""

    format: ModuleType
    inspect: object
    load: object
    pairs: ModuleType
    theirs: type


FAMILIES = {
    LUMINA: Family(lumina2_format, inspect_lumina2, load_nextdit, lumina2_pairs, Lumina2Transformer2DModel),
    KANDINSKY: Family(
        kandinsky5_format, inspect_kandinsky5, load_kandinsky5, kandinsky5_pairs, Kandinsky5Transformer3DModel
    ),
}
FAMILIES[EDITING] = FAMILIES[KANDINSKY]


@pytest.fixture(scope="module")
def nano_dit(nano_in, tmp_path_factory):
    """Return a function: family and layout -> where its transformer is."""

    @cache
    def made(layout):
        return make_nano_kandinsky5(tmp_path_factory.mktemp(f"nano_{layout}"), 0, layout)

    def transformer(family, layout):
        if family == LUMINA:
            return nano_in(layout).dit
        return made(layout).i2i if family == EDITING else made(layout).t2i

    return transformer


def load(family, path, dtype=torch.float32):
    return FAMILIES[family].load(path, device=torch.device("cpu"), dtype=dtype)


def writer(family, model, dtype=None, *, to="original_layout", tensor_of=None):
    """What writes a model; in the dtypes that its weights have, if none is given."""
    layout = getattr(FAMILIES[family].format, to)(model.params)
    tensor_of = tensor_of or model.get_parameter
    return WeightFile(layout, tensor_of, dtype or (lambda name: model.get_parameter(name).dtype))


def require_same(model: nn.Module, other: nn.Module):
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


CASES = [(LUMINA, layout) for layout in ("original", "comfyui", "all_in_one", "diffusers", "sharded")]
CASES += [(KANDINSKY, layout) for layout in ("original", "comfyui", "sharded")] + [(EDITING, "comfyui")]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_original_layout_comes_out_whichever_goes_in(nano_dit, tmp_path, family, layout):
    path, inspected = tmp_path / "trained.safetensors", FAMILIES[family].inspect
    model = load(family, nano_dit(family, layout))
    writer(family, model).write(path, {"ss_steps": "7"})
    original = open_checkpoint(nano_dit(family, "original")).tensors
    written = open_checkpoint(path).tensors
    assert {name: info.shape for name, info in written.items()} == {
        name: info.shape for name, info in original.items()
    }
    assert inspected(path).layout == "original"
    assert inspected(path).params == inspected(nano_dit(family, layout)).params
    require_same(load(family, path), model)
    with safe_open(path, "pt") as handle:
        assert handle.metadata()["ss_steps"] == "7"
        assert handle.metadata()["format"] == "pt"


def test_lumina_in_and_out_is_the_same_file_but_for_the_norm_that_nobody_reads(nano_dit, tmp_path):
    """sd-scripts builds its network with `norm_final`, on no device, and fails if the file has none."""
    source = nano_dit(LUMINA, "original")
    writer(LUMINA, load(LUMINA, source)).write(tmp_path / "a.safetensors", {})
    before, after = load_file(source), load_file(tmp_path / "a.safetensors")
    assert torch.equal(after.pop("norm_final.weight"), torch.ones(192))
    del before["norm_final.weight"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("family", "exact"), [(LUMINA, "t_embedder."), (KANDINSKY, "time_embeddings.")])
def test_a_bf16_model_keeps_its_few_fp32_weights(nano_dit, tmp_path, family, exact):
    model = load(family, nano_dit(family, "original"), torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.234)
    writer(family, model).write(tmp_path / "a.safetensors", {})
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.startswith(exact) else torch.bfloat16), name
    require_same(load(family, tmp_path / "a.safetensors", torch.bfloat16), model)


@pytest.mark.parametrize("family", [LUMINA, KANDINSKY])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_precision_is_that_of_every_tensor(nano_dit, tmp_path, family, dtype):
    """Here the weights come from elsewhere, as exact ones do that training keeps beside the model's."""
    model = load(family, nano_dit(family, "original"), torch.bfloat16)
    exact = {name: torch.randn(weight.shape) for name, weight in model.named_parameters()}
    writer(family, model, dtype, tensor_of=exact.__getitem__).write(tmp_path / "a.safetensors", {})
    written = load_file(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    assert all(torch.equal(written[name], exact[name].to(dtype)) for name in exact)


@pytest.mark.parametrize("family", [LUMINA, KANDINSKY])
def test_a_file_in_fp8_with_scales_gives_one_without(nano_dit, tmp_path, family):
    tensors = load_file(nano_dit(family, "original"))
    chosen = {f"{n}.weight" for n in FAMILIES[family].format.linear_layers(_params(family, nano_dit))}
    save_file(in_scaled_fp8(tensors, chosen.__contains__)[0], tmp_path / "fp8.safetensors")
    model = load(family, tmp_path / "fp8.safetensors", torch.bfloat16)
    writer(family, model).write(tmp_path / "a.safetensors", {})
    assert open_checkpoint(tmp_path / "a.safetensors").tensors.keys() == tensors.keys()
    require_same(load(family, tmp_path / "a.safetensors", torch.bfloat16), model)


def _params(family, nano_dit):
    return FAMILIES[family].inspect(nano_dit(family, "original")).params


class TestDiffusers:
    """The folder that diffusers reads."""

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            (LUMINA, {}),
            (LUMINA, {"ffn_dim": 256, "norm_eps": 1e-4}),  # what diffusers makes of a width of 48 by itself
            (
                LUMINA,
                {"ffn_dim": 1023, "axes_dims": (8, 2, 2), "n_noise_refiners": 0, "n_context_refiners": 0},
            ),
            (KANDINSKY, {}),
            (KANDINSKY, {"in_channels": 33, "axes_dims": (16, 8, 8)}),
        ],
    )
    def test_diffusers_draws_with_it_as_we_do(self, tmp_path, family, changes):
        pairs, theirs = FAMILIES[family].pairs, FAMILIES[family].theirs
        params = pairs.make_params(**changes)
        ours = pairs.make_pair(params).ours
        writer(family, ours, to="diffusers_layout").write(tmp_path / "name", {})
        assert sorted(path.name for path in (tmp_path / "name").rglob("*")) == [
            "config.json", "diffusion_pytorch_model.safetensors", "transformer",
        ]  # fmt: skip
        loaded, found = theirs.from_pretrained(
            tmp_path / "name", subfolder="transformer", output_loading_info=True
        )
        assert not any(found.values()), found
        config = json.loads((tmp_path / "name" / "transformer" / "config.json").read_text())
        assert config.keys() - inspect.signature(theirs).parameters.keys() == {"_class_name"}
        inputs = pairs.make_inputs(params, (3, 5), (4, 6))
        with torch.no_grad():
            expected, drawn = inputs.theirs(loaded), inputs.ours(ours)
        for one, other in zip(expected, drawn, strict=True):
            # Kandinsky's rotated queries and keys are rounded to bf16, so its last bit may show.
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_we_read_it_back(self, nano_dit, tmp_path, family):
        """With an epsilon that diffusers' configuration has no word for."""
        model = load(family, nano_dit(family, "original"))
        writer(family, model, to="diffusers_layout").write(tmp_path / "name", {"ss_steps": "7"})
        found = FAMILIES[family].inspect(tmp_path / "name")
        assert found.params == model.params
        assert found.checkpoint.metadata["ss_steps"] == "7"
        require_same(load(family, tmp_path / "name"), model)

    def test_diffusers_own_conversion_of_the_original_file_is_our_folder(self, tmp_path):
        """It knows one width of queries, keys and values: that of the 2B model."""
        params = lumina2_pairs.make_params(
            dim=2304, n_heads=24, n_kv_heads=8, head_dim=96, axes_dims=(32, 32, 32), time_dim=1024, n_layers=1
        )
        with torch.device("meta"):
            model = NextDiT(params).bfloat16()
        model.to_empty(device="cpu")
        with torch.no_grad():
            for weight in model.parameters():
                weight.view(-1).copy_(torch.arange(weight.numel()) % 251 - weight.dim())
        writer(LUMINA, model).write(tmp_path / "a.safetensors", {})
        writer(LUMINA, model, to="diffusers_layout").write(tmp_path / "b", {})
        theirs = Lumina2Transformer2DModel.from_single_file(
            str(tmp_path / "a.safetensors"),
            config=str(tmp_path / "b"),
            subfolder="transformer",
            torch_dtype=torch.bfloat16,
        ).state_dict()
        ours = load_file(tmp_path / "b" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"n_context_refiners": 2}, "as many refiners .* would be 1 and is 2 here"),
            ({"head_dim": 16}, "heads as wide as .* would be 48 and is 64 here"),
            ({"time_dim": 50}, "a timestep as wide as"),
            ({"time_frequencies": 64}, "256 frequencies of the timestep"),
            ({"rope_theta": 500.0}, "rope_theta 10000, which would be 10000 and is 500.0 here"),
        ],
    )
    def test_what_its_class_cannot_be_is_refused(self, changes, words):
        params = lumina2_pairs.make_params(**changes)
        with pytest.raises(ConfigError, match=f"--save_format diffusers cannot .*{words}"):
            lumina2_format.diffusers_layout(params)

    def test_the_configuration_of_the_released_model(self):
        """Nothing but what diffusers takes by itself, so that it can be left out of comparisons."""
        config = lumina2_format.diffusers_layout(lumina2_format.NextDiTParams()).config
        assert (config["multiple_of"], config["ffn_dim_multiplier"]) == (256, None)
        config = kandinsky5_format.diffusers_layout(kandinsky5_format.Kandinsky5Params()).config
        assert config["visual_cond"] is False

    @pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
    def test_the_folder_can_be_read_by_whom_the_umask_lets(self, nano_dit, tmp_path):
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "file").touch()
        writer(LUMINA, load(LUMINA, nano_dit(LUMINA, "original")), to="diffusers_layout").write(
            tmp_path / "a", {}
        )
        wanted = [
            stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "plain", tmp_path / "plain" / "file")
        ]
        modes = [
            stat.S_IMODE((tmp_path / "a" / part).stat().st_mode)
            for part in ("transformer", "transformer/config.json")
        ]
        assert modes == wanted


class TestFailing:
    """Whatever goes wrong, what was there is there."""

    @pytest.fixture(params=["original_layout", "diffusers_layout"])
    def saved(self, request, nano_dit, tmp_path):
        """A model, what writes it, and where it was written once."""
        model = load(LUMINA, nano_dit(LUMINA, "original"))
        path = tmp_path / "out" / ("a" if request.param == "diffusers_layout" else "a.safetensors")
        write = writer(LUMINA, model, to=request.param)
        write.write(path, {"ss_steps": "1"})
        yield model, write, path
        assert [found.name for found in path.parent.iterdir()] == [path.name]
        assert open_checkpoint(path, subfolder="transformer").metadata["ss_steps"] == "1"

    def test_numbers_that_are_not_finite(self, nano_dit, saved):
        model, write, path = saved
        weight = model.get_parameter("layers.2.attention.qkv.weight")
        weight.data = weight.data.clone()
        weight.data[-1, -1] = torch.nan

        def check(name, tensor):
            require_finite({name: tensor}, "the trained weights after step 2")

        with pytest.raises(NonFiniteError, match=r"after step 2, 'layers\.2\.att.*' holds NaN or infinite"):
            write.write(path, {"ss_steps": "2"}, check=check)

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
    def test_a_disk_that_refuses_in_the_middle(self, saved):
        import resource

        _, write, path = saved
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            with pytest.raises(StorageError, match=rf"Could not write {path}: file too large"):
                write.write(path, {"ss_steps": "2"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def test_no_room_is_said_before_anything_is_written(self, saved, monkeypatch):
        _, write, path = saved
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
        with pytest.raises(
            StorageError, match=r"it needs .* MiB and the disk has 1\.0 MiB free\. Make room\."
        ):
            write.write(path, {"ss_steps": "2"}, advice="Make room.")

    def test_an_overflow_of_the_precision_is_one_too(self, nano_dit, saved, tmp_path):
        model, _, path = saved
        weight = model.get_parameter("x_embedder.bias")
        weight.data = weight.data + 1e6
        with pytest.raises(NonFiniteError, match="'x_embedder.bias'"):
            writer(LUMINA, model, torch.float16).write(
                tmp_path / "b.safetensors", {}, check=lambda n, t: require_finite({n: t}, "it")
            )
        assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("to", ["original_layout", "diffusers_layout"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, to):
    """What was asked for, and what was made of it, is gone when the next is asked for."""
    model = NextDiT(lumina2_pairs.make_params())
    alive = weakref.WeakSet()
    asked = []

    def tensor_of(name):
        assert not alive, asked
        exact = model.get_parameter(name).double()
        alive.add(exact)
        asked.append(name)
        return exact

    def check(name, tensor):
        assert not alive, name
        alive.add(tensor)

    path = tmp_path / "a"
    writer(LUMINA, model, torch.bfloat16, to=to, tensor_of=tensor_of).write(path, {}, check=check)
    blocks = model.params.n_blocks
    fused = 2 * blocks if to == "diffusers_layout" else 0
    assert len(asked) == len(list(model.parameters())) + fused
    assert not alive


def test_settings_go_into_the_metadata_and_a_word_of_the_caller_wins(tmp_path):
    params = replace(lumina2_pairs.make_params(), rope_theta=500.0)
    model = NextDiT(params)
    writer(LUMINA, model).write(tmp_path / "a.safetensors", {"format": "np"})
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        metadata = handle.metadata()
    assert json.loads(metadata["rope_theta"]) == 500.0
    assert metadata["format"] == "np"
    assert inspect_lumina2(tmp_path / "a.safetensors").params == params
