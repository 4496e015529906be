"""CLIP's tokenizer from local files: text to token ids, the same ids as transformers gives. No torch.

Byte-level BPE on lower-case words, from `tokenizer.json` or from `vocab.json` and `merges.txt`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from library.core.errors import CheckpointError
from library.models.tokenizer_files import TokenizerFiles, TokenizerPlaces

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Text to token ids, between `<|startoftext|>` and `<|endoftext|>`."""

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        for token in (START, END):
            if tokenizer.token_to_id(token) is None:
                raise CheckpointError(f"{origin} is not CLIP's tokenizer: it has no {token} token.")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.size = tokenizer.get_vocab_size()
        self._start_id, self._end_id = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, at most 77 in all; the last is `<|endoftext|>`, the only one.

        CLIP is read at the first `<|endoftext|>`, and what follows it has no influence there. So the padding,
        which is of the same token, is left off, as is the rest of a text in which somebody wrote it.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids[: MAX_TOKENS - 2]
        ids = ids[: ids.index(self._end_id)] if self._end_id in ids else ids
        return [self._start_id, *ids, self._end_id]

    def count(self, text: str) -> int:
        """Return how many ids the whole text has, with both marks."""
        return 2 + len(self._tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class ClipTokenizerFiles(TokenizerFiles):
    """The tokenizer that was found."""

    def build(self) -> ClipTokenizer:
        """Build the tokenizer.

        Raises:
            CheckpointError: damaged, or not CLIP's.
        """
        return ClipTokenizer(self.tokenizer(), self.origin)

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer as the package has it, whosever it is.

        Raises:
            CheckpointError: damaged.
        """
        if "tokenizer.json" in self.contents:
            return self.from_json()
        vocab, merges = self.byte_pairs()
        unknown = END if END in vocab else None
        tokenizer = Tokenizer(
            BPE(vocab=vocab, merges=merges, unk_token=unknown, end_of_word_suffix=END_OF_WORD)
        )
        tokenizer.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
        split = Split(Regex(_WORDS), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False)])
        tokenizer.add_special_tokens([AddedToken(token) for token in (START, END) if token in vocab])
        return tokenizer


_PLACES = TokenizerPlaces(
    kind=ClipTokenizerFiles,
    model="CLIP",
    flag="--clip_tokenizer",
    repository="openai/clip-vit-large-patch14",
    file_sets=(("tokenizer.json",), ("vocab.json", "merges.txt")),
    inside=("clip_tokenizer", ".", "tokenizer_2"),
    beside=("tokenizer_2", "tokenizer"),
)


def find_clip_tokenizer(
    weights: Path, named: Path | None = None, cache_dir: Path | None = None
) -> ClipTokenizerFiles:
    """Find the tokenizer of CLIP's text encoder; the first of these that there is:

    1. `named`: a `tokenizer.json`, a `vocab.json` with its `merges.txt`, or a folder (--clip_tokenizer);
    2. the same files in a folder `clip_tokenizer` beside the weights, beside the weights themselves, or in
       the folder `tokenizer_2` of a pipeline (`tokenizer` where there is no other);
    3. the hub's openai/clip-vit-large-patch14, from the hub cache (`cache_dir`) if it is there.

    Raises:
        ConfigError: `named` is not a tokenizer, or none was found anywhere and the hub gives none.
    """
    return _PLACES.find(weights, named, cache_dir)
