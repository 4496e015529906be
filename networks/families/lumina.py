"""Lumina Image 2.0 as networks see it: its linear layers, and what `--network_args` says of them.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from networks.families.args import LoRAArgs
from networks.families.family import Family
from networks.network_args import arg, to_bool, to_choice, to_rank, to_ranks

QKV = "attention.qkv"
EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")
REFINERS = ("noise_refiner", "context_refiner")
TRAINED = {
    "all": ("layers", *REFINERS, "final_layer"),
    "transformer": ("layers",),
    "refiners": REFINERS,
    "noise_refiner": ("noise_refiner",),
    "context_refiner": ("context_refiner",),
}
# The linear layers of a block, each with its name or names in diffusers.Lumina2Transformer2DModel.
_BLOCK = {
    QKV: ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}
_OTHERS = {
    "x_embedder": ("x_embedder",),
    "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    "final_layer.linear": ("norm_out.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
}
# The original names of a layer with diffusers' parts of it, as for Z-Image.
_ALIASES = {
    **{f"attention.to_{part}": f"attn.to_{part}" for part in "qkv"},
    **dict.fromkeys(("attention.to_out.0", "attention.to_out", "attn.to_out"), "attn.to_out.0"),
}
_LISTS = ("layers", *REFINERS)


def qkv_widths(in_features: int, out_features: int) -> tuple[int, int, int]:
    """Return how many features q, k and v have in their layer: queries are as wide as the model."""
    key = (out_features - in_features) // 2
    return in_features, key, key


@dataclass(frozen=True, kw_only=True)
class LuminaLoRAArgs(LoRAArgs):
    """What `--network_args` may say; see networks/lora_lumina.py."""

    BLOCKS: ClassVar[str] = "layers"

    attn_dim: int | None = arg(None, to_rank)
    mlp_dim: int | None = arg(None, to_rank)
    mod_dim: int | None = arg(None, to_rank)
    refiner_dim: int | None = arg(None, to_rank)
    embedder_dims: tuple[int, ...] | None = arg(None, to_ranks(len(EMBEDDERS), "[x,t,cap]"))
    train_blocks: str = arg("all", to_choice(*TRAINED))
    split_qkv: bool = arg(False, to_bool)

    def rank_by_place(self, path: str, network_dim: int) -> int:
        """Return the rank of the layer at `path` by the table of networks/lora_lumina.py."""
        head, *rest = path.split(".")
        if head in EMBEDDERS:
            return self.embedder_dims[EMBEDDERS.index(head)] if self.embedder_dims else 0
        if head not in TRAINED[self.train_blocks]:
            return 0
        if head in REFINERS and self.refiner_dim is not None:
            return self.refiner_dim
        by_part = {"attention": self.attn_dim, "feed_forward": self.mlp_dim, "adaLN_modulation": self.mod_dim}
        own = next((by_part[part] for part in rest if part in by_part), None)
        return self.rank_in_block(path, own, network_dim)

    def widths_of(self, path: str, in_features: int, out_features: int) -> tuple[int, ...]:
        """Return the features of q, k and v, which split_qkv gives a LoRA each."""
        return qkv_widths(in_features, out_features) if self.split_qkv and path.endswith(QKV) else ()


LUMINA = Family(
    name="Lumina Image 2.0",
    module="networks.lora_lumina",
    args=LuminaLoRAArgs,
    refused={"pissa_init": "write init=pissa"},
    layers=_OTHERS
    | {
        f"{blocks}.*.{path}": tuple(f"{blocks}.*.{name}" for name in names)
        for blocks in _LISTS
        for path, names in _BLOCK.items()
        if (blocks, path) != ("context_refiner", "adaLN_modulation.1")
    },
    aliases={
        f"{blocks}.*.{alias}": f"{blocks}.*.{name}" for blocks in _LISTS for alias, name in _ALIASES.items()
    },
    classes={
        **{f"{blocks}.*": "JointTransformerBlock" for blocks in _LISTS},
        **{f"{blocks}.*.attention": "JointAttention" for blocks in _LISTS},
        **{f"{blocks}.*.feed_forward": "FeedForward" for blocks in _LISTS},
        "final_layer": "FinalLayer",
    },
)
