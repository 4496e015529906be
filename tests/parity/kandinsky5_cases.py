"""Two training runs of Kandinsky 5.0 Image: from text, and from pictures; and what is expected of them.

Between them they have what could hide a mistake: several buckets, sources of another size or other
proportions than their edits, and none; captions of different lengths in a batch, cut ones and empty ones; a
last micro-batch and a last step that are smaller, more than one epoch, LoRAs of different ranks on every kind
of layer, LoRA+. How sigma is drawn is left to the defaults, which are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import CLIPTextModel, Qwen2_5_VLForConditionalGeneration

from library.core import seeds
from library.data.items import Draw, Item
from tests.kandinsky5_checkpoints import write_pipeline
from tests.parity.conftest import randomise
from tests.parity.independent import Recipe, Sample, State, load_pixels, shift_by_three, start_of_lora, train
from tests.parity.independent_kandinsky5 import Kandinsky, draw
from tests.parity.plans import Steps, planned
from tests.parity.runs import write_config, write_photos, write_pictures

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
        return train(self.kandinsky, self.planned, self.start, RECIPE)

    def _prompt_file(self) -> Path:
        path = self.folder / "prompts.txt"
        path.write_text("\n".join(prompt.line for prompt in self.prompts), encoding="utf-8")
        return path

    def _sample(self, item: Item, place: Draw) -> Sample:
        bucket, use = item.geometry.bucket, (place.epoch, place.item, place.repeat)
        caption = item.path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0]
        if seeds.unit(RECIPE.seed, "caption dropout", *use) < CAPTION_DROPOUT:
            caption = ""
        source = None
        if item.path.stem in EDITS and seeds.unit(RECIPE.seed, *use, "source dropout") >= self.source_dropout:
            before = item.path.parent.with_name("before") / item.path.name
            source = load_pixels(before, bucket, edit=item.path)
        return Sample(
            load_pixels(item.path, bucket),
            caption,
            *(place.step, place.micro, place.slot),
            source_3HW=source,
        )


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
        randomise(model, flag)
        models[flag] = folder / flag
        model.save_pretrained(models[flag])
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
