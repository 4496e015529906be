"""Prompts of Kandinsky 5.0 Image as token ids: templates, where features begin, what is cut. No torch.

What the model was trained with is written here once, with the spelling of the official code
(kandinsky/models/text_embedders.py): weights that were trained with "promt" want it.

* Text to image: template and caption are cut after 41 + 512 tokens, and the features of the first 41, the
  template's, are dropped. So a caption that is too long loses its end and the closing `<|im_end|>` too, and
  an empty one keeps one token.
* Image to image: the picture stands behind the caption. 55 features are dropped although the template has 52
  tokens: the first three tokens of the caption are lost (of an empty one, the first of the picture), but the
  later ones have seen them. The official code does not cut here, and fails where a sequence outgrows the
  transformer's 1024 text positions. Here the caption is cut as in text to image, or earlier beside a picture
  of more than 509 tokens (those of official sizes have 336 at most), and the picture never is.

The picture stands for itself: `<|image_pad|>` is repeated as often as Qwen sees parts of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.core.errors import DataError
from library.data.prompt import Prompt
from library.models.clip_tokenizer import ClipTokenizer
from library.models.kandinsky5_format import MOST_TOKENS
from library.models.qwen_grid import Grid, picture_grid, token_count
from library.models.qwen_tokenizer import IMAGE_PAD, QwenTokenizer

T2I_HEAD = (
    "<|im_start|>system\nYou are a promt engineer. Describe the image by detailing the color, shape, size, "
    "texture, quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
I2I_HEAD = (
    "<|im_start|>system\nYou are a promt engineer. Based on the provided source image (first image) and "
    "target image (second image), create an interesting text prompt that can be used together with the "
    "source image to create the target image:<|im_end|>\n<|im_start|>user\n"
)
_TAIL = "<|im_end|>"
_PICTURE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
_PICTURE_TAIL_TOKENS = 4  # of _PICTURE and _TAIL, before the picture is spelt out
# How many tokens Qwen's own tokenizer makes of the two heads.
T2I_HEAD_TOKENS, I2I_HEAD_TOKENS = 41, 52


@dataclass(frozen=True)
class Kandinsky5Tokenizers:
    """The tokenizers of both text encoders."""

    qwen: QwenTokenizer
    clip: ClipTokenizer


@dataclass(frozen=True)
class QwenPrompt:
    """One prompt as Qwen takes it.

    crop: how many features in front are dropped. whole: how many features the prompt would have, had it not
    been cut, and limit: how many it may have. grid: the picture's patches (time, height, width), if there is
    one.
    """

    ids: list[int]
    crop: int
    whole: int
    limit: int
    grid: Grid | None = None


def qwen_prompt(tokenizer: QwenTokenizer, prompt: Prompt, *, max_length: int, edit_crop: int) -> QwenPrompt:
    """Return the token ids of a prompt in its template.

    Args:
        max_length: after how many tokens a caption is cut.
        edit_crop: features that are dropped where there is a picture, counted in Qwen's own tokens: 55 (as
            trained) or 52 (the whole caption). With another vocabulary it is as far from the template's end.

    Raises:
        DataError: a text that goes with a picture has the mark of a picture inside.
    """
    if prompt.source is None:
        ids = tokenizer.ids(f"{T2I_HEAD}{prompt.text}{_TAIL}")
        crop = tokenizer.count(T2I_HEAD)
        return QwenPrompt(ids[: crop + max_length], crop, len(ids) - crop, max_length)
    ids = tokenizer.ids(f"{I2I_HEAD}{prompt.text}{_PICTURE}{_TAIL}")
    check_text(prompt.text, prompt.source.path)
    text, tail = ids[:-_PICTURE_TAIL_TOKENS], ids[-_PICTURE_TAIL_TOKENS:]
    crop = tokenizer.count(I2I_HEAD) + edit_crop - I2I_HEAD_TOKENS
    grid = picture_grid(prompt.source.geometry.bucket)
    tail = [tail[0], *[tokenizer.image_pad_id] * token_count(grid), *tail[2:]]
    limit = min(max_length + len(tail), MOST_TOKENS)
    kept = [*text[: crop + limit - len(tail)], *tail]
    return QwenPrompt(kept, crop, len(text) + len(tail) - crop, limit, grid)


def check_text(text: str, source: Path | None) -> None:
    """Raise DataError for a text with the mark of a picture inside, if it goes with one."""
    if source is not None and IMAGE_PAD in text:
        raise DataError(
            f"The prompt {text[:80]!r} has {IMAGE_PAD} in it, which stands for the source picture {source}; "
            f"take it out."
        )


def count_tokens(
    tokenizer: QwenTokenizer, prompt: Prompt, *, max_length: int, edit_crop: int
) -> tuple[int, int]:
    """Return how many features a prompt has uncut, and how many it may have; a picture's count in both.

    Raises:
        DataError: as `qwen_prompt` does.
    """
    found = qwen_prompt(tokenizer, prompt, max_length=max_length, edit_crop=edit_crop)
    return found.whole, found.limit
