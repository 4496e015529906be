"""CLIP's text encoder as Kandinsky 5.0 Image uses it: token ids to one vector a text.

The vector is what transformers calls `pooler_output`: the last layer after the final norm, at the token
`<|endoftext|>`, without the projection that CLIP itself would add. The network is transformers'
`CLIPTextModel`.

Attention is causal, so what stands right of that token has no influence: texts are not padded to 77 tokens,
only to the longest of a batch.

B batch, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from library.core.errors import CheckpointError
from library.models.clip_text_format import ClipTextCheckpoint, ClipTextParams, inspect_clip_text
from library.nn.weights.loading import Source, load_module


class ClipTextEncoder(nn.Module):
    """The text tower of a CLIP."""

    def __init__(self, params: ClipTextParams) -> None:
        super().__init__()
        self.params = params
        self.model = CLIPTextModel(_config(params))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embeddings.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and vectors."""
        return self.model.embeddings.token_embedding.weight.dtype

    def encode(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Encode texts as one batch; return (B, D), the vector of each text's last token.

        That is the one CLIP is read at, `<|endoftext|>`, as `ClipTokenizer.ids` ends every text there.

        Raises:
            CheckpointError: an id that the encoder has no embedding for.
        """
        longest, highest = max(map(len, token_ids)), max(map(max, token_ids))
        if highest >= self.params.vocab:
            raise CheckpointError(
                f"The tokenizer of CLIP gives token {highest}, but the text encoder has {self.params.vocab} "
                f"tokens; name the tokenizer that belongs to it with --clip_tokenizer."
            )
        padded = [[*ids, *[ids[-1]] * (longest - len(ids))] for ids in token_ids]
        ids_BL = torch.tensor(padded, device=self.device)
        features_BLD = self.model(input_ids=ids_BL).last_hidden_state
        ends_B = torch.tensor([len(ids) - 1 for ids in token_ids], device=self.device)
        return features_BLD[torch.arange(len(token_ids), device=self.device), ends_B]


def _config(params: ClipTextParams) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=params.vocab,
        hidden_size=params.hidden,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        intermediate_size=params.ffn_dim,
        max_position_embeddings=params.positions,
        hidden_act=params.activation,
        layer_norm_eps=params.layer_norm_eps,
        bos_token_id=params.vocab - 2,  # always the last two
        eos_token_id=params.vocab - 1,
        pad_token_id=params.vocab - 1,
    )


def load_clip_text(
    path: Path | ClipTextCheckpoint, *, device: torch.device, dtype: torch.dtype
) -> ClipTextEncoder:
    """Load a text encoder of any layout, frozen; on the CPU, in the file's dtype, it is memory-mapped.

    Raises:
        CheckpointError: as `inspect_clip_text` does.
    """
    found = path if isinstance(path, ClipTextCheckpoint) else inspect_clip_text(path)
    with torch.device("meta"):
        encoder = ClipTextEncoder(found.params)
    sources = {f"model.{name}": Source((name,)) for name in found.checkpoint.tensors}
    load_module(encoder, found.checkpoint, sources, device=device, dtype=dtype)
    # This table is computed, not stored: it was left on meta.
    encoder.model.embeddings.position_ids = torch.arange(found.params.positions, device=device)[None]
    return encoder.eval()
