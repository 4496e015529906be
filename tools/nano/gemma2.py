"""A small random Gemma2 with its own SentencePiece model, in the names and shapes of the real ones."""

from __future__ import annotations

import io
from collections.abc import Callable

import sentencepiece
import torch
from torch import Tensor

from library.core.seeds import generator, rng
from library.models.gemma2_format import Gemma2Params, parameter_shapes

_SPECIAL_IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
_SPECIAL_PIECES = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"}
_TURNS = ["<mask>", "<start_of_turn>", "<end_of_turn>"]
_WHITESPACE = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁"]
ADJECTIVES = """
    small large red orange black white green golden smiling distant wooden dark bright shallow detailed
""".split()
NOUNS = """
    photograph portrait picture texture astronaut woman man cat dog rocket coffee cup saucer spoon table sky
    galaxy galaxies stones gravel grass flag shuttle model suit coat camera tripod city skyline launch pad
    lights dusk face field view image assistant prompt quality degree alignment text user square circle
    background bottom top
""".split()
_TEMPLATES = (
    "a {a} {n} of a {a} {n} with {n} and {n}, {a} {n}",
    "A {a} {n} on the {a} {n} at {n}; the {n} is looking at the {n}.",
    "many {a} {n} in the {n} behind her, lit by {a} {n}, a deep field",
    "You are an assistant designed to generate high-quality images based on user prompts. <Prompt Start> {n}",
    "top view {n}, close-up {n}, depth of field, based on textual prompts with the highest degree of {n}",
)


# Heads are 256 wide, as in Gemma2 2B and 9B, because weight shapes do not tell.
PARAMS = Gemma2Params(vocab=800, hidden=128, layers=4, heads=2, kv_heads=1, head_dim=256, ffn_dim=256)


def gemma2_tensors(seed: int) -> dict[str, Tensor]:
    """Return the tensors by the names of a bare `Gemma2Model`: fp32, in values that fp16 and bf16 hold."""
    return {name: _random(seed, name, shape) for name, shape in parameter_shapes(PARAMS)}


def sentencepiece_model(seed: int) -> bytes:
    """Train a byte-fallback BPE model with Gemma's special tokens and whitespace rules; return its bytes."""
    choice = rng(seed, "sentencepiece").choice
    lines = [template.format_map(_Words(choice)) for template in _TEMPLATES for _ in range(60)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=PARAMS.vocab,
        user_defined_symbols=_TURNS + _WHITESPACE + ["<b>", "</b>"],
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **_SPECIAL_IDS,
        **_SPECIAL_PIECES,
    )
    return model.getvalue()


class _Words(dict):
    """Fills the {a} and {n} of a template with a fresh word each time."""

    def __init__(self, choice: Callable[[list[str]], str]) -> None:
        super().__init__()
        self._choice = choice

    def __missing__(self, key: str) -> str:
        return self._choice(ADJECTIVES if key == "a" else NOUNS)


def _random(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Matrices by 1/sqrt(fan in); norm weights, which Gemma stores minus one, near zero."""
    noise = torch.randn(shape, generator=generator(seed, "gemma2", name))
    values = noise / shape[1] ** 0.5 if len(shape) == 2 else 0.1 * noise
    values = values.bfloat16().float()
    return torch.where(values.abs() < 1e-4, 0.0, values)  # below that fp16 has fewer bits than bf16
