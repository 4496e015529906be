"""LoRA for Lumina Image 2.0: which layers get one, and of which rank. `--network_module` names this module.

Layers and what sets their rank, in this order; a rank of 0 leaves the layer out:

    layers                                                  rank
    whatever a pattern of network_reg_dims matches          the value behind the first such pattern
    x_embedder, t_embedder.mlp.{0,2}, cap_embedder.1        embedder_dims=[x,t,cap], else none
    everything in noise_refiner and context_refiner         refiner_dim, if given
    attention.qkv, attention.out of every block             attn_dim, else the block's rank
    feed_forward.w1, w2, w3 of every block                  mlp_dim, else the block's rank
    adaLN_modulation.1 of every block and of final_layer    mod_dim, else the block's rank
    final_layer.linear                                      network_dim

The block's rank is network_dim, or the block's number in `block_dims`, a list for `layers`.

`train_blocks` narrows the blocks: all, transformer (layers.*), refiners, noise_refiner or context_refiner.
final_layer belongs to "all" only; embedders are trained when they are asked for, whatever the blocks. Without
arguments that makes 180 layers of the 2B model.

`split_qkv=True` trains a LoRA of that rank for each of q, k and v. The file has one LoRA for the fused layer,
of three times the rank, with the same effect.

For arguments that all families share see networks/family_lora.py.
"""

from __future__ import annotations

from networks.families.lumina import LUMINA
from networks.family_lora import LoRAModule

_LORA = LoRAModule(LUMINA)
check_options = _LORA.check_options
check_layers = _LORA.check_layers
no_diffusers = _LORA.no_diffusers
create_network = _LORA.create_network
create_text_network = _LORA.create_text_network
