"""Weights: from files into a module and back, and how many bits they have there.

- loading: from files into a module
- reader, writer: tensor by tensor, never a whole file in memory
- quant: in 8 or 4 bits; schemes: how they are stored
- eight_bit: multiplied as they are
- shelf: several models that take turns on a device
"""
