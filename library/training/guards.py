"""What stops a run before harm is done: numbers that are not finite, and memory that runs out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from library.core.device import peak_memory_bytes
from library.core.errors import NonFiniteError, ResourceError
from library.data.items import Manifest
from library.options.train import TrainOptions

ADVICE_AT_ONCE = 3

# How torch words it when it does not raise OutOfMemoryError: the CPU's allocator, the driver, NVIDIA's
# libraries. cuBLAS is not initialized when it is first used, and finds no memory for itself.
_OUT_OF_MEMORY = (
    *("not enough memory", "can't allocate memory", "out of memory"),
    *("_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
)
# What torch has of a GPU and cannot use, in pieces too small for what was asked for. Less is told in MiB.
_IN_PIECES = re.compile(r"([\d.]+ GiB) is reserved by PyTorch but unallocated")


@dataclass(frozen=True)
class Advice:
    """What the user can do, and what that changes."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}, which {self.why}"


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise NonFiniteError, with the name of the first bad one, if a tensor holds NaN or infinity."""
    places: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            places.setdefault(tensor.device, []).append(name)
    for names in places.values():
        finite = torch.stack([tensors[name].isfinite().all() for name in names]).tolist()  # one wait for all
        if not all(finite):
            raise NonFiniteError(
                f"In {what}, '{names[finite.index(False)]}' holds NaN or infinite numbers, so nothing was "
                f"saved. Go on from an earlier state with a lower --learning_rate."
            )


@contextmanager
def memory_explained(doing: str, device: torch.device, advice: list[str]) -> Iterator[None]:
    """Turn an out-of-memory error into one with numbers and the first few pieces of `advice`.

    Raises:
        ResourceError: the memory of the device, or of the computer, did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        helps = "; ".join([*_joining_advice(error), *advice][:ADVICE_AT_ONCE]) or "a larger device"
        raise ResourceError(
            f"Out of memory while {doing}: {_usage(device)}. What helps most here: {helps}."
        ) from error


def training_advice(options: TrainOptions, manifest: Manifest) -> list[str]:
    """Return what makes training itself smaller, the most effective first, as far as it is not in use."""
    advice = []
    if not options.compute.gradient_checkpointing:
        advice.append("--gradient_checkpointing, which keeps a few activations a block")
    elif options.compute.keeps not in ("full", "offload"):
        advice.append("--checkpoint_mode full, which keeps one activation a block")
    advice += _precision_advice(options)
    advice += map(str, upkeep_advice(options))
    batch_size = max(dataset.batch_size for dataset in manifest.trained_datasets)
    if options.training.max_batch_tokens is not None:
        advice.append(f"a lower --max_batch_tokens than {options.training.max_batch_tokens}")
    elif batch_size > 1:
        accumulation = options.training.gradient_accumulation_steps * batch_size
        advice.append(
            f"batch_size 1 instead of {batch_size}, with --gradient_accumulation_steps {accumulation} for as "
            f"many pictures a step"
        )
    if not options.caching.texts:
        advice.append("--cache_text_encoder_outputs_to_disk, so that the text encoder is not in memory")
    if not options.caching.latents:
        advice.append("--cache_latents_to_disk, so that the autoencoder is not in memory")
    if options.trainee.freezes_dit:
        advice.append(str(_swap_advice(options)))
    width, height = max((item.geometry.bucket for item in manifest.items), key=lambda size: size[0] * size[1])
    advice.append(f"a lower resolution in the dataset (the largest pictures are now {width}x{height})")
    return advice


def upkeep_advice(options: TrainOptions, *, swapping: bool = True) -> list[Advice]:
    """Return what makes training of a model's own weights smaller, beside activations; the mildest first.

    Nothing for a network: what is kept of it is small. `swapping`: whether block swap may be among it.
    """
    if options.trainee.freezes_dit:
        return []
    advice = []
    if not options.trainee.fused:
        accumulation = options.training.gradient_accumulation_steps
        without = " without --gradient_accumulation_steps" if accumulation > 1 else ""
        advice.append(Advice(f"--fused_backward_pass{without}", "drops each gradient as soon as it is used"))
    if swapping:
        advice.append(_swap_advice(options))
    name = options.optimizer.optimizer_name
    if "8bit" not in name and name != "Adafactor":
        advice.append(
            Advice(
                "--optimizer_type AdamW8bit or Adafactor", "remember 2 bytes of each number, or next to none"
            )
        )
    return advice + _rest_advice(options)


def caching_advice(options: TrainOptions) -> list[str]:
    """Return what makes the encoders' work before training smaller."""
    caching = options.caching
    advice = _precision_advice(options)
    if caching.texts and options.quant.text_encoder_quant is None:
        advice.append("--text_encoder_quant int8, which nearly halves the text encoder")
    if caching.texts and caching.text_encoder_batch_size > 1:
        advice.append(f"--text_encoder_batch_size 1 instead of {caching.text_encoder_batch_size}")
    if caching.latents and caching.vae_batch_size > 1:
        advice.append(f"--vae_batch_size 1 instead of {caching.vae_batch_size}")
    return [*advice, "other programs on the device ended", "a lower resolution in the dataset"]


def loading_advice(options: TrainOptions) -> list[str]:
    """Return what makes room for the model when it is loaded."""
    advice = _precision_advice(options)
    if not (options.caching.texts and options.caching.latents):
        advice.append(
            "--cache_latents_to_disk and --cache_text_encoder_outputs_to_disk, so that no encoder is loaded "
            "beside it"
        )
    advice += map(str, [_swap_advice(options), *_rest_advice(options)])
    return [*advice, "other programs on the device ended"]


def drawing_advice(options: TrainOptions) -> list[str]:
    """Return what makes sample pictures smaller."""
    size = options.sampling.sample_batch_size
    advice = [f"--sample_batch_size 1 instead of {size}"] if size > 1 else []
    return [*advice, "smaller pictures (--w and --h in the prompt file)"]


def _precision_advice(options: TrainOptions) -> list[str]:
    if options.training.mixed_precision != "no":
        return []
    return ["--mixed_precision bf16, which halves the models and the activations"]


def _rest_advice(options: TrainOptions) -> list[Advice]:
    training = options.training
    if options.trainee.freezes_dit or training.mixed_precision != "bf16" or training.full_bf16:
        return []
    return [Advice("--full_bf16", "keeps nothing of a weight that bf16 cannot hold")]


def _swap_advice(options: TrainOptions) -> Advice:
    more = f"above {options.swap.count}" if options.swap.count else "8 or more"
    return Advice(f"--blocks_to_swap {more}", "keeps the weights of so many blocks in the computer's memory")


def _joining_advice(error: BaseException) -> list[str]:
    """Return how torch can be made to join its pieces of memory, if it has many; Windows cannot."""
    pieces = _IN_PIECES.search(str(error))
    if pieces is None or sys.platform == "win32":
        return []
    return [
        f"the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True, as {pieces[1]} lie unused in "
        f"pieces that are too small"
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of a device or of the computer, in whatever way that was told."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in _OUT_OF_MEMORY)


def _usage(device: torch.device) -> str:
    peak = f"this program used up to {peak_memory_bytes(device) / 2**30:.1f} GiB"
    if device.type != "cuda":
        return peak
    free, total = torch.cuda.mem_get_info(device)
    return f"{peak} of the {total / 2**30:.1f} GiB of {device}, of which {free / 2**30:.1f} GiB are free"
