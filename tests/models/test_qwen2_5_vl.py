"""Qwen2.5-VL against transformers' own: texts and pictures, batches, layouts, streamed, quantised."""

import json
import weakref
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from library.core.errors import ConfigError
from library.core.seeds import generator
from library.models.qwen2_5_vl import Qwen2_5_VLEncoder, QwenInput, State, load_qwen2_5_vl, rope_positions
from library.models.qwen2_5_vl_format import inspect_qwen2_5_vl
from library.nn.weights.quant import QuantLinear
from library.nn.weights.schemes import SCHEMES
from library.options.quant import TextQuantOptions
from library.training.lending import Lending
from tests.models.scaled_fp8 import in_scaled_fp8
from tests.strict_copier import StrictCopier
from tools.nano.files import write_file, write_json, write_shards
from tools.nano.kandinsky5_qwen import PARAMS, qwen_config, qwen_tensors

CPU = torch.device("cpu")
IMAGE = PARAMS.image_token_id
GRIDS = [(1, 2, 2), (1, 4, 10), (1, 22, 18), (1, 16, 16)]  # a window is 8 x 8 patches
LIMITS = {"fp8": 0.08, "int8": 0.02, "int4": 0.25, "nf4": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as released, in two shards."""
    folder = tmp_path_factory.mktemp("qwen")
    write_shards(folder, "model", qwen_tensors(0), 2)
    write_json(folder / "config.json", qwen_config())
    return folder


@pytest.fixture(scope="module")
def oracles(folder):
    """Return transformers' whole models, by dtype."""
    dtypes = (torch.float32, torch.bfloat16)
    return {d: Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=d).eval() for d in dtypes}


@pytest.fixture(scope="module")
def encoder(folder):
    return load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=True)


def text(length, seed=1):
    ids = torch.randint(0, 580, (length,), generator=generator(seed, "ids", length))
    return QwenInput(ids.tolist())


def with_picture(grid, before=7, behind=4):
    count = grid[1] * grid[2]
    patches = torch.randn(count, 1176, generator=generator(2, "patches", *grid))
    ids = [*text(before).token_ids, *[IMAGE] * (count // 4), *text(behind, seed=3).token_ids]
    return QwenInput(ids, patches, grid)


INPUTS = [text(9), with_picture((1, 4, 6)), text(1), text(14), with_picture((1, 10, 8), behind=0)]


def expected(oracle, sequence):
    """What transformers gives, shown the picture as its processor would."""
    more = {}
    if sequence.patches_NP is not None:
        kinds = (torch.tensor([sequence.token_ids]) == IMAGE).int()
        more = {
            "pixel_values": sequence.patches_NP,
            "image_grid_thw": torch.tensor([sequence.grid_thw]),
            "mm_token_type_ids": kinds,
        }
    with torch.no_grad():
        found = oracle(torch.tensor([sequence.token_ids]), output_hidden_states=True, **more)
    return found.hidden_states[-1][0]


def relative_error(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.mark.parametrize("length", [1, 5, 40])
def test_texts_equal_transformers(oracles, encoder, length):
    (features,) = encoder.encode([text(length)])
    assert features.shape == (length, PARAMS.hidden)
    assert features.std() > 0.3
    assert relative_error(features, expected(oracles[torch.float32], text(length))) < 1e-5


@pytest.mark.parametrize("grid", GRIDS)
def test_pictures_equal_transformers(oracles, encoder, grid):
    sequence = with_picture(grid)
    (features,) = encoder.encode([sequence])
    assert relative_error(features, expected(oracles[torch.float32], sequence)) < 1e-5


def test_bf16_is_as_near_to_fp32_as_transformers(oracles, folder):
    encoder = load_qwen2_5_vl(folder, device=CPU, dtype=torch.bfloat16, vision=True)
    for sequence in (text(30), with_picture((1, 10, 8))):
        (features,) = encoder.encode([sequence])
        exact = expected(oracles[torch.float32], sequence)
        theirs = relative_error(expected(oracles[torch.bfloat16], sequence), exact)
        assert features.dtype == torch.bfloat16
        assert relative_error(features, exact) < 1.3 * theirs


def test_the_comparison_would_notice(encoder):
    """Another picture, the same one turned, and tokens elsewhere move features by more than the tolerance."""
    sequence = with_picture((1, 4, 10))
    (features,) = encoder.encode([sequence])
    (turned,) = encoder.encode([QwenInput(sequence.token_ids, sequence.patches_NP, (1, 10, 4))])
    (other,) = encoder.encode([QwenInput(sequence.token_ids, -sequence.patches_NP, (1, 4, 10))])
    assert relative_error(turned[-4:], features[-4:]) > 1e-3
    assert relative_error(other[-4:], features[-4:]) > 1e-2
    assert torch.equal(other[:7], features[:7])  # nothing is seen before it comes


@pytest.mark.parametrize("grid", [*GRIDS, None])
@pytest.mark.parametrize(("before", "behind"), [(0, 3), (5, 0), (6, 2)])
def test_positions_equal_transformers(oracles, grid, before, behind):
    sequence = text(before + behind) if grid is None else with_picture(grid, before, behind)
    ids = torch.tensor([sequence.token_ids])
    grids = None if grid is None else torch.tensor([grid])
    theirs, _ = oracles[torch.float32].model.get_rope_index(ids, (ids == IMAGE).int(), grids)
    assert torch.equal(rope_positions(sequence, PARAMS), theirs[:, 0])


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_batch_of_different_lengths_equals_each_alone(encoder, batch_size):
    together = encoder.encode(INPUTS, batch_size=batch_size)
    for sequence, features in zip(INPUTS, together, strict=True):
        assert len(features) == len(sequence.token_ids)
        assert relative_error(features, encoder.encode([sequence])[0]) < 1e-5
        assert features.untyped_storage().nbytes() == features.nbytes  # keeps no padding alive


def test_image_tokens_without_a_picture_are_tokens(oracles, encoder):
    sequence = QwenInput([3, IMAGE, 5])
    assert relative_error(encoder.encode([sequence])[0], expected(oracles[torch.float32], sequence)) < 1e-5


def test_nothing_to_encode(encoder):
    assert encoder.encode([]) == []
    assert [len(f) for f in encoder.encode([QwenInput([]), text(3)])] == [0, 3]


def test_what_does_not_go_together_is_refused(encoder):
    with pytest.raises(ConfigError, match="token 700, but .* weights have 600"):
        encoder.encode([QwenInput([4, 700])])
    whole = with_picture((1, 4, 4))
    for ids in (whole.token_ids[:8], [IMAGE, *whole.token_ids], [*whole.token_ids[:9], 5, IMAGE, IMAGE]):
        with pytest.raises(ConfigError, match="image tokens, but the picture stands for 4"):
            encoder.encode([QwenInput(ids, whole.patches_NP, whole.grid_thw)])


def released_to(prefixes):
    """Return a function that renames the tensors of the released folders."""
    return lambda name: next(
        (new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), name
    )


LAYOUTS = {
    "released": (),
    "transformers 5": (("model.", "model.language_model."), ("visual.", "model.visual.")),
    "Qwen2_5_VLModel": (("model.", "language_model."),),
    "Qwen2_5_VLTextModel": (("model.", ""), ("visual.", "ignored.visual.")),
    "all in one": (
        ("model.", "text_encoders.qwen25_7b.transformer.model."),
        ("visual.", "text_encoders.qwen25_7b.transformer.visual."),
        ("lm_head.", "text_encoders.qwen25_7b.transformer.lm_head."),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_network(encoder, tmp_path, layout):
    rename = released_to(LAYOUTS[layout])
    vision = layout != "Qwen2_5_VLTextModel"
    tensors = {rename(name): tensor for name, tensor in qwen_tensors(0).items()}
    if not vision:
        tensors = {name: t for name, t in tensors.items() if not name.startswith(("ignored.", "lm_head"))}
    save_file(tensors, tmp_path / "q.safetensors", {"config": json.dumps(qwen_config())})
    found = inspect_qwen2_5_vl(tmp_path / "q.safetensors", vision=vision)
    assert not any("lm_head" in name for name in found.checkpoint.tensors)
    loaded = load_qwen2_5_vl(found, device=CPU, dtype=torch.float32, vision=vision)
    wanted = dict(encoder.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    sequence = with_picture((1, 4, 4)) if vision else text(6)
    assert torch.equal(loaded.encode([sequence])[0], encoder.encode([sequence])[0])


def test_without_vision_there_is_no_tower_and_never_a_head(folder, encoder):
    blind = load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=False)
    names = {name for name, _ in blind.named_parameters()}
    assert names == {name for name, _ in encoder.named_parameters() if name.startswith("language_model.")}
    assert torch.equal(blind.encode([text(9)])[0], encoder.encode([text(9)])[0])
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(t.is_meta for t in (*encoder.parameters(), *encoder.buffers()))


class Watched:
    """Which blocks were computed, in which order, and whether with weights of the ring."""

    def __init__(self, encoder, copier):
        self.order, self.copier = [], copier
        for kind, blocks in (
            ("seeing", getattr(encoder.visual, "blocks", ())),
            ("layer", encoder.language_model.layers),
        ):
            for number, block in enumerate(blocks):
                block.register_forward_pre_hook(self.note(kind, number))

    def note(self, kind, number):
        def hook(block, _):
            self.order.append((kind, number))
            for tensor in (*block.parameters(), *block.buffers()):
                assert self.in_a_room(tensor)

        return hook

    def in_a_room(self, tensor):
        address = tensor.data_ptr()
        return any(r.data_ptr() <= address < r.data_ptr() + r.nbytes for r in self.copier.rooms)


@pytest.fixture
def strict(monkeypatch):
    """Copies to the device that show every mistake in their order; all they make is "on the device"."""
    copier = StrictCopier()
    monkeypatch.setattr("library.nn.swap.block_swap.copier_for", lambda device, page_locked: copier)
    return copier


@pytest.mark.parametrize("states_on_device", [0, 2**29])
@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_streamed_is_bit_equal(folder, strict, scheme, states_on_device):
    options = {"device": CPU, "dtype": torch.bfloat16, "vision": True}
    options["quant"] = TextQuantOptions(text_encoder_quant=scheme)
    stays = load_qwen2_5_vl(folder, **options).encode(INPUTS, batch_size=2)
    encoder = load_qwen2_5_vl(folder, **options, streamed=True)
    encoder.states_on_device = states_on_device
    for _ in range(2):  # the second time the ring knows what comes after the last layer
        streamed = encoder.encode(INPUTS, batch_size=2)
        assert all(torch.equal(a, b) for a, b in zip(stays, streamed, strict=True))


def test_streamed_one_layer_at_a_time(folder, strict):
    encoder = load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=True, streamed=True)
    watched = Watched(encoder, strict)
    encoder.encode(INPUTS, batch_size=2)
    pictures, batches = 2, 3
    assert watched.order == [
        *[("seeing", number) for number in range(2) for _ in range(pictures)],
        *[("layer", number) for number in range(PARAMS.layers) for _ in range(batches)],
    ]
    assert strict.late <= 2  # nothing but the first block of each stack is waited for


def test_streamed_weights_on_the_device(folder, strict):
    """Next to norms and the ends of the vision tower, the device has room for two layers and two blocks."""
    encoder = load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=True, streamed=True)
    encoder.encode(INPUTS)
    shapes = {name: p.numel() * 4 for name, p in encoder.named_parameters()}

    def bytes_of(prefix):
        return sum(size for name, size in shapes.items() if name.startswith(prefix))

    ends = bytes_of("visual.patch_embed.") + bytes_of("visual.merger.") + bytes_of("language_model.norm.")
    rooms = sum(room.nbytes for room in strict.rooms)
    two_of_each = 2 * (bytes_of("language_model.layers.0.") + bytes_of("visual.blocks.0."))
    turns = sum(b.nbytes for b in encoder.language_model.rotary_emb.buffers())
    assert encoder.device_bytes() == ends + rooms + turns
    assert two_of_each <= rooms < 1.2 * two_of_each  # each tensor begins at a multiple of 256 bytes
    whole = load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=True)
    assert whole.device_bytes() == sum(shapes.values()) - bytes_of("language_model.embed_tokens.") + turns


class Somewhere:
    """Stands for a tensor of which only the place counts."""

    def __init__(self, place):
        self.place = place

    def to(self, place):
        return Somewhere(place)


def test_states_wait_in_the_computers_memory_if_large(folder, strict):
    """Only what a block computes with is on the device then."""
    encoder = load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=False, streamed=True)
    gpu, computed = torch.device("cuda"), []

    def block(hidden):
        computed.append(hidden.place)
        return hidden

    with patch.object(Qwen2_5_VLEncoder, "device", gpu):
        for limit, place in ((4 * 63, CPU), (4 * 64, gpu)):
            encoder.states_on_device = limit
            waiting = encoder.waiting_place(64)
            state = State(Somewhere(waiting), gpu, waiting, lambda number: {})
            state.advance(block, 0)
            assert (computed.pop(), state.hidden.place) == (gpu, place)


@pytest.mark.parametrize("streamed", [False, True])
def test_on_the_meta_device_sizes_are_the_real_ones(folder, streamed):
    options = {"dtype": torch.bfloat16, "vision": True, "streamed": streamed}
    hollow = load_qwen2_5_vl(folder, device=torch.device("meta"), **options)
    assert hollow.device_bytes() == load_qwen2_5_vl(folder, device=CPU, **options).device_bytes()
    features = hollow.encode(INPUTS, batch_size=2)
    assert [(len(f), f.is_meta) for f in features] == [(len(s.token_ids), True) for s in INPUTS]


def test_a_streamed_encoder_that_is_moved_keeps_its_layers_where_they_are(folder, strict):
    encoder = load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=True, streamed=True)
    before = encoder.encode(INPUTS)
    encoder.to("meta")
    places = {name: p.device.type for name, p in encoder.named_parameters()}
    assert {name for name, place in places.items() if place == "meta"} == {
        name
        for name in places
        if name.startswith(("language_model.norm.", "visual.merger.", "visual.patch_embed."))
    }
    again = load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=True, streamed=True)
    again.encode(INPUTS)
    again.to("cpu")
    assert not any(Watched(again, strict).in_a_room(p) for p in again.parameters())  # the ring is given back
    assert all(torch.equal(a, b) for a, b in zip(before, again.encode(INPUTS), strict=True))


@pytest.mark.parametrize("streamed", [False, True])
def test_lending_lets_the_mapped_file_go(tmp_path, streamed):
    file = tmp_path / "q.safetensors"
    write_file(file, {name: t.bfloat16() for name, t in qwen_tensors(0).items()})
    write_json(tmp_path / "config.json", qwen_config())

    def mapped():
        return str(file) in open("/proc/self/maps").read()

    options = {"dtype": torch.bfloat16, "vision": True, "streamed": streamed}
    lending = Lending(lambda: load_qwen2_5_vl(file, device=CPU, **options), CPU)
    features = lending.get().encode(INPUTS)
    gone = weakref.ref(lending.get())
    assert mapped()
    lending.release()
    assert gone() is None and not mapped()
    assert all(torch.isfinite(f).all() for f in features)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_is_near_the_whole_one(folder, encoder, scheme):
    quant = TextQuantOptions(text_encoder_quant=scheme)
    quantised = load_qwen2_5_vl(folder, device=CPU, dtype=torch.float32, vision=True, quant=quant)
    kinds = {path for path, module in quantised.named_modules() if isinstance(module, QuantLinear)}
    assert len(kinds) == 7 * PARAMS.layers and all(
        path.startswith("language_model.layers.") for path in kinds
    )
    near, whole = (torch.cat(model.encode(INPUTS)) for model in (quantised, encoder))
    assert 0 < relative_error(near, whole) < 1.5 * LIMITS[scheme]


def test_nano_texts_differ(encoder):
    """Different texts give clearly different features, and numbers are as large as the real ones."""
    one, other = encoder.encode([text(12, seed=1), text(12, seed=5)])
    cosine = torch.cosine_similarity(one, other).abs().max()
    assert cosine < 0.6
    assert 0.5 < one.std() < 3


def test_files_of_transformers_are_read(oracles, tmp_path, encoder):
    oracles[torch.float32].save_pretrained(tmp_path)
    found = load_qwen2_5_vl(tmp_path, device=CPU, dtype=torch.float32, vision=True)
    assert found.params == encoder.params
    assert torch.equal(found.encode([text(5)])[0], encoder.encode([text(5)])[0])
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("newer", [False, True])
def test_fp8_with_scales_is_what_it_says(folder, encoder, strict, tmp_path, newer):
    def chosen(name):
        return any(part in name for part in ("_proj.weight", ".proj.weight", ".qkv.weight", "merger.mlp"))

    matrices = {name for name, tensor in qwen_tensors(0).items() if chosen(name) and tensor.ndim == 2}
    stored, plain = in_scaled_fp8(qwen_tensors(0), matrices.__contains__, newer=newer)
    write_json(tmp_path / "config.json", qwen_config())
    write_file(tmp_path / "fp8.safetensors", stored)
    write_file(tmp_path / "plain.safetensors", {name: t.bfloat16() for name, t in plain.items()})
    options = {"device": CPU, "dtype": torch.bfloat16, "vision": True}
    expected = load_qwen2_5_vl(tmp_path / "plain.safetensors", **options).encode(INPUTS)
    for more in ({}, {"streamed": True}):
        found = load_qwen2_5_vl(tmp_path / "fp8.safetensors", **options, **more).encode(INPUTS)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    whole = torch.cat(encoder.encode(INPUTS))
    assert 0.001 < relative_error(torch.cat(expected).float(), whole) < 0.2
    quant = TextQuantOptions(text_encoder_quant="int8")
    again = load_qwen2_5_vl(tmp_path / "fp8.safetensors", **options, quant=quant).encode(INPUTS)
    assert relative_error(torch.cat(again).float(), torch.cat(expected).float()) < 0.05
