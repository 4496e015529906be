"""torch.compile for the parts of a model's blocks: few graphs, whatever the sizes of pictures and captions.

- A part is compiled whole or not at all: what breaks a graph is an error, and no part falls back to Python.
- The first dimension of every tensor (tokens, or samples) is symbolic, and nothing else is; of pictures their
  sizes are, too. So a graph is made for each kind of block, with and without gradients, for one sample and
  for several, and that is all.
- Blocks of the same kind share their graphs, because weights are inputs of a graph.
- What is compiled is kept on disk between runs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from library.core.errors import ConfigError, MissingPackageError
from library.core.hashing import default_ledger_path
from library.core.log import logger
from library.nn.packing import Packing
from library.options.compute import ComputeOptions

_MOST_GRAPHS = 64  # of one function, over all kinds of blocks, states of a LoRA, and sample counts
_CACHE = "TORCHINDUCTOR_CACHE_DIR"

P = ParamSpec("P")
R = TypeVar("R")

_log = logger("compile")


def check_compiler(options: ComputeOptions, device: torch.device) -> None:
    """Find out before anything is loaded whether this machine can compile.

    Raises:
        ConfigError: there is no compiler, or the GPU is too old.
        MissingPackageError: Triton is not installed.
    """
    if options.compiles and options.dynamo_backend == "inductor":
        check_inductor("--torch_compile", device)


def check_inductor(flag: str, device: torch.device) -> None:
    """Find out whether inductor can compile here, for what `flag` asks. Raises as `check_compiler` does."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise MissingPackageError("triton", f"{flag} on a GPU")
        if torch.cuda.get_device_capability(device) < (7, 0):
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"{flag} needs a newer GPU than {name}, Volta or later; leave it out.")
        wanted = [os.environ.get("CC"), "gcc", "clang", "cl"]
        kind = "a C compiler (gcc or clang), with which Triton builds its launchers"
    else:
        wanted = [os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
        kind = f"a C++ compiler ('{wanted[0]}', or what the variable CXX names)"
    if not any(name and shutil.which(name) for name in wanted):
        raise ConfigError(f"{flag} needs {kind}, and there is none; install one or leave it out.")


def part_compiler(
    options: ComputeOptions, symbolic: Sequence[int] = (0,)
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return what makes a compiled function of a function; it is compiled when it is first called.

    Args:
        symbolic: which dimensions of its tensors differ from call to call.
    """
    os.environ.setdefault(_CACHE, str(default_ledger_path().with_name("compiled")))
    budget = options.activation_memory_budget
    _settle(budget)
    _log.info("compiling with %s; compiled code is kept in %s", options.dynamo_backend, cache_folder())

    def compiled(part: Callable[P, R]) -> Callable[P, R]:
        graphs = torch.compile(part, backend=options.dynamo_backend, fullgraph=True)

        @functools.wraps(part)
        def call(*inputs: P.args, **named: P.kwargs) -> R:
            if _thread.budget != budget:
                _settle(budget)
            for tensor in _tensors((inputs, tuple(named.values()))):
                torch._dynamo.maybe_mark_dynamic(tensor, list(symbolic))
            return graphs(*inputs, **named)

        return call

    return compiled


class _Thread(threading.local):
    """What torch has been told in this thread. From 2.12 on settings are each thread's own, and on a GPU it
    is one of autograd's that computes blocks again for backward, and compiles them if need be."""

    budget: float | None = None


_thread = _Thread()


def _settle(budget: float) -> None:
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._functorch.config.activation_memory_budget = budget
    # Whether to pad a product, of a LoRA's odd rank say, torch decides by measuring: numbers would hang on
    # the moment. And where it finds a time that an earlier run took, torch 2.13 fails (its `pad_mm.py`).
    torch._inductor.config.shape_padding = False
    _thread.budget = budget


def unshared(result: Tensor) -> Tensor:
    """Return a result of an autograd function's `forward` as a tensor that only the last operation has made.

    If it is one that an operation in place has filled, or that `to` has left as it was, torch 2.11 compiles
    it wrongly and says nothing: no gradient comes through. So it is copied for the compiler, and inductor
    takes the copy out again.
    """
    return result.clone() if torch.compiler.is_compiling() else result


def cache_folder() -> Path:
    """Return where compiled code is kept, once `part_compiler` was called."""
    return Path(os.environ[_CACHE])


def _tensors(inputs: object) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Packing):
        yield inputs.ends
    elif isinstance(inputs, list | tuple):
        for each in inputs:
            yield from _tensors(each)
