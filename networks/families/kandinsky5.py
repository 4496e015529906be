"""Kandinsky 5.0 Image as networks see it: its linear layers, and what `--network_args` says of them.

Torch-free. Layers have the same names in the original code, in diffusers and in all files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from networks.families.args import LoRAArgs
from networks.families.family import Family
from networks.network_args import arg, to_choice, to_rank, to_ranks

TEXT, VISUAL = "text_transformer_blocks", "visual_transformer_blocks"
TRAINED = {"all": (TEXT, VISUAL), "visual": (VISUAL,), "text": (TEXT,)}
EMBEDDERS = ("visual_embeddings", "text_embeddings", "pooled_text_embeddings", "time_embeddings")
_ATTENTION = ("to_query", "to_key", "to_value", "out_layer")
_SELF = [f"self_attention.{name}" for name in _ATTENTION]
_CROSS = [f"cross_attention.{name}" for name in _ATTENTION]
_FEED_FORWARD = ["feed_forward.in_layer", "feed_forward.out_layer"]
_LAYERS = (
    *(f"{embedder}.in_layer" for embedder in EMBEDDERS),
    "time_embeddings.out_layer",
    *(f"{TEXT}.*.{path}" for path in ["text_modulation.out_layer", *_SELF, *_FEED_FORWARD]),
    *(f"{VISUAL}.*.{path}" for path in ["visual_modulation.out_layer", *_SELF, *_CROSS, *_FEED_FORWARD]),
    *("out_layer.modulation.out_layer", "out_layer.out_layer"),
)
_CLASS = {
    TEXT: "Kandinsky5TransformerEncoderBlock",
    VISUAL: "Kandinsky5TransformerDecoderBlock",
    "self_attention": "Kandinsky5Attention",
    "cross_attention": "Kandinsky5Attention",
    "feed_forward": "Kandinsky5FeedForward",
}


@dataclass(frozen=True, kw_only=True)
class Kandinsky5LoRAArgs(LoRAArgs):
    """What `--network_args` may say; see networks/lora_kandinsky5.py."""

    BLOCKS: ClassVar[str] = VISUAL

    self_attn_dim: int | None = arg(None, to_rank)
    cross_attn_dim: int | None = arg(None, to_rank)
    ff_dim: int | None = arg(None, to_rank)
    mod_dim: int = arg(0, to_rank)
    text_dim: int | None = arg(None, to_rank)
    embedder_dims: tuple[int, ...] | None = arg(None, to_ranks(len(EMBEDDERS), "[visual,text,pooled,time]"))
    train_blocks: str = arg("all", to_choice(*TRAINED))

    def rank_by_place(self, path: str, network_dim: int) -> int:
        """Return the rank of the layer at `path` by the table of networks/lora_kandinsky5.py."""
        head, *rest = path.split(".")
        if head in EMBEDDERS:
            return self.embedder_dims[EMBEDDERS.index(head)] if self.embedder_dims else 0
        if head not in TRAINED[self.train_blocks]:
            return 0
        part = rest[1]
        if part.endswith("_modulation"):
            return self.rank_in_block(path, self.mod_dim, network_dim)
        if head == TEXT and self.text_dim is not None:
            return self.text_dim
        by_part = {
            "self_attention": self.self_attn_dim,
            "cross_attention": self.cross_attn_dim,
            "feed_forward": self.ff_dim,
        }
        return self.rank_in_block(path, by_part[part], network_dim)


KANDINSKY5 = Family(
    name="Kandinsky 5.0 Image",
    module="networks.lora_kandinsky5",
    args=Kandinsky5LoRAArgs,
    refused={
        "pissa_init": "write init=pissa",
        "split_qkv": "query, key and value are layers of their own here, each with a LoRA of its own",
        "attn_dim": "write self_attn_dim and cross_attn_dim",
        "mlp_dim": "write ff_dim",
    },
    layers={path: (path,) for path in _LAYERS},
    classes={
        **{f"{blocks}.*": _CLASS[blocks] for blocks in (TEXT, VISUAL)},
        **{
            f"{blocks}.*.{part}": _CLASS[part]
            for blocks in (TEXT, VISUAL)
            for part in ("self_attention", "cross_attention", "feed_forward")
        },
    },
    preset_classes={
        "Transformer2DModel": ("Kandinsky5Attention", "Kandinsky5FeedForward"),
        "SelfAttention": ("Kandinsky5Attention",),
    },
    no_text_encoder=(
        "the text encoders of Kandinsky 5.0 Image have no LoRAs here: Qwen2.5-VL has more weights than the "
        "DiT itself, and no program applies LoRAs to it"
    ),
)
