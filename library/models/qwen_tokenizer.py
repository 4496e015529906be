"""Qwen2.5's tokenizer from local files: text to token ids, the same ids as transformers gives. No torch.

Byte-level BPE, from `tokenizer.json` or from `vocab.json` and `merges.txt`. The special tokens (`<|im_end|>`
and its like) are not part of the vocabulary: `tokenizer_config.json` lists them, else the published ones are
taken. Written into a prompt they are read as special tokens, as in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from library.core.errors import CheckpointError
from library.models.tokenizer_files import TokenizerFiles, TokenizerPlaces

IMAGE_PAD = "<|image_pad|>"
# How Qwen2 splits a text before merging: contractions, words with what stands before them, single digits,
# punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>",
)  # fmt: skip
# The published list goes on with tokens that are cut out of a text like these, but are not special.
ADDED_TOKENS = (
    *SPECIAL_TOKENS, "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
_NEEDED = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_PAD)


class QwenTokenizer:
    """Text to token ids; nothing is put before or after them."""

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        for token in _NEEDED:
            if tokenizer.token_to_id(token) is None:
                raise CheckpointError(
                    f"{origin} is not the tokenizer of Qwen2.5-VL: it has no {token} token."
                )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.size = tokenizer.get_vocab_size()
        self.image_pad_id: int = tokenizer.token_to_id(IMAGE_PAD)
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def count(self, text: str) -> int:
        """Return how many ids a text has."""
        return len(self.ids(text))


@dataclass(frozen=True)
class QwenTokenizerFiles(TokenizerFiles):
    """The tokenizer that was found."""

    def build(self) -> QwenTokenizer:
        """Build the tokenizer: about half a second for the real one.

        Raises:
            CheckpointError: damaged, or not that of Qwen2.5-VL.
        """
        return QwenTokenizer(self.tokenizer(), self.origin)

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer as the package has it, whosever it is.

        Raises:
            CheckpointError: damaged.
        """
        if "tokenizer.json" in self.contents:
            return self.from_json()
        vocab, merges = self.byte_pairs()
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
        tokenizer.normalizer = NFC()
        split = Split(Regex(WORDS), behavior="isolated")
        tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.add_tokens(self._added_tokens())
        return tokenizer

    def _added_tokens(self) -> list[AddedToken]:
        """Return what is cut out of a text before it is split, in the order of the ids."""
        listed = self.read_json("tokenizer_config.json").get("added_tokens_decoder")
        if not isinstance(listed, dict) or not listed:
            return [
                AddedToken(token, normalized=False, special=token in SPECIAL_TOKENS) for token in ADDED_TOKENS
            ]
        try:
            return [
                AddedToken(**{"normalized": False} | token)
                for _, token in sorted((int(number), token) for number, token in listed.items())
            ]
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"added_tokens_decoder in the tokenizer_config.json of {self.origin} cannot be used: {error}."
            ) from error


_PLACES = TokenizerPlaces(
    kind=QwenTokenizerFiles,
    model="Qwen2.5-VL",
    flag="--qwen_tokenizer",
    repository="Qwen/Qwen2.5-VL-7B-Instruct",
    file_sets=(("tokenizer.json",), ("vocab.json", "merges.txt")),
    inside=("qwen_tokenizer", ".", "tokenizer", "processor"),
    beside=("tokenizer", "processor"),
    companion="tokenizer_config.json",
)


def find_qwen_tokenizer(
    weights: Path, named: Path | None = None, cache_dir: Path | None = None
) -> QwenTokenizerFiles:
    """Find the tokenizer of Qwen2.5-VL; the first of these that there is:

    1. `named`: a `tokenizer.json`, a `vocab.json` with its `merges.txt`, or a folder (--qwen_tokenizer);
    2. the same files in a folder `qwen_tokenizer` beside the weights, beside the weights themselves, or in
       the folder `tokenizer` or `processor` of a pipeline;
    3. the hub's Qwen/Qwen2.5-VL-7B-Instruct, from the hub cache (`cache_dir`) if it is there.

    Raises:
        ConfigError: `named` is not a tokenizer, or none was found anywhere and the hub gives none.
    """
    return _PLACES.find(weights, named, cache_dir)
