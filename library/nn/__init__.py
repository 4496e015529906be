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

Who computes norms, gates and activations: torch, or Triton kernels of our own:
- kernels: asked for the function of each part
- kernel_choice: --fused_kernels; triton_check compares the kernels with torch first
- triton_layers, triton_modulated: the kernels; triton_launch is what they share

How blocks are run:
- transformer: what every model can do
- runner: what each block keeps for backward, and whether its weights must come first
- recompute: values that are made again for backward; offload: inputs that wait in the computer's memory
- compiling: --torch_compile
- routing: tokens that skip blocks

Weights:
- weights: from files into a module; tensor_reader reads them, weight_writer writes them
- quant: in 8 or 4 bits; eight_bit multiplies them as they are
- block_swap: in the computer's memory until they are needed; gradient_return brings gradients there,
  swapped_weights is how they lie, copy_streams how they are copied
- shelf: several models that take turns on a device
"""
