"""kandinsky5_train_network.py against training written anew from the documents, number for number.

The other side computes with diffusers and transformers (independent_kandinsky5.py), and its attention does
not round rotated queries and keys to bf16, as ours does not. Between them the runs have what could hide a
mistake: several buckets, sources of another size or other proportions than their edits, and none; captions of
different lengths in a batch, cut ones and empty ones; a last micro-batch and a last step that are smaller,
more than one epoch, LoRAs of different ranks on every kind of layer, LoRA+. How sigma is drawn is left to the
defaults, which are the official ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, Qwen2_5_VLForConditionalGeneration

import kandinsky5_minimal_inference
from kandinsky5_train_network import Kandinsky5Trainer
from library.core import seeds
from library.data.batch import Condition
from library.data.items import Draw, Item
from library.models.kandinsky5 import load_kandinsky5, velocities
from library.models.kandinsky5_dit import Kandinsky5DiT
from library.options.group import parse_options
from library.options.train_kandinsky5 import Kandinsky5TrainOptions
from networks.from_file import create_network_from_file
from networks.lora import LoRANetwork
from tests.kandinsky5_checkpoints import write_pipeline
from tests.parity.conftest import randomise
from tests.parity.independent import Recipe, Sample, State, load_pixels, shift_by_three, start_of_lora
from tests.parity.independent import train as train_independently
from tests.parity.independent_kandinsky5 import Kandinsky, draw
from tests.parity.plans import Steps, planned
from tests.parity.runs import Run, flags, write_config, write_photos, write_pictures
from tools.convert_lora import main as convert_lora

RECIPE = Recipe(
    seed=7,
    alpha=2.0,
    rates=(0.01, 0.04),
    betas=(0.8, 0.95),
    eps=1e-5,
    weight_decay=0.1,
    max_norm=1.0,
    sigma=shift_by_three,
)
CAPTION_DROPOUT = 0.4
# What is trained: size and caption, and the size of the picture that was edited into it.
EDITS = {
    "fox": ((112, 112), "make the fox red", (112, 112)),
    "cup": (
        (224, 224),
        "put a coffee cup on the wooden table, and let the lights of a city shine",
        (140, 140),
    ),
    "road": ((144, 80), "go", (72, 40)),
    "hill": ((149, 80), "dark city lights", (75, 40)),  # both hang over their bucket, by different rounding
    "face": ((96, 128), "a smiling woman in an orange suit", (128, 128)),  # of other proportions
}
ALONE = {"moon": ((112, 112), "a distant galaxy in the bright sky")}  # edited from nothing


@dataclass(frozen=True)
class SamplePrompt:
    """A sample picture. The seed is given, because that of a run is not the inference script's."""

    text: str
    size: tuple[int, int]
    steps: int
    seed: int
    guidance: float = 3.5
    negative: str = ""
    source: Path | None = None

    @property
    def line(self) -> str:
        """As a file of prompts has it; what is usual is left out."""
        width, height = self.size
        words = [self.text, f"--w {width} --h {height} --s {self.steps} --d {self.seed}"]
        words += [f"--l {self.guidance}"] * (self.guidance != 3.5)
        words += [f"--n {self.negative}"] * bool(self.negative)
        words += [f"--ci {self.source}"] * bool(self.source)
        return " ".join(words)

    def drawn(self, kandinsky: Kandinsky, lora: State) -> np.ndarray:
        """The picture by the other implementation."""
        source = None if self.source is None else load_pixels(self.source, self.size)
        how = {"size": self.size, "seed": self.seed, "steps": self.steps, "guidance": self.guidance}
        return draw(kandinsky, self.text, self.negative, lora, source_3HW=source, **how)


@dataclass(frozen=True)
class Case:
    """A run for one task: its models, its data, its flags, and what is expected of it.

    ranks: of the LoRAs. limit: tokens of a caption that count.
    """

    models: Mapping[str, Path]
    tokenizers: Path
    config: Path
    steps: int
    accumulation: int
    ranks: Mapping[str, int]
    network: Mapping[str, object]
    limit: int
    source_dropout: float
    folder: Path
    prompts: Sequence[SamplePrompt]

    @property
    def flags(self) -> dict[str, object]:
        """RECIPE and the rest as flags."""
        down, up = RECIPE.rates
        return {
            **self.models,
            **self.network,
            "qwen_tokenizer": self.tokenizers / "tokenizer",
            "clip_tokenizer": self.tokenizers / "tokenizer_2",
            "dataset_config": self.config,
            "seed": RECIPE.seed,
            "network_module": "networks.lora_kandinsky5",
            "network_alpha": RECIPE.alpha,
            "learning_rate": down,
            "optimizer_args": (
                f"betas={RECIPE.betas}".replace(" ", ""),
                f"eps={RECIPE.eps}",
                f"weight_decay={RECIPE.weight_decay}",
            ),
            "max_grad_norm": RECIPE.max_norm,
            "max_train_steps": self.steps,
            "gradient_accumulation_steps": self.accumulation,
            "qwen_max_token_length": self.limit,
            "source_dropout_rate": self.source_dropout or None,
            "cache_latents": True,
            "cache_text_encoder_outputs": True,
            "cache_dtype": "fp32",
            "console_log_level": "WARNING",
            "sample_prompts": self._prompt_file(),
            "sample_every_n_steps": self.steps,
        }

    @cached_property
    def kandinsky(self) -> Kandinsky:
        """The models in the other implementation."""
        return Kandinsky(self.models, self.tokenizers, self.limit)

    @cached_property
    def start(self) -> State:
        """The untrained LoRA."""
        return start_of_lora(self.kandinsky, self.ranks, RECIPE)

    @cached_property
    def planned(self) -> Steps:
        """The pictures of each micro-batch of each step."""
        return planned(
            self.config,
            self.folder / "hashes.json",
            self._sample,
            seed=RECIPE.seed,
            steps=self.steps,
            accumulation=self.accumulation,
            edits=self.source_dropout > 0,
        )

    @cached_property
    def expected(self) -> tuple[list[float], list[float], State]:
        """Losses, gradient norms and the LoRA of the other implementation."""
        return train_independently(self.kandinsky, self.planned, self.start, RECIPE)

    def _prompt_file(self) -> Path:
        path = self.folder / "prompts.txt"
        path.write_text("\n".join(prompt.line for prompt in self.prompts), encoding="utf-8")
        return path

    def _sample(self, item: Item, place: Draw) -> Sample:
        bucket, source = item.geometry.bucket, None
        caption = item.path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0]
        if (
            seeds.unit(RECIPE.seed, "caption dropout", place.epoch, place.item, place.repeat)
            < CAPTION_DROPOUT
        ):
            caption = ""
        before = item.path.parent.with_name("before") / item.path.name
        kept = seeds.unit(RECIPE.seed, place.epoch, place.item, place.repeat, "source dropout")
        if item.path.stem in EDITS and kept >= self.source_dropout:
            source = load_pixels(before, bucket, edit=item.path)
        pixels = load_pixels(item.path, bucket)
        return Sample(pixels, caption, place.step, place.micro, place.slot, source_3HW=source)


# --- the two cases ---


def from_text(folder: Path) -> Case:
    """LoRAs of a rank of its own on each kind of layer, captions that are cut."""
    pipeline = write_pipeline(folder / "pipeline", "t2i")
    photos = write_photos(folder / "photos")
    dropped = f"caption_dropout_rate = {CAPTION_DROPOUT}"
    ranks = {"visual_embeddings_in_layer": 2, "text_embeddings_in_layer": 1}
    ranks |= {"pooled_text_embeddings_in_layer": 3}
    ranks |= {f"time_embeddings_{side}_layer": 1 for side in ("in", "out")}
    return Case(
        pipeline.flags,
        pipeline.folder,
        write_config(folder / "data.toml", photos, subset=dropped),
        steps=5,
        accumulation=3,
        ranks=ranks | _ranks_of_blocks(modulation=2, text=4, own=5, cross=6, feed_forward=3),
        network={
            "network_dim": 7,
            "network_args": (
                *("self_attn_dim=5", "cross_attn_dim=6", "ff_dim=3", "mod_dim=2", "text_dim=4"),
                *("embedder_dims=[2,1,3,1]", f"loraplus_lr_ratio={RECIPE.rates[1] / RECIPE.rates[0]}"),
            ),
        },
        limit=40,
        source_dropout=0.0,
        folder=folder,
        prompts=(
            SamplePrompt("rocket", (80, 48), steps=3, seed=5, negative="fog"),
            SamplePrompt("a small cat", (48, 48), steps=2, seed=6, guidance=1.0),
        ),
    )


def from_pictures(folder: Path) -> Case:
    """Pairs and a picture without a source; text encoders written by transformers; the last layer trained."""
    pipeline = write_pipeline(folder / "pipeline", "i2i")
    models = pipeline.flags
    for flag, kind in (
        ("text_encoder_qwen", Qwen2_5_VLForConditionalGeneration),
        ("text_encoder_clip", CLIPTextModel),
    ):
        model = kind.from_pretrained(models[flag])
        _rewritten(model, folder / flag)
        models[flag] = folder / flag
    write_pictures(folder / "after", {name: edit[:2] for name, edit in EDITS.items()})
    write_pictures(folder / "before", {name: (edit[2], "") for name, edit in EDITS.items()}, seed=6)
    write_pictures(folder / "alone", ALONE, seed=7)
    more = (
        f"caption_dropout_rate = {CAPTION_DROPOUT}\nconditioning_data_dir = '{folder / 'before'}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'alone'}'\ncaption_dropout_rate = {CAPTION_DROPOUT}"
    )
    ranks = {"out_layer_out_layer": 3, "out_layer_modulation_out_layer": 3}
    return Case(
        models,
        pipeline.folder,
        write_config(folder / "data.toml", folder / "after", resolution=112, subset=more),
        steps=4,
        accumulation=2,
        ranks=ranks | _ranks_of_blocks(modulation=0, text=4, own=4, cross=4, feed_forward=4),
        network={
            "network_dim": 4,
            "network_args": (
                r"network_reg_dims=out_layer\..*=3",
                f"loraplus_lr_ratio={RECIPE.rates[1] / RECIPE.rates[0]}",
            ),
        },
        limit=512,
        source_dropout=0.3,
        folder=folder,
        prompts=(
            SamplePrompt("go", (112, 80), 3, seed=5, source=folder / "before" / "face.png"),
            SamplePrompt("a cup on a table", (48, 64), 2, seed=6, guidance=5.0, negative="fog"),
        ),
    )


def _ranks_of_blocks(modulation: int, text: int, own: int, cross: int, feed_forward: int) -> dict[str, int]:
    """The rank of each layer of the blocks, as the tables of networks/lora_kandinsky5.py have it."""
    attention = [f"to_{name}" for name in ("query", "key", "value")] + ["out_layer"]
    ranks = {}
    for block in (f"text_transformer_blocks_{i}" for i in range(2)):
        ranks[f"{block}_text_modulation_out_layer"] = modulation
        ranks |= {f"{block}_self_attention_{layer}": text for layer in attention}
        ranks |= {f"{block}_feed_forward_{side}_layer": text for side in ("in", "out")}
    for block in (f"visual_transformer_blocks_{i}" for i in range(3)):
        ranks[f"{block}_visual_modulation_out_layer"] = modulation
        ranks |= {f"{block}_self_attention_{layer}": own for layer in attention}
        ranks |= {f"{block}_cross_attention_{layer}": cross for layer in attention}
        ranks |= {f"{block}_feed_forward_{side}_layer": feed_forward for side in ("in", "out")}
    return {name: rank for name, rank in ranks.items() if rank}


def _rewritten(model: torch.nn.Module, folder: Path) -> None:
    """Save a text encoder by transformers, every weight with a value of its own."""
    randomise(model, folder.name)
    model.save_pretrained(folder)


# --- the runs ---

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
    kinds = {(sample.source_3HW is None, sample.caption == "") for sample in samples_of(cases["i2i"])}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
    assert any(
        len({sample.source_3HW is None for sample in batch}) == 2
        for step in cases["i2i"].planned
        for batch in step
    )


def test_the_loss_of_every_step(case: Case, trained: Run) -> None:
    losses, _, _ = case.expected
    assert len(trained.losses) == case.steps
    assert trained.losses == pytest.approx(losses, rel=1e-5)


def test_the_gradient_norm_of_every_step(case: Case, trained: Run) -> None:
    _, norms, _ = case.expected
    assert trained.norms == pytest.approx(norms, rel=1e-4)
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
        assert (ours - theirs).norm() < 1e-3 * moved, key


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
WAYS = {
    "uncached": UNCACHED,
    "uncached, with a streamed encoder": UNCACHED | {"stream_text_encoder": True},
    "a streamed encoder": {"stream_text_encoder": True},
    "full checkpoints, all blocks swapped": CHECKPOINTS | {"blocks_to_swap": 5},
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
