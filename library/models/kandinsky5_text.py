"""Prompts of Kandinsky 5.0 Image to conditions: features of Qwen2.5-VL, and CLIP's pooled vector.

Qwen gets the prompt in its template (see `kandinsky5_prompt`), with the source picture where there is one,
for negative prompts too; CLIP gets the bare text. The features are neither padded nor masked: Qwen is causal,
so padding on the right, which the official code takes out again by its mask, has no influence on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from library.core.errors import NonFiniteError
from library.data.batch import Condition
from library.data.images import load_source
from library.data.items import Size
from library.data.prompt import Prompt, SourcePicture
from library.models.clip_text import ClipTextEncoder, load_clip_text
from library.models.clip_text_format import ClipTextCheckpoint
from library.models.kandinsky5_prompt import Kandinsky5Tokenizers, QwenPrompt, qwen_prompt
from library.models.qwen2_5_vl import Qwen2_5_VLEncoder, QwenInput, load_qwen2_5_vl
from library.models.qwen2_5_vl_format import Qwen2_5_VLCheckpoint
from library.models.qwen_grid import picture_grid
from library.models.qwen_picture import qwen_picture
from library.options.quant import TextQuantOptions

_WHOLE = TextQuantOptions()


class Kandinsky5TextEncoders(nn.Module):
    """Both text encoders."""

    def __init__(self, qwen: Qwen2_5_VLEncoder, clip: ClipTextEncoder) -> None:
        super().__init__()
        self.qwen = qwen
        self.clip = clip

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return self.qwen.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and features."""
        return self.qwen.dtype

    def encode_blank(self, tokens: int, count: int) -> list[Condition]:
        """Encode `count` texts of so many tokens with nothing in them, of which only the shapes count."""
        features = self.qwen.encode([QwenInput([0] * tokens)] * count)
        pooled_BD = self.clip.encode([[0]] * count)
        pairs = zip(features, pooled_BD, strict=True)
        return [Condition(tokens_LD, pooled_D) for tokens_LD, pooled_D in pairs]

    def see_blank(self, source: Size, count: int) -> list[Tensor | None]:
        """Look at `count` sources of this size with nothing in them, of which only the shapes count."""
        vision, grid = self.qwen.params.vision, picture_grid(source)
        assert vision is not None, "loaded without its vision tower"
        patches_NP = torch.zeros(prod(grid), vision.patch_width)
        return self.qwen.see([QwenInput([], patches_NP, grid)] * count)


def load_text_encoders(
    qwen: Path | Qwen2_5_VLCheckpoint,
    clip: Path | ClipTextCheckpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vision: bool,
    quant: TextQuantOptions = _WHOLE,
    streamed: bool = False,
) -> Kandinsky5TextEncoders:
    """Load both text encoders, frozen.

    Args:
        vision: with Qwen's eyes, which source pictures need. quant, streamed: see `load_qwen2_5_vl`; CLIP is
            small.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind.
        ConfigError: the scheme cannot quantise these layers.
    """
    return Kandinsky5TextEncoders(
        load_qwen2_5_vl(qwen, device=device, dtype=dtype, vision=vision, quant=quant, streamed=streamed),
        load_clip_text(clip, device=device, dtype=dtype),
    )


def encode_prompts(
    encoders: Kandinsky5TextEncoders,
    tokenizers: Kandinsky5Tokenizers,
    prompts: Sequence[Prompt],
    *,
    max_length: int,
    edit_crop: int,
    batch_size: int = 8,
    load: Callable[[SourcePicture], np.ndarray] = load_source,
) -> list[Condition]:
    """Encode prompts, one condition each; see `qwen_prompt` for `max_length` and `edit_crop`.

    `load` reads a source picture; one that remembers them may be given.

    Prompts of similar length are put together, so little is padded. What a prompt is encoded together with
    changes no more than its last bits. A streamed Qwen gets all at once: it takes them through a layer before
    it fetches the next.

    Raises:
        DataError: a source picture has gone bad, or its prompt has the mark of a picture inside.
        ConfigError: the tokens are not those of the weights.
        NonFiniteError: an encoder overflowed.
    """
    asked = [
        qwen_prompt(tokenizers.qwen, prompt, max_length=max_length, edit_crop=edit_crop) for prompt in prompts
    ]
    order = sorted(range(len(prompts)), key=lambda place: len(asked[place].ids))
    together = len(order) if encoders.qwen.streamed else batch_size
    conditions: dict[int, Condition] = {}
    for batch in _chunks(order, together):
        inputs = [_qwen_input(prompts[place], asked[place], load) for place in batch]
        features = encoders.qwen.encode(inputs, batch_size=batch_size)
        pooled = [
            vector_D
            for part in _chunks(batch, batch_size)
            for vector_D in encoders.clip.encode([tokenizers.clip.ids(prompts[i].text) for i in part])
        ]
        for place, features_LD, pooled_D in zip(batch, features, pooled, strict=True):
            _require_finite("Qwen2.5-VL", features_LD, prompts[place])
            _require_finite("CLIP", pooled_D, prompts[place])
            tokens_LD = features_LD[asked[place].crop :].clone()
            conditions[place] = Condition(tokens_LD, pooled_D.to(tokens_LD.device, copy=True))
    return [conditions[place] for place in range(len(prompts))]


def _chunks(places: list[int], size: int) -> list[list[int]]:
    return [places[start : start + size] for start in range(0, len(places), max(1, size))]


def _qwen_input(prompt: Prompt, asked: QwenPrompt, load: Callable[[SourcePicture], np.ndarray]) -> QwenInput:
    if prompt.source is None:
        return QwenInput(asked.ids)
    picture = qwen_picture(load(prompt.source))
    assert picture.grid_thw == asked.grid, "a source picture is as large as its target"
    return QwenInput(asked.ids, torch.from_numpy(picture.patches_NP), picture.grid_thw)


def _require_finite(encoder: str, features: Tensor, prompt: Prompt) -> None:
    if not torch.isfinite(features).all():
        picture = "" if prompt.source is None else f" with {prompt.source.path}"
        raise NonFiniteError(
            f"{encoder} gave NaN or infinite features in {features.dtype} for the prompt "
            f"{prompt.text[:80]!r}{picture}; use bf16 or fp32."
        )
