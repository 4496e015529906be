"""Gemma2 as the text encoder of Lumina Image 2.0: token ids to features.

The features are what transformers calls `hidden_states[-2]`: the output of the last layer but one, before the
final norm. So the last layer and the norm are never built, and no hidden states are kept on the way. The
network itself is transformers' `Gemma2Model`, with our linear layers, which multiply in the fastest dtype.

Attention is causal: a token sees only what stands left of it. So the texts of a batch are padded on the right
without any mask, and the padding changes nothing.

B batch, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2Model, Gemma2RotaryEmbedding

from library.core.errors import NonFiniteError
from library.data.batch import Condition
from library.models.gemma2_format import Gemma2Checkpoint, Gemma2Params, inspect_gemma2
from library.models.gemma2_tokenizer import GemmaTokenizer
from library.nn.products import Linear
from library.nn.weights.loading import Source, load_module
from library.nn.weights.quant import use_quant_layers
from library.options.quant import TextQuantOptions

_PAD_ID = 0
_WHOLE = TextQuantOptions()


class Gemma2Encoder(nn.Module):
    """All layers of a Gemma2 but the last one."""

    def __init__(self, params: Gemma2Params) -> None:
        super().__init__()
        self.params = params
        self.model = Gemma2Model(_config(params))
        self.model.norm = nn.Identity()
        for path, layer in list(self.model.named_modules()):
            if isinstance(layer, nn.Linear):
                ours = Linear(layer.in_features, layer.out_features, layer.bias is not None)
                self.model.set_submodule(path, ours)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and features."""
        return self.model.embed_tokens.weight.dtype

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers keep only their input for backward, and are computed again there."""
        return any(layer.gradient_checkpointing for layer in self.model.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        # transformers' switch for the whole model has another name in every other version, and it asks for a
        # gradient of the embeddings too, which only reentrant checkpoints need
        for layer in self.model.layers:
            layer.gradient_checkpointing = value
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.train(value)  # transformers checkpoints in training mode only; Gemma2 has no dropout to wake up

    def encode(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Encode texts as one batch; return (L, D) features of each, without padding.

        The weights are frozen, so no graph is kept unless layers carry LoRAs that are trained.
        """
        longest = max(map(len, token_ids))
        padded = [[*ids, *[_PAD_ID] * (longest - len(ids))] for ids in token_ids]
        ids_BL = torch.tensor(padded, device=self.device)
        features_BLD = self.model(input_ids=ids_BL, use_cache=False).last_hidden_state
        return [
            features_LD[: len(ids)].clone() for features_LD, ids in zip(features_BLD, token_ids, strict=True)
        ]


def _config(params: Gemma2Params) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=params.vocab,
        hidden_size=params.hidden,
        num_hidden_layers=params.layers - 1,
        num_attention_heads=params.heads,
        num_key_value_heads=params.kv_heads,
        head_dim=params.head_dim,
        intermediate_size=params.ffn_dim,
        query_pre_attn_scalar=params.query_pre_attn_scalar,
        sliding_window=params.sliding_window,
        attn_logit_softcapping=params.attn_logit_softcapping,
        rope_parameters={"rope_type": "default", "rope_theta": params.rope_theta},
        rms_norm_eps=params.rms_norm_eps,
        attn_implementation="eager",  # SDPA has no soft cap on the logits
    )


def load_gemma2(
    path: Path | Gemma2Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quant: TextQuantOptions = _WHOLE,
) -> Gemma2Encoder:
    """Load a text encoder of any layout, frozen; on the CPU, in the file's dtype, it is memory-mapped.

    Args:
        quant: in how many bits the linear layers are kept; embeddings and norms stay as they are.

    Raises:
        CheckpointError: as `inspect_gemma2` does.
        ConfigError: the scheme cannot quantise these layers.
    """
    found = path if isinstance(path, Gemma2Checkpoint) else inspect_gemma2(path)
    with torch.device("meta"):
        encoder = Gemma2Encoder(found.params)
    if quant.text_encoder_quant is not None:
        linear = [path for path, module in encoder.named_modules() if isinstance(module, nn.Linear)]
        use_quant_layers(encoder, linear, quant.text_encoder_quant)
    sources = {f"model.{name}": Source((name,)) for name in found.checkpoint.tensors}
    load_module(encoder, found.checkpoint, sources, device=device, dtype=dtype, quantise_on=quant.quantise_on)
    # Two tables are computed, not stored: they were left on meta.
    encoder.model.rotary_emb = Gemma2RotaryEmbedding(encoder.model.config).to(device)
    encoder.model.embed_tokens.embed_scale = torch.tensor(found.params.hidden**0.5, device=device)
    return encoder.eval()


def encode_prompts(
    encoder: Gemma2Encoder,
    tokenizer: GemmaTokenizer,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 8,
) -> list[Condition]:
    """Encode whole prompts (see `format_prompt`).

    What a text is encoded together with changes no more than its last bits.

    Texts of similar length are put together, so little is padded. They are cut after `max_length` tokens.

    Raises:
        NonFiniteError: the encoder overflowed, as Gemma2 can in fp16.
    """
    token_ids = [tokenizer.ids(text, max_length) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(token_ids[i]))
    conditions: dict[int, Condition] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, tokens_LD in zip(batch, encoder.encode([token_ids[i] for i in batch]), strict=True):
            if not torch.isfinite(tokens_LD).all():
                raise NonFiniteError(
                    f"Gemma2 gave NaN or infinite features in {encoder.dtype} for the prompt "
                    f"{texts[i][:80]!r}; use bf16 or fp32."
                )
            conditions[i] = Condition(tokens_LD)
    return [conditions[i] for i in range(len(texts))]
