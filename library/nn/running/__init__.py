"""How the blocks of a network are run.

- runner: what each block keeps for backward, and whether its weights must come first
- recompute: values that are made again for backward
- offload: inputs that wait in the computer's memory
- compiling: --torch_compile
- routing: tokens that skip blocks
"""
