"""--dry_run and --debug_dataset: what a run would do, without doing it.

Read `look` first. Each part of the report is a list of lines about one subject.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.core.device import dtype_named
from library.core.dist import Processes, run_seed
from library.data.captions import caption_variants
from library.data.items import Draw, Item, Manifest
from library.data.plan import Plan
from library.data.sources import Entries
from library.training.inputs import Inputs
from library.training.look.contact_sheet import PER_SHEET, Shown, first_draws, write_sheet, write_sheets
from library.training.look.memory_estimate import Kept, kept_for_backward, optimizer_bytes, weight_bytes
from library.training.prepare import Prepared
from networks.lora import LoRANetwork
from networks.module import install_new_network

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

META = torch.device("meta")
_GIB = 2**30
_VARIANTS_WITHOUT_CACHE = 16  # texts looked at of a caption that is drawn anew each time
_LONGEST_SHOWN = 5


def look(trainer: NetworkTrainer, prepared: Prepared) -> Path:
    """Do what --dry_run or --debug_dataset asks for; return the sheet drawn, or the folder of sheets."""
    rehearsal = Rehearsal(trainer, prepared)
    if not rehearsal.processes.is_main:
        return rehearsal.folder
    if trainer.options.training.debug_dataset:
        sheets = rehearsal.draw_all()
        print(f"drew {len(sheets)} sheet(s) of {len(prepared.manifest.train)} pictures: {sheets[0].parent}")
        return sheets[0].parent
    print("\n".join(rehearsal.report()))
    sheet = rehearsal.draw_first()
    print(f"\nsheet of the first pictures: {sheet}")
    return sheet


class Rehearsal:
    """A run that is put together and looked at, and never started."""

    def __init__(self, trainer: NetworkTrainer, prepared: Prepared) -> None:
        options = self.options = trainer.options
        self.trainer, self.prepared, self.manifest = trainer, prepared, prepared.manifest
        self.folder = options.saving.output_dir
        self.processes = Processes.start(options.training.ddp_timeout)
        self.seed = run_seed(options.training.seed, self.processes)
        accumulation, world = options.training.gradient_accumulation_steps, self.processes.world
        self.plan = Plan(self.manifest, seed=self.seed, world=world, accumulation=accumulation)
        epochs = options.training.max_train_epochs
        self.total_steps = (
            options.training.max_train_steps if epochs is None else epochs * self.plan.steps_per_epoch
        )
        self.dtype = dtype_named(options.training.mixed_precision)
        self.inputs = Inputs(trainer, prepared.files, self.processes, self.dtype)

    def report(self) -> list[str]:
        """Return the lines of the report."""
        texts = self._texts()
        lengths = {text: self.trainer.count_tokens(text) for text in texts}
        parts = {
            "Pictures": bucket_lines(self.manifest),
            "Captions": caption_lines(lengths),
            "Steps": self._step_lines(),
            "Caches": self._cache_lines(texts),
            "Model": self._model_lines(min(max(lengths.values(), default=(1, 1)))),
            "Adjusted": self._adjustments() or ["nothing"],
        }
        return [line for title, lines in parts.items() for line in ("", title, *(f"  {x}" for x in lines))]

    def draw_first(self) -> Path:
        """Draw one sheet of the first pictures of the run."""
        path = self.folder / "dry_run.png"
        draws: list[Draw] = []
        for draw in first_draws(self.plan):
            draws.append(draw)
            if len(draws) == PER_SHEET:
                break
        write_sheet(path, self.manifest, draws, self._shown())
        return path

    def draw_all(self) -> list[Path]:
        """Draw sheets of all pictures."""
        return write_sheets(self.folder / "debug_dataset", self.manifest, self.plan, self._shown())

    def _shown(self) -> Shown:
        caching = self.options.caching
        return Shown(self.seed, self.total_steps, caching.max_caption_variants if caching.texts else None)

    def _items(self) -> list[Item]:
        return [self.manifest.items[i] for i in (*self.manifest.train, *self.manifest.validation)]

    def _texts(self) -> dict[str, Item]:
        """What the text encoder is given, each with a picture that has it."""
        caching = self.options.caching
        most = caching.max_caption_variants if caching.texts else _VARIANTS_WITHOUT_CACHE
        return {
            self.trainer.format_prompt(caption): item
            for item in self._items()
            for caption in caption_variants(item, most)
        }

    def _step_lines(self) -> list[str]:
        plan, training = self.plan, self.options.training
        epochs = self.total_steps / plan.steps_per_epoch
        return [
            f"{plan.draws_per_epoch} pictures an epoch, repeats counted, in {plan.batches_per_epoch} batches",
            f"{plan.steps_per_epoch} steps an epoch: {training.gradient_accumulation_steps} batch(es) a step "
            f"on {self.processes.world} process(es)",
            f"{self.total_steps} steps in all, {epochs:.4g} epochs; seed {self.seed}",
        ]

    def _cache_lines(self, texts: dict[str, Item]) -> list[str]:
        lines = []
        if (latents := self.inputs.latent_source) is not None:
            wanted = {latents.key(item): item for item in self._items()}
            lines.append(f"latents: {_found(latents.entries, wanted)}")
        else:
            lines.append("latents: not cached; the autoencoder encodes every picture each time")
        if (features := self.inputs.text_source) is not None:
            wanted = {features.key(text): item for text, item in texts.items()}
            lines.append(f"texts: {_found(features.entries, wanted)}")
        else:
            lines.append("texts: not cached; the text encoder stays in memory and encodes every caption")
        return lines

    def _model_lines(self, tokens: int) -> list[str]:
        """Trained numbers, and memory of each component; `tokens` of the longest caption."""
        options = self.options
        model = self.trainer.load_transformer(META, self.dtype)
        network = install_new_network(
            options.network,
            model,
            lambda: self.trainer.load_text_encoders(META, self.dtype),
            seed=self.seed,
            learning_rate=options.optimizer.learning_rate,
        )
        count = network.parameter_count()
        kept = self._kept(model, network, tokens)
        activations = kept.everything
        if options.training.gradient_checkpointing:
            offloaded = options.training.cpu_offload_checkpointing
            activations = kept.offloaded if offloaded else kept.checkpointed
        per_number = 2 if options.training.full_bf16 else 4
        states = optimizer_bytes(options.optimizer, self.processes.device)
        resident = {
            "transformer": weight_bytes(model),
            "network, gradients, optimizer": round(count * (2 * per_number + states)),
            "activations of the largest batch": activations,
        }
        encoders = {"text encoder": self._text_encoder_bytes(), "autoencoder": self._autoencoder_bytes()}
        stays = {"text encoder": not options.caching.texts, "autoencoder": not options.caching.latents}
        resident |= {name: size for name, size in encoders.items() if stays[name]}
        alone = {name: size for name, size in encoders.items() if not stays[name]}
        more = ["  and what the text encoder, which is trained too, keeps for backward"]
        return [
            *trained_lines(network),
            f"memory while training, at least: {_size(sum(resident.values()))}",
            *(f"  {name}: {_size(size)}" for name, size in resident.items()),
            *(more if options.network.trains_text_encoder else ()),
            *(f"before training, while its cache is filled: {n} {_size(size)}" for n, size in alone.items()),
        ]

    def _kept(self, model: nn.Module, network: LoRANetwork, tokens: int) -> Kept:
        """What a step on the largest batch keeps for backward."""
        width, height, batch_size = _largest_batch(self.manifest)
        family = self.trainer.family
        grid = (height // family.latent_stride, width // family.latent_stride)
        shape = (batch_size, family.latent_channels, *grid)
        conditions = [self.trainer.blank_condition(tokens, META)] * batch_size
        x_BCHW, sigma_B = torch.empty(shape, device=META), torch.empty(batch_size, device=META)
        network.train()
        return kept_for_backward(
            model,
            network.parameters(),
            lambda: self.trainer.velocity(model, x_BCHW, sigma_B, conditions).square().mean(),
        )

    def _text_encoder_bytes(self) -> int:
        encoders = self.trainer.load_text_encoders(META, self.dtype)
        parts = encoders if isinstance(encoders, Sequence) else (encoders,)
        return sum(weight_bytes(part) for part in parts if isinstance(part, nn.Module))

    def _autoencoder_bytes(self) -> int:
        return weight_bytes(self.trainer.load_vae(META, self.dtype))

    def _adjustments(self) -> list[str]:
        """What is done otherwise than the words of the command line say."""
        training, caching, manifest = self.options.training, self.options.caching, self.manifest
        lines = [f"left out: {sentence}" for sentence in manifest.skipped] + list(manifest.notes)
        if training.seed is None:
            lines.append(f"no --seed is given: a random one is drawn, this time {self.seed}")
        if training.max_train_epochs is not None:
            lines.append(f"--max_train_epochs decides the number of steps: {self.total_steps}")
        if caching.cache_latents_to_disk and not caching.cache_latents:
            lines.append("--cache_latents_to_disk implies --cache_latents")
        if caching.cache_text_encoder_outputs_to_disk and not caching.cache_text_encoder_outputs:
            lines.append("--cache_text_encoder_outputs_to_disk implies --cache_text_encoder_outputs")
        return [*lines, *self.prepared.changes]


def bucket_lines(manifest: Manifest) -> list[str]:
    """Return a line for each dataset and bucket: pictures, repeats, batch size, and how much is cut off."""
    lines = [f"{len(manifest.train)} to train on, {len(manifest.validation)} held out"]
    groups: dict[tuple[int, tuple[int, int]], list[Item]] = {}
    for item in (manifest.items[index] for index in manifest.train):
        groups.setdefault((item.dataset_index, item.geometry.bucket), []).append(item)
    for (dataset, (width, height)), items in sorted(groups.items()):
        cuts = [_cut_share(item) for item in items]
        repeats = sum(item.repeats for item in items)
        lines.append(
            f"dataset {dataset}, {width}x{height}: {len(items)} pictures, {repeats} with repeats, batches of "
            f"{manifest.datasets[dataset].batch_size}; cut off {sum(cuts) / len(cuts):.1%} on average, "
            f"{max(cuts):.1%} at most; {sum(_is_enlarged(item) for item in items)} enlarged"
        )
    return lines


def caption_lines(lengths: dict[str, tuple[int, int]]) -> list[str]:
    """Return lines about the tokens of texts, given as (needed, taken at most)."""
    if not lengths:
        return ["there are none"]
    needed = sorted(count for count, _ in lengths.values())
    too_long = {text: (count, limit) for text, (count, limit) in lengths.items() if count > limit}
    lines = [
        f"{len(lengths)} texts of {needed[0]} to {needed[-1]} tokens, half of them up to "
        f"{needed[(len(needed) - 1) // 2]}",
        f"{len(too_long)} longer than the text encoder takes, which are cut",
    ]
    for text, (count, limit) in sorted(too_long.items(), key=lambda pair: -pair[1][0])[:_LONGEST_SHOWN]:
        lines.append(f"  {count} tokens, cut to {limit}: ...{text[-60:]!r}")
    return lines


def trained_lines(network: LoRANetwork) -> list[str]:
    """Return how many numbers are trained, in all and in each part of the model."""
    layers, numbers = Counter[str](), Counter[str]()
    for name, lora in network.loras.items():
        of_text = name.startswith("lora_te_")
        part = "text encoder" if of_text else network.paths[name].partition(".")[0]
        layers[part] += 1
        numbers[part] += sum(parameter.numel() for parameter in lora.parameters())
    lines = [f"{network.parameter_count():,} trained numbers on {len(network.loras)} layers"]
    return lines + [f"  {part}: {numbers[part]:,} on {layers[part]} layers" for part in layers]


def _largest_batch(manifest: Manifest) -> tuple[int, int, int]:
    """Width and height of the pictures, and how many of them, where a batch has the most pixels."""
    items = (manifest.items[index] for index in manifest.train)
    sizes = {(*item.geometry.bucket, item.dataset.batch_size) for item in items}
    return max(sizes, key=lambda size: size[0] * size[1] * size[2])


def _cut_share(item: Item) -> float:
    (width, height), (bucket_width, bucket_height) = item.geometry.resized, item.geometry.bucket
    return 1 - bucket_width * bucket_height / (width * height)


def _is_enlarged(item: Item) -> bool:
    return item.geometry.resized[0] > item.size[0]


def _found(entries: Entries, wanted: dict[str, Item]) -> str:
    there = sum(entries.store(item).check(key) for key, item in wanted.items())
    kept = "on disk" if entries.place.to_disk else "in memory only"
    return f"{there} of {len(wanted)} are there already, {len(wanted) - there} to encode, kept {kept}"


def _size(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"
