"""A GPU to test with where there is none: `python -m tests.pretended_gpu lumina_train_network.py ...`

Programs find one CUDA device. Its memory is the computer's, and torch's kernels for the CPU compute on it
(`device.cpp`), so a program computes what it computes on the CPU; but as on a GPU

- tensors on the device and on the CPU do not mix, which is an error;
- streams are in order only where they wait for each other (`order.h`): what a GPU might compute from memory
  that is not written yet, or is used again already, is an error;
- page-locked memory is read and written by copies as late as a GPU might do it: who reads it too early finds
  rubbish;
- waits of the program for the device, and bytes of tensors on the device, are counted.

Triton's kernels, also those that `torch.compile` writes for GPUs, run in Triton's interpreter: slowly.
Several processes, each with such a device, reach each other through what they take for NCCL (`group.py`).

A process has one device, there is no end of memory, and nothing is said about speed. What kernels of a real
GPU ask of their operands, such as alignment, is not looked at.
"""
