"""Norms, gates and activations by Triton kernels of our own, for GPUs that can have them.

- choice: --fused_kernels: whether they are used
- check: compares them with torch's operations before a run relies on them
- layers, modulated: the kernels, named like the modules that hold torch's operations
- launch: what they share
"""
