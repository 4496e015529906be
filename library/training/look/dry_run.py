"""--dry_run and --debug_dataset: what a run would do, without doing it.

Read `look` first. Each part of the report is a list of lines about one subject.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.collecting import uncollected
from library.data.cached import Entries
from library.data.items import Item, Manifest
from library.data.prompt import Prompt
from library.data.token_batches import TokenBudget
from library.training.context import RunContext
from library.training.look.budget import planned
from library.training.look.contact_sheet import PER_SHEET, Shown, first_draws, write_sheet, write_sheets
from library.training.look.memory_estimate import Manner, MemoryEstimate, free_memory, shown, summed
from library.training.look.texts import all_are_known, items_of_run, prompts_of_run
from library.training.prepare import Prepared
from library.training.routing import routing_lines

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

_LONGEST_SHOWN = 5


def look(trainer: NetworkTrainer, prepared: Prepared) -> Path:
    """Do what --dry_run or --debug_dataset asks for; return the sheet drawn, or the folder of sheets."""
    with uncollected():
        rehearsal = Rehearsal(trainer, prepared)
    if not rehearsal.processes.is_main:
        return rehearsal.folder
    if trainer.options.training.debug_dataset:
        sheets = rehearsal.draw_all()
        print(f"drew {len(sheets)} sheet(s) of {len(prepared.manifest.train)} pictures: {sheets[0].parent}")
        return sheets[0].parent
    with uncollected():  # a step on the meta device imports much more of torch
        lines = rehearsal.report()
    print("\n".join(lines))
    sheet = rehearsal.draw_first()
    print(f"\nsheet of the first pictures: {sheet}")
    return sheet


class Rehearsal:
    """A run that is put together and looked at, and never started."""

    def __init__(self, trainer: NetworkTrainer, prepared: Prepared) -> None:
        context = self.context = planned(RunContext.decide(trainer, prepared))
        self.options, self.folder = context.options, context.options.saving.output_dir
        self.trainer, self.prepared, self.manifest = context.trainer, context.prepared, prepared.manifest
        self.processes, self.seed, self.plan = context.processes, context.seed, context.plan
        self.total_steps, self.dtype, self.inputs = context.total_steps, context.dtype, context.inputs

    def report(self) -> list[str]:
        """Return the lines of the report."""
        prompts = prompts_of_run(self.trainer, self.manifest)
        lengths: dict[str, tuple[int, int]] = {}
        for prompt in prompts:  # a text may go with several sources, and without
            counted = self.trainer.count_tokens(prompt)
            lengths[prompt.text] = max(counted, lengths.get(prompt.text, counted))
        sources = source_lines(self.manifest, self.trainer.source_dropout())
        cached = self._cached(prompts)
        known = all_are_known(self.trainer, self.manifest)
        longest = max(map(min, lengths.values()), default=1) if known else None
        parts = {
            "Pictures": bucket_lines(self.manifest, self.trainer.token_budget) + sources,
            "Captions": caption_lines(lengths, known) + self._lines_of_others(prompts),
            "Steps": self._step_lines(),
            "Caches": cache_lines(cached),
            "Model": self._model_lines(longest, cached),
            "Adjusted": self._adjustments() or ["nothing"],
        }
        return [line for title, lines in parts.items() for line in ("", title, *(f"  {x}" for x in lines))]

    def draw_first(self) -> Path:
        """Draw one sheet of the first pictures of the run."""
        path = self.folder / "dry_run.png"
        draws = list(islice(first_draws(self.plan), PER_SHEET))
        write_sheet(path, self.manifest, draws, self._shown())
        return path

    def draw_all(self) -> list[Path]:
        """Draw sheets of all pictures."""
        return write_sheets(self.folder / "debug_dataset", self.manifest, self.plan, self._shown())

    def _shown(self) -> Shown:
        caching = self.options.caching
        variants = caching.max_caption_variants if caching.texts else None
        return Shown(self.seed, self.total_steps, variants, self.trainer.source_dropout())

    def _lines_of_others(self, prompts: Iterable[Prompt]) -> list[str]:
        """A line for each further text encoder about the texts that it does not take whole."""
        texts = {prompt.text: self.trainer.count_of_others(prompt) for prompt in prompts}
        limits = {encoder: limit for counts in texts.values() for encoder, (_, limit) in counts.items()}
        cut = Counter(e for counts in texts.values() for e, (count, limit) in counts.items() if count > limit)
        return [
            f"{cut[e]} longer than {e} takes ({limit} tokens), which are cut" for e, limit in limits.items()
        ]

    def _step_lines(self) -> list[str]:
        plan, training = self.plan, self.options.training
        epochs = self.total_steps / plan.steps_per_epoch
        return [
            f"{plan.draws_per_epoch} pictures an epoch, repeats counted, in {plan.batches_per_epoch} batches",
            f"{plan.steps_per_epoch} steps an epoch: {training.gradient_accumulation_steps} batch(es) a step "
            f"on {self.processes.world} process(es)",
            f"{self.total_steps} steps in all, {epochs:.4g} epochs; seed {self.seed}",
            *self.context.start.sentences,
        ]

    def _cached(self, prompts: dict[Prompt, Item]) -> dict[str, Cached]:
        """What is there of latents and texts, as far as they are cached."""
        found = {}
        if (latents := self.inputs.latent_cache) is not None:
            wanted = {latents.key(item): item for item in items_of_run(self.manifest)}
            found["latents"] = Cached.of(latents.entries, wanted)
        if (features := self.inputs.text_cache) is not None:
            wanted = {features.key(prompt): item for prompt, item in prompts.items()}
            found["texts"] = Cached.of(features.entries, wanted)
        return found

    def _model_lines(self, tokens: int | None, cached: dict[str, Cached]) -> list[str]:
        """Trained numbers, and memory of each part at each time; `tokens` of the longest text, if known."""
        estimate = MemoryEstimate(self.trainer, self.context, tokens=tokens)
        manner, swap = Manner.of(self.options), self.options.swap
        training = estimate.training(manner, swap)
        # A text encoder takes a second to import, which nothing left to encode is not worth.
        to_encode = {name: bool(some.missing) for name, some in cached.items()}
        if self.options.sampling.prompts is not None:
            to_encode["texts"] = True
        others = estimate.other_phases(manner, swap, **to_encode)
        waiting = estimate.in_computer(manner, swap)
        return [
            *self.trainer.trainee_kind.lines(estimate.trainee),
            *self._routing_lines(estimate),
            f"memory of tensors while training: {shown(sum(training.values()))}",
            *(f"  {name}: {shown(size)}" for name, size in training.items()),
            *(f"{phase}: {summed(parts)}" for phase, parts in others.items()),
            *(
                [f"in the computer's memory, of which {shown(free_memory())} are free: {summed(waiting)}"]
                if waiting
                else []
            ),
        ]

    def _routing_lines(self, estimate: MemoryEstimate) -> list[str]:
        work = estimate.work
        return routing_lines(
            estimate.model,
            self.options.tread,
            image=max(map(self.trainer.family.image_tokens, work.sizes)),
            text=work.tokens,
            total_steps=self.total_steps,
        )

    def _adjustments(self) -> list[str]:
        """What is done otherwise than the words of the command line say."""
        training, caching, manifest = self.options.training, self.options.caching, self.manifest
        lines = [f"left out: {sentence}" for sentence in manifest.skipped]
        lines += [f"warning: {sentence}" for sentence in self.context.warnings] + list(manifest.notes)
        if training.seed is None and self.prepared.resumed is None:
            lines.append(f"no --seed is given: a random one is drawn, this time {self.seed}")
        if training.max_train_epochs is not None:
            lines.append(f"--max_train_epochs decides the number of steps: {self.total_steps}")
        if caching.cache_latents_to_disk and not caching.cache_latents:
            lines.append("--cache_latents_to_disk implies --cache_latents")
        if caching.cache_text_encoder_outputs_to_disk and not caching.cache_text_encoder_outputs:
            lines.append("--cache_text_encoder_outputs_to_disk implies --cache_text_encoder_outputs")
        return [*lines, *self.prepared.adjustments]


@dataclass(frozen=True)
class Cached:
    """How many entries there are of those that are wanted."""

    there: int
    wanted: int
    to_disk: bool

    @classmethod
    def of(cls, entries: Entries, wanted: dict[str, Item]) -> Cached:
        """Look for entries by their keys; items say in which store."""
        there = sum(entries.store(item).check(key) for key, item in wanted.items())
        return cls(there, len(wanted), entries.place.to_disk)

    @property
    def missing(self) -> int:
        """How many are to be encoded."""
        return self.wanted - self.there


def cache_lines(cached: dict[str, Cached]) -> list[str]:
    """Return a line each about latents and texts."""
    lines = {
        "latents": "not cached; the autoencoder encodes every picture each time",
        "texts": "not cached; the text encoder stays in memory and encodes every caption",
    }
    for name, some in cached.items():
        kept = "on disk" if some.to_disk else "in memory only"
        lines[name] = (
            f"{some.there} of {some.wanted} are there already, {some.missing} to encode, kept {kept}"
        )
    return [f"{name}: {line}" for name, line in lines.items()]


def bucket_lines(manifest: Manifest, budget: TokenBudget | None = None) -> list[str]:
    """Return a line for each dataset and bucket: pictures, repeats, batch size, and how much is cut off."""
    lines = [f"{len(manifest.train)} to train on, {len(manifest.validation)} held out"]
    groups: dict[tuple[int, tuple[int, int]], list[Item]] = {}
    for item in (manifest.items[index] for index in manifest.train):
        groups.setdefault((item.dataset_index, item.geometry.bucket), []).append(item)
    for (dataset, (width, height)), items in sorted(groups.items()):
        cuts = [_cut_share(item) for item in items]
        repeats = sum(item.repeats for item in items)
        batches = f"batches of {manifest.datasets[dataset].batch_size}"
        if budget is not None:
            batches = f"{budget.tokens((width, height))} of the {budget.limit} tokens of a batch each"
        lines.append(
            f"dataset {dataset}, {width}x{height}: {len(items)} pictures, {repeats} with repeats, {batches}; "
            f"cut off {sum(cuts) / len(cuts):.1%} on average, "
            f"{max(cuts):.1%} at most; {sum(_is_enlarged(item) for item in items)} enlarged"
        )
    return lines


def source_lines(manifest: Manifest, dropout: float) -> list[str]:
    """Return lines about what pictures are edits of, if they are; `dropout` of their draws go without."""
    edits = [item for index in manifest.train if (item := manifest.items[index]).source is not None]
    if not edits:
        return []
    alone = [item for item in edits if item.source.geometry != item.geometry]
    enlarged = sum(item.source.geometry.resized[0] > item.source.size[0] for item in edits)
    lines = [
        f"{len(edits)} of {len(manifest.train)} are trained as edits of a source picture; {enlarged} sources "
        f"are enlarged",
        f"{len(alone)} sources have other proportions than what is made of them, and are cut in the middle",
    ]
    if dropout:
        lines.append(f"{dropout:.1%} of their draws go without the source, from the caption alone")
    return lines


def caption_lines(lengths: dict[str, tuple[int, int]], known: bool) -> list[str]:
    """Return lines about the tokens of texts and sources, given as (needed, taken at most) by text.

    known: whether these are all texts, and not examples.
    """
    if not lengths:
        return ["there are none"]
    what = "texts" if known else "examples of the texts"
    needed = sorted(count for count, _ in lengths.values())
    too_long = {text: (count, limit) for text, (count, limit) in lengths.items() if count > limit}
    lines = [
        f"{len(lengths)} {what} of {needed[0]} to {needed[-1]} tokens, half of them up to "
        f"{needed[(len(needed) - 1) // 2]}",
        f"{len(too_long)} longer than the text encoder takes, which are cut",
    ]
    for text, (count, limit) in sorted(too_long.items(), key=lambda pair: -pair[1][0])[:_LONGEST_SHOWN]:
        lines.append(f"  {count} tokens, cut to {limit}: ...{text[-60:]!r}")
    return lines


def _cut_share(item: Item) -> float:
    (width, height), (bucket_width, bucket_height) = item.geometry.resized, item.geometry.bucket
    return 1 - bucket_width * bucket_height / (width * height)


def _is_enlarged(item: Item) -> bool:
    return item.geometry.resized[0] > item.size[0]
