"""A family that edits pictures, as small as it can be: Lumina, to whom a source is a few more tokens, and an
offset of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad

from library.data.batch import Condition
from library.data.images import load_source
from library.data.prompt import Prompt
from library.data.tensors import pixels_to_tensor
from library.nn.running.routing import Routing
from lumina_train_network import LuminaTrainer


class EditingTrainer(LuminaTrainer):
    """Remembers what it was given."""

    dropout: ClassVar[float] = 0.0
    at_once: ClassVar[int | None] = None
    batches: ClassVar[list[list[Prompt]]] = []

    def edits_pictures(self) -> bool:
        """It does."""
        return True

    def source_dropout(self) -> float:
        """As the test says."""
        return self.dropout

    def texts_at_once(self, batch_size: int) -> int:
        """As the test says."""
        return self.at_once or batch_size

    def encode_prompts(self, encoders: nn.Module, prompts: Sequence[Prompt]) -> list[Condition]:
        """Put the source's colours behind the text's tokens."""
        self.batches.append(list(prompts))
        conditions = super().encode_prompts(encoders, prompts)
        return [
            c if p.source is None else replace(c, tokens_LD=torch.cat([c.tokens_LD, seen(p, c)]))
            for c, p in zip(conditions, prompts, strict=True)
        ]

    def velocities(
        self,
        model: nn.Module,
        x: Sequence[Tensor],
        sigma_B: Tensor,
        conditions: Sequence[Condition],
        routing: Routing | None = None,
    ) -> list[Tensor]:
        """Add the source's latents to what the model is given."""
        pairs = zip(x, conditions, strict=True)
        moved = [x_Chw if c.source_Chw is None else x_Chw + c.source_Chw for x_Chw, c in pairs]
        return super().velocities(model, moved, sigma_B, conditions, routing)


def seen(prompt: Prompt, condition: Condition) -> Tensor:
    """Return the tokens (4, D) of a prompt's source."""
    assert prompt.source is not None
    pixels_3HW = pixels_to_tensor(load_source(prompt.source))
    colours_43 = adaptive_avg_pool2d(pixels_3HW, 2).flatten(1).T
    return pad(colours_43, (0, condition.tokens_LD.shape[1] - 3)).to(condition.tokens_LD)
