"""Gemma's tokenizer from local files: text to token ids, the same ids as transformers gives. No torch.

A SentencePiece model becomes a byte-fallback BPE of the `tokenizers` package, as in transformers, but without
importing that, which takes seconds. Where SentencePiece itself would differ (runs of spaces longer than any
piece, `<bos>` typed into a prompt), transformers is followed, because Lumina was trained with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace

from library.core.checkpoint_files import TensorInfo, open_checkpoint
from library.core.errors import CheckpointError
from library.models.tokenizer_files import TokenizerFiles, TokenizerPlaces

PROMPT_START = "<Prompt Start>"
_SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>", "<mask>")
_BPE = 2  # TrainerSpec.model_type
_CONTROL, _USER_DEFINED = 3, 4  # SentencePiece.type


def format_prompt(system_prompt: str, caption: str) -> str:
    """Join a system prompt and a caption, as Lumina was trained: "system <Prompt Start> caption".

    Whoever wrote the mark is not given a second one: it may end the system prompt, begin the caption, or be
    inside the caption, which then has a system prompt of its own.
    """
    own_system, mark, rest = caption.partition(PROMPT_START)
    if not system_prompt or own_system.strip() and mark:
        return caption
    if system_prompt.rstrip().endswith(PROMPT_START):
        system_prompt = system_prompt.rstrip().removesuffix(PROMPT_START).rstrip()
    return f"{system_prompt} {PROMPT_START} {rest.lstrip() if mark else caption}"


class GemmaTokenizer:
    """Text to token ids, beginning with `<bos>`."""

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        bos_id = tokenizer.token_to_id("<bos>")
        if bos_id is None:
            raise CheckpointError(f"{origin} is not Gemma's tokenizer: it has no <bos> token.")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.size = tokenizer.get_vocab_size()
        self._tokenizer, self._bos_id = tokenizer, bos_id

    def ids(self, text: str, max_length: int | None = None) -> list[int]:
        """Return `<bos>` and the ids of `text`, at most `max_length` in all."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._bos_id, *ids][:max_length]

    def count(self, text: str) -> int:
        """Return how many ids the whole text has, with `<bos>`."""
        return len(self.ids(text))


@dataclass(frozen=True)
class GemmaTokenizerFiles(TokenizerFiles):
    """The tokenizer that was found: `tokenizer.json`, or a SentencePiece model."""

    def build(self) -> GemmaTokenizer:
        """Build the tokenizer: about a second for the real one.

        Raises:
            CheckpointError: damaged, or not Gemma's.
        """
        if "tokenizer.json" in self.contents:
            return GemmaTokenizer(self.from_json(), self.origin)
        return GemmaTokenizer(_from_sentencepiece(self.contents["tokenizer.model"], self.origin), self.origin)


_PLACES = TokenizerPlaces(
    kind=GemmaTokenizerFiles,
    model="Gemma2",
    flag="--gemma2_tokenizer",
    repository="google/gemma-2-2b",
    file_sets=(("tokenizer.json",), ("tokenizer.model",)),
    inside=(".", "tokenizer"),
    beside=("tokenizer",),
    hint=" (the hub's needs a login), or use ComfyUI's Gemma2 file, which has one inside",
)


def load_gemma2_tokenizer(
    weights_path: Path, tokenizer_path: Path | None = None, cache_dir: Path | None = None
) -> GemmaTokenizer:
    """Find and build the tokenizer; see `find_tokenizer`."""
    return find_tokenizer(weights_path, tokenizer_path, cache_dir).build()


def find_tokenizer(
    weights_path: Path, tokenizer_path: Path | None = None, cache_dir: Path | None = None
) -> GemmaTokenizerFiles:
    """Find the tokenizer of a Gemma2 checkpoint; the first of these that there is:

    1. `tokenizer_path`: a `tokenizer.json`, a SentencePiece model, or a folder with one (--gemma2_tokenizer);
    2. the `spiece_model` tensor inside the weight file, as ComfyUI stores it;
    3. `tokenizer.json` or `tokenizer.model` beside the weights, or in the `tokenizer` folder of a pipeline;
    4. the hub's google/gemma-2-2b, from the hub cache (`cache_dir`) if it is there.

    Raises:
        ConfigError: `tokenizer_path` is not a tokenizer, or none was found anywhere and the hub gives none.
        CheckpointError: the weights cannot be read.
    """
    if tokenizer_path is not None:
        return _PLACES.named(Path(tokenizer_path))
    checkpoint = open_checkpoint(weights_path, subfolder="text_encoder")
    for name, info in checkpoint.tensors.items():
        if name.rpartition(".")[2] == "spiece_model":
            origin = f"The spiece_model in {info.file}"
            return GemmaTokenizerFiles(origin, {"tokenizer.model": _tensor_bytes(info)})
    weights_path = Path(weights_path)
    return _PLACES.near(weights_path) or _PLACES.from_hub(weights_path, cache_dir)


def _tensor_bytes(info: TensorInfo) -> bytes:
    with safe_open(info.file, framework="np") as handle:
        return handle.get_tensor(info.name).tobytes()


def _from_sentencepiece(model: bytes, origin: str) -> Tokenizer:
    """Build the BPE of a SentencePiece model with transformers' rules.

    Every way to split a piece into two pieces is a merge; merges rank by the piece's place in the vocabulary,
    then by the length of the left part. Control and user-defined pieces are cut out of the raw text first.
    """
    pieces = _read_pieces(model, origin)
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = [
        (piece[:k], piece[k:])
        for piece in vocab
        for k in range(1, len(piece))
        if piece[:k] in vocab and piece[k:] in vocab
    ]
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = Replace(" ", "▁")
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == _CONTROL)
            for piece, kind in pieces
            if kind in (_CONTROL, _USER_DEFINED) or piece in _SPECIAL
        ]
    )
    return tokenizer


def _read_pieces(model: bytes, origin: str) -> list[tuple[str, int]]:
    """Return (piece, type) of every piece of a serialised SentencePiece model."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise CheckpointError(f"{origin} is damaged, or is not a SentencePiece model.") from error
    if proto.trainer_spec.model_type != _BPE:
        raise CheckpointError(f"{origin} is not Gemma's tokenizer: it is not a SentencePiece model of BPE.")
    return [(piece.piece, piece.type) for piece in proto.pieces]
