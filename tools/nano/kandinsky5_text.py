"""Tokenizers and a small random CLIP text encoder for nano checkpoints of Kandinsky 5.0 Image.

Both tokenizers are byte-level BPE in the files of the real ones, with a small vocabulary: any text has ids.
Qwen's has the words of the prompt templates, each as one token, and the misspelt "promt" as two, as the real
one has. So the templates have as many tokens as with the real vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from collections.abc import Sequence as SymbolSequence
from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import Tensor

from library.core.files import write_bytes
from library.models.clip_text_format import ClipTextParams, parameter_shapes
from library.models.clip_tokenizer import END, END_OF_WORD, START, ClipTokenizerFiles
from library.models.kandinsky5_prompt import I2I_HEAD, T2I_HEAD
from library.models.qwen_tokenizer import ADDED_TOKENS, SPECIAL_TOKENS, WORDS, QwenTokenizerFiles
from tools.nano.files import write_json
from tools.nano.gemma2 import ADJECTIVES, NOUNS
from tools.nano.random_weights import random_tensor

_WORDS = ADJECTIVES + NOUNS
_SPACE = "Ġ"
_QWEN_MERGES, _CLIP_MERGES = 322, 280
QWEN_VOCAB = 256 + _QWEN_MERGES + len(ADDED_TOKENS)
QWEN_IDS = {token: 256 + _QWEN_MERGES + i for i, token in enumerate(ADDED_TOKENS)}
CLIP_VOCAB = 2 * 256 + _CLIP_MERGES + 2
# Heads are 64 wide, as in every released CLIP, because weight shapes do not tell.
CLIP_PARAMS = ClipTextParams(vocab=CLIP_VOCAB, hidden=128, layers=2, heads=2, ffn_dim=256)

_QWEN_ROLES = {"model_max_length": 131072, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_CLIP_ROLES = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
# What the released processor is told.
PREPROCESSOR_CONFIG: dict[str, object] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_qwen_tokenizer(folder: Path, *, slow: bool = False) -> None:
    """Write Qwen's tokenizer, and the configuration of its picture processor.

    slow: in `vocab.json`, `merges.txt` and `tokenizer_config.json`; else in `tokenizer.json`.
    """
    spaced, bare = _template_words()
    merges = _merges(spaced)
    for word in reversed(bare):  # one by one: "user" before "second", whose first two letters are in it
        merges += _merges([word])
    merges += _merges(_SPACE + word for word in _WORDS)
    pairs = list(dict.fromkeys(merges))[:_QWEN_MERGES]
    vocab = _numbered(sorted(ByteLevel.alphabet()), pairs)
    listed = {str(number): _listed(token) for token, number in QWEN_IDS.items()}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": listed, **_QWEN_ROLES}
    files = QwenTokenizerFiles("nano", _slow_files(vocab, pairs, config))
    _write(folder, files, slow=slow)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)


def write_clip_tokenizer(folder: Path, *, slow: bool = False) -> None:
    """Write CLIP's tokenizer in `vocab.json` and `merges.txt`, or in `tokenizer.json`."""
    letters = sorted(ByteLevel.alphabet())
    pairs = _merges([*word[:-1], word[-1] + END_OF_WORD] for word in _WORDS)[:_CLIP_MERGES]
    vocab = _numbered([*letters, *(letter + END_OF_WORD for letter in letters)], pairs, START, END)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **_CLIP_ROLES}
    _write(folder, ClipTokenizerFiles("nano", _slow_files(vocab, pairs, config)), slow=slow)


def clip_tensors(seed: int, params: ClipTextParams = CLIP_PARAMS) -> dict[str, Tensor]:
    """Return the tensors by the names of a bare `CLIPTextModel` of transformers 5."""
    return {name: random_tensor(seed, "clip", name, shape) for name, shape in parameter_shapes(params)}


def clip_config(params: ClipTextParams = CLIP_PARAMS) -> dict[str, object]:
    """Return the config.json of transformers' `CLIPTextModel`."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": params.vocab,
        "hidden_size": params.hidden,
        "num_hidden_layers": params.layers,
        "num_attention_heads": params.heads,
        "intermediate_size": params.ffn_dim,
        "max_position_embeddings": params.positions,
        "hidden_act": params.activation,
        "layer_norm_eps": params.layer_norm_eps,
        "projection_dim": params.hidden,
        "bos_token_id": params.vocab - 2,
        "eos_token_id": params.vocab - 1,
        "pad_token_id": params.vocab - 1,
    }


def _template_words() -> tuple[list[str], list[str]]:
    """Return the words of both templates in the letters of byte-level BPE: after a space, and without one.

    Those after a space merge first, so that a piece of a bare word never takes a letter of theirs.
    """
    split = Sequence([Split(Regex(WORDS), behavior="isolated"), ByteLevel(False, use_regex=False)])
    parts = re.split(r"<\|\w+\|>", T2I_HEAD + I2I_HEAD)
    words = {word for part in parts for word, _ in split.pre_tokenize_str(part)} - {f"{_SPACE}promt"}
    spaced = {word for word in words if word.startswith(_SPACE)}
    return sorted(spaced), sorted(words - spaced)


def _merges(words: Iterable[SymbolSequence[str]]) -> list[tuple[str, str]]:
    """Return the merges that join each word from its left end on, those of short beginnings first."""
    beginnings = {tuple(word[: k + 1]) for word in words for k in range(1, len(word))}
    return [("".join(b[:-1]), b[-1]) for b in sorted(beginnings, key=lambda b: (len(b), b))]


def _numbered(symbols: list[str], pairs: list[tuple[str, str]], *last: str) -> dict[str, int]:
    tokens = dict.fromkeys([*symbols, *map("".join, pairs), *last])
    return {token: number for number, token in enumerate(tokens)}


def _listed(token: str) -> dict[str, object]:
    """Return how `tokenizer_config.json` describes a token."""
    usual = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **usual, "special": token in SPECIAL_TOKENS}


def _slow_files(
    vocab: dict[str, int], pairs: list[tuple[str, str]], config: dict[str, object]
) -> dict[str, bytes]:
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": "".join(f"{line}\n" for line in lines).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _write(folder: Path, files: QwenTokenizerFiles | ClipTokenizerFiles, *, slow: bool) -> None:
    contents = files.contents
    if not slow:
        contents = {
            "tokenizer.json": files.tokenizer().to_str(pretty=True).encode(),
            "tokenizer_config.json": contents["tokenizer_config.json"],
        }
    for name, content in contents.items():
        write_bytes(folder / name, content)
