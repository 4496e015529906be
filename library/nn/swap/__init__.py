"""Block swap: weights that stay in the computer's memory until their block is run.

- block_swap: when which block's weights come, and into which buffer
- gradient_return: where weights are trained, their gradients go back there
- swapped_weights: how they lie in either memory
- copy_streams: how they are copied beside the device's work
"""
