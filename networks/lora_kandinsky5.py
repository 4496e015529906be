"""LoRA for Kandinsky 5.0 Image: which layers get one, and of which rank. `--network_module` names this.

Layers and what sets their rank, in this order; a rank of 0 leaves the layer out:

    layers                                                   rank
    whatever a pattern of network_reg_dims matches           the value behind the first such pattern
    {visual,text,pooled_text,time}_embeddings.*              embedder_dims=[visual,text,pooled,time], or none
    text_modulation, visual_modulation of every block        mod_dim, or none
    all others in text_transformer_blocks                    text_dim, if given
    self_attention.to_{query,key,value}, .out_layer          self_attn_dim, else the block's rank
    cross_attention.to_{query,key,value}, .out_layer         cross_attn_dim, else the block's rank
    feed_forward.in_layer, feed_forward.out_layer            ff_dim, else the block's rank
    out_layer.out_layer, out_layer.modulation.out_layer      none

The block's rank is network_dim, or the block's number in `block_dims`, a list for visual_transformer_blocks.

`train_blocks` narrows the blocks: all, visual or text; embedders are trained when they are asked for,
whatever the blocks. Without arguments that makes the 512 layers of the official recipe; `mod_dim` adds 52.

For arguments that all families share see networks/family_lora.py. The text encoders get no LoRA.
"""

from __future__ import annotations

from networks.families.kandinsky5 import KANDINSKY5
from networks.family_lora import LoRAModule

_LORA = LoRAModule(KANDINSKY5)
check_options = _LORA.check_options
check_layers = _LORA.check_layers
no_diffusers = _LORA.no_diffusers
create_network = _LORA.create_network
create_text_network = _LORA.create_text_network
