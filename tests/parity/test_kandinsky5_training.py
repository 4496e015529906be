"""kandinsky5_train_network.py against training written anew from the documents, number for number.

The other side computes with diffusers and transformers (independent_kandinsky5.py), and its attention does
not round rotated queries and keys to bf16, as ours does not. What is trained is told in kandinsky5_cases.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor
from PIL import Image
from torch import Tensor

import kandinsky5_minimal_inference
from kandinsky5_train_network import Kandinsky5Trainer
from library.data.batch import Condition
from library.models.kandinsky5 import load_kandinsky5, velocities
from library.models.kandinsky5_dit import Kandinsky5DiT
from library.options.group import parse_options
from library.options.train_kandinsky5 import Kandinsky5TrainOptions
from networks.from_file import create_network_from_file
from networks.lora import LoRANetwork
from tests.parity.independent import Sample, State
from tests.parity.independent_kandinsky5 import Kandinsky
from tests.parity.kandinsky5_cases import EDITS, RECIPE, Case, from_pictures, from_text
from tests.parity.runs import Run, flags
from tools.convert_lora import main as convert_lora

Train = Callable[[Mapping[str, object]], Run]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Return a function that trains with these options, in this process."""
    torch.set_num_threads(1)  # at this size threads cost more than they bring

    def run(options: Mapping[str, object]) -> Run:
        folder = tmp_path_factory.mktemp("run")
        words = flags({**options, "output_dir": folder})
        Kandinsky5Trainer(parse_options(Kandinsky5TrainOptions, words)).train()
        return Run(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield run


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Both cases."""
    return {
        "t2i": from_text(tmp_path_factory.mktemp("t2i")),
        "i2i": from_pictures(tmp_path_factory.mktemp("i2i")),
    }


@pytest.fixture(scope="module", params=["t2i", "i2i"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    """One case after the other."""
    return cases[request.param]


@pytest.fixture(scope="module")
def trained(case: Case, train: Train) -> Run:
    """The case, trained by our trainer."""
    return train(case.flags)


def samples_of(case: Case) -> list[Sample]:
    return [sample for step in case.planned for batch in step for sample in batch]


def test_the_runs_have_what_could_hide_a_mistake(cases: dict[str, Case]) -> None:
    for case in cases.values():
        batches = [batch for step in case.planned for batch in step]
        assert {len(batch) for batch in batches} == {1, 2}
        assert len({batch[0].pixels_3HW.shape for batch in batches}) == 3
        assert any(len({sample.caption for sample in batch} - {""}) == 2 for batch in batches)
        assert any(sample.caption == "" for sample in samples_of(case))
    longest = max(samples_of(cases["t2i"]), key=lambda sample: len(sample.caption))
    assert len(cases["t2i"].kandinsky.condition(longest.caption, None).tokens_LD) == cases["t2i"].limit
    edits = samples_of(cases["i2i"])
    kinds = {(sample.source_3HW is None, sample.caption == "") for sample in edits}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
    sources = [sample.source_3HW for sample in edits if sample.source_3HW is not None]
    assert len({source.numpy().tobytes() for source in sources}) == len(EDITS)
    mixed = [
        {sample.source_3HW is None for sample in batch} for step in cases["i2i"].planned for batch in step
    ]
    assert {True, False} in mixed, "a batch has a picture with a source and one without"


def test_the_loss_of_every_step(case: Case, trained: Run) -> None:
    losses, _, _ = case.expected
    assert len(trained.losses) == case.steps
    assert trained.losses == pytest.approx(losses, rel=2e-6)


def test_the_gradient_norm_of_every_step(case: Case, trained: Run) -> None:
    _, norms, _ = case.expected
    assert trained.norms == pytest.approx(norms, rel=1e-5)
    assert min(norms) < RECIPE.max_norm < max(norms), "some steps are clipped, some are not"


def test_the_trained_lora(case: Case, trained: Run) -> None:
    _, _, lora = case.expected
    assert trained.lora.keys() == lora.keys()
    for key, theirs in lora.items():
        ours = trained.lora[key]
        if key.endswith(".alpha"):
            assert ours.item() == theirs.item()
            continue
        moved = (theirs - case.start[key]).norm()
        assert moved > 0.05 * theirs.norm()
        assert (ours - theirs).norm() < 5e-4 * moved, key


# --- a batch, and other programs ---


@dataclass(frozen=True)
class Inputs:
    """What the DiT is asked: pictures of several sizes, with everything that their captions can be."""

    x: list[Tensor]
    sigma_B: Tensor
    conditions: list[Condition]


def inputs_of(case: Case) -> Inputs:
    """Every prompt of a run once."""
    unique: dict[int, tuple[Condition, Tensor]] = {}
    random = torch.Generator().manual_seed(3)
    for sample in samples_of(case):
        found = case.kandinsky.condition(sample.caption, sample.source_3HW)
        _, height, width = sample.pixels_3HW.shape
        x = torch.randn(16, height // 8, width // 8, generator=random)
        unique[id(found)] = Condition(found.tokens_LD, found.pooled_D, found.source_Chw), x
    conditions, x = zip(*unique.values(), strict=True)
    return Inputs(list(x), torch.rand(len(x), generator=random), list(conditions))


def theirs(kandinsky: Kandinsky, inputs: Inputs, lora: State) -> Tensor:
    """The other implementation, one picture after another."""
    triples = zip(inputs.x, inputs.sigma_B, inputs.conditions, strict=True)
    with torch.no_grad():
        found = [kandinsky.velocity(x[None], sigma[None], [c], lora) for x, sigma, c in triples]
    return flat(found)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def far(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture(scope="module")
def with_lora(case: Case, trained: Run) -> tuple[Kandinsky5DiT, LoRANetwork]:
    """Our DiT with the trained LoRA, and that."""
    source = case.models["pretrained_model_name_or_path"]
    model = load_kandinsky5(source, device=torch.device("cpu"), dtype=torch.float32)
    network = create_network_from_file(model, trained.path)
    network.apply_to(model)
    return model, network


def test_a_batch_is_its_pictures_alone(case: Case, with_lora: tuple[Kandinsky5DiT, LoRANetwork]) -> None:
    """Losses and gradients of pictures of any size whose captions have different lengths."""
    model, network = with_lora
    inputs, parameters = inputs_of(case), list(network.requires_grad_(True).parameters())
    assert len({len(condition.tokens_LD) for condition in inputs.conditions}) >= 4

    def losses(places: slice) -> Tensor:
        x = inputs.x[places]
        found = velocities(model, x, inputs.sigma_B[places], inputs.conditions[places])
        return torch.stack([(v - x_Chw).square().mean() for v, x_Chw in zip(found, x, strict=True)])

    together = losses(slice(None))
    alone = torch.cat([losses(slice(i, i + 1)) for i in range(len(inputs.x))])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(each.mean(), parameters) for each in (together, alone)]
    for one, other in zip(*gradients, strict=True):
        assert far(one, other) < 1e-4  # the least of them, of text queries and keys, have fewest digits


def test_diffusers_loads_it_with_equal_output(
    case: Case,
    trained: Run,
    with_lora: tuple[Kandinsky5DiT, LoRANetwork],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without rounding; and with diffusers' own attention, whose rounding to bf16 ours can do too."""
    words = ["convert", f"--input={trained.path}", f"--output={tmp_path / 'a.safetensors'}", "--to=diffusers"]
    monkeypatch.setattr(sys, "argv", words)
    convert_lora()
    (model, _), inputs = with_lora, inputs_of(case)

    @torch.no_grad()
    def ours() -> Tensor:
        return flat(velocities(model, inputs.x, inputs.sigma_B, inputs.conditions))

    other = Kandinsky(case.models, case.tokenizers)
    plain = theirs(other, inputs, {})
    other.dit.load_lora_adapter(tmp_path, weight_name="a.safetensors", use_safetensors=True)
    assert far(theirs(other, inputs, {}), ours()) < 1e-5
    assert far(plain, ours()) > 0.1, "the LoRA has an effect"
    other.dit.set_attn_processor(Kandinsky5AttnProcessor())
    monkeypatch.setattr(model, "round_rotated", True)
    assert far(theirs(other, inputs, {}), ours()) < 1e-3


# --- sample pictures ---


def previews(run: Run, step: int) -> list[np.ndarray]:
    """The pictures of a step, in the order of their prompts."""
    paths = sorted((run.folder / "sample").glob(f"last_{step:06d}_*.png"))
    return [np.asarray(Image.open(path)) for path in paths]


def test_previews_are_the_pictures_of_the_documents(case: Case, trained: Run) -> None:
    found = previews(trained, case.steps)
    for picture, prompt in zip(found, case.prompts, strict=True):
        expected = prompt.drawn(case.kandinsky, trained.lora)
        assert np.abs(picture.astype(int) - expected).max() <= 1
        plain = prompt.drawn(case.kandinsky, {})
        assert expected.std() > 10 and np.abs(plain.astype(int) - expected).max() > 10


def test_previews_are_those_of_the_inference_script_bit_for_bit(
    case: Case, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ("qwen_tokenizer", "clip_tokenizer", "qwen_max_token_length")
    given = {
        **case.models,
        **{name: case.flags[name] for name in kept},
        **dict.fromkeys(("dtype", "text_encoder_dtype", "vae_dtype"), "fp32"),
        "from_file": case.flags["sample_prompts"],
        "lora_weights": trained.path,
        "output_dir": tmp_path,
        "device": "cpu",
    }
    monkeypatch.setattr(sys, "argv", ["script", *flags(given)])
    kandinsky5_minimal_inference.main()
    paths = sorted(tmp_path.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    for path, preview in zip(paths, previews(trained, case.steps), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), preview)


# --- ways of running ---

UNCACHED = dict.fromkeys(("cache_latents", "cache_text_encoder_outputs", "cache_dtype"))
CHECKPOINTS = {"gradient_checkpointing": True}
FULL = CHECKPOINTS | {"checkpoint_mode": "full"}
WAYS = {
    "uncached": UNCACHED,
    "uncached, with a streamed encoder": UNCACHED | {"stream_text_encoder": True},
    "a streamed encoder": {"stream_text_encoder": True},
    "full checkpoints, all blocks swapped": FULL | {"blocks_to_swap": 5},
    "checkpoints, all blocks swapped": CHECKPOINTS | {"blocks_to_swap": 5},
    "checkpoints of feed-forwards": CHECKPOINTS | {"checkpoint_mode": "feed_forward"},
    "no checkpoints": {"checkpoint_mode": "none"},
}


@pytest.fixture(scope="module")
def editing(cases: dict[str, Case], train: Train) -> Callable[..., Run]:
    """Return a function: flags -> two steps of editing in bf16, with dropout, one picture after another."""
    case = cases["i2i"]
    config = case.config.with_name("one.toml")
    config.write_text(case.config.read_text().replace("batch_size = 2", "batch_size = 1"))
    changes = {
        "dataset_config": config,
        "max_train_steps": 2,
        "mixed_precision": "bf16",
        "network_dropout": 0.2,
        "text_encoder_batch_size": 1,
        "sample_prompts": None,
        "sample_every_n_steps": None,
    }
    return lambda **more: train(case.flags | changes | more)


@pytest.fixture(scope="module")
def plain(editing: Callable[..., Run]) -> Run:
    """Two steps with nothing special."""
    return editing()


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_running_change_no_bit(way: str, plain: Run, editing: Callable[..., Run]) -> None:
    other = editing(**WAYS[way])
    assert len(plain.losses) == 2 and other.losses == plain.losses
    assert other.norms == plain.norms
    for key, tensor in plain.lora.items():
        assert torch.equal(tensor, other.lora[key]), key


def test_a_run_can_save_for_diffusers(
    cases: dict[str, Case], plain: Run, editing: Callable[..., Run]
) -> None:
    saved, case = editing(save_format="diffusers"), cases["i2i"]
    assert all(key.startswith("transformer.") for key in saved.lora)
    inputs, other = inputs_of(case), Kandinsky(case.models, case.tokenizers)
    other.dit.load_lora_adapter(saved.folder, weight_name=saved.path.name, use_safetensors=True)
    expected = theirs(case.kandinsky, inputs, plain.lora)
    assert far(theirs(other, inputs, {}), expected) < 1e-5
    assert far(theirs(case.kandinsky, inputs, {}), expected) > 0.01
