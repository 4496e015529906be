"""Building blocks of the networks of all families.

A batch and its tokens:
- packing: where the samples of a packed batch lie
- patches: latents as tokens, and back
- rope: rotary position embedding
- tiling: large pictures in overlapping tiles, for autoencoders

What a block computes:
- products: in which dtype matrices are multiplied; linear and convolution layers
- together: linear layers that share an input, or end in an activation, in one operation
- attention: within each sample, by the kernel that was chosen
- layers: norms, normed residuals, queries and keys
- modulated: norms and gates that a timestep moves
- activations: SwiGLU, GELU
- stand_in: for which kind of device that is done

Who computes norms, gates and activations, torch or Triton kernels of our own:
- kernels: asked for the function of each part
- triton_kernels: the kernels, and whether they are used

How blocks are run:
- transformer: what every model can do
- running: what a block keeps for backward, checkpointing, --torch_compile, tokens that skip blocks

Weights:
- weights: from files into a module and back; quantised; several models that take turns on a device
- swap: in the computer's memory until their block is run
"""
