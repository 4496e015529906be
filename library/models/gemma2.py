"""Gemma2 as the text encoder of Lumina Image 2.0: token ids to features.

The features are what transformers calls `hidden_states[-2]`: the output of the last layer but one, before the
final norm. So the last layer and the norm are never built, and no hidden states are kept on the way. The
network itself is transformers' `Gemma2Model`, with our linear layers, which multiply in the fastest dtype.

Attention is causal: a token sees only what stands left of it. So the texts of a batch are padded on the right
without any mask, and the padding changes nothing.

The table of words stays in the computer's memory, or in the memory-mapped file: only the rows of the words at
hand go to the device. It is a fifth of the weights (1.2 GB in bf16).

B batch, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2Model, Gemma2RotaryEmbedding

from library.core.device import sent
from library.core.errors import NonFiniteError
from library.data.batch import Condition
from library.models.gemma2_format import Gemma2Checkpoint, Gemma2Params, inspect_gemma2
from library.models.gemma2_tokenizer import GemmaTokenizer
from library.nn.products import Linear
from library.nn.weights.loading import Source, load_module
from library.nn.weights.quant import use_quant_layers
from library.options.quant import TextQuantOptions

_CPU = torch.device("cpu")
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
        """Where the layers are."""
        return self._norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and features."""
        return self._norm.weight.dtype

    @property
    def _norm(self) -> nn.Module:
        return self.model.layers[0].input_layernorm

    def device_bytes(self) -> int:
        """Return how many bytes of weights the device has room for: all but the table of words."""
        tensors = [t for part in self._resident() for t in (*part.parameters(), *part.buffers())]
        return sum(tensor.nbytes for tensor in tensors)

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
        words_BLD = self._words(torch.tensor(padded))
        features_BLD = self.model(inputs_embeds=words_BLD, use_cache=False).last_hidden_state
        return [
            features_LD[: len(ids)].clone() for features_LD, ids in zip(features_BLD, token_ids, strict=True)
        ]

    def _words(self, ids_BL: Tensor) -> Tensor:
        """Look words up, and scale them as Gemma does, by a number that is rounded to the dtype."""
        table = self.model.embed_tokens.weight
        words_BLD = sent(F.embedding(ids_BL.to(table.device), table).to(self.dtype), self.device)
        return words_BLD * torch.tensor(self.params.hidden**0.5, dtype=self.dtype).item()

    def _resident(self) -> list[nn.Module]:
        """Return what lies on the device."""
        return [self.model.layers, self.model.norm, self.model.rotary_emb]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gemma2Encoder:
        """Move what lies on the device: `to` leaves the table of words where it is."""
        for part in self._resident():
            part._apply(fn, recurse)
        return self


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
    """Load a text encoder of any layout, frozen; what is on the CPU, in the file's dtype, is memory-mapped.

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
    table, waiting = "model.embed_tokens.weight", _CPU if device.type != "meta" else device
    load_module(
        encoder,
        found.checkpoint,
        sources,
        device=lambda name: waiting if name == table else device,
        dtype=lambda name: None if name == table else dtype,
        quantise_on=quant.quantise_on or device,
    )
    # Two tables are computed, not stored: they were left on meta.
    encoder.model.rotary_emb = Gemma2RotaryEmbedding(encoder.model.config).to(device)
    encoder.model.embed_tokens.embed_scale = torch.tensor(found.params.hidden**0.5, device=waiting)
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
