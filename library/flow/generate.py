"""Pictures from conditions: the one sampler, used by previews and by the inference scripts alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor
from tqdm import tqdm

from library.core.errors import NonFiniteError
from library.flow.guidance import ConditionT, Velocity, guided
from library.flow.path import initial_noise
from library.flow.solver import sampler_sigmas, solve
from library.options.request import ImageRequest


@dataclass(frozen=True)
class ImageModel(Generic[ConditionT]):
    """A model family as the sampler sees it.

    velocity: (x_BCHW fp32, sigma_B fp32, B conditions) -> velocity_BCHW, as defined in `flow.path`.
    decode: latents_BCHW fp32 -> pixels_B3HW in [-1, 1].
    sigmas: the sampler's steps; those of Lumina unless a family has its own.
    sequential: prompt and negative prompt go through the model one after the other, which takes less memory.
    """

    velocity: Velocity[ConditionT]
    decode: Callable[[Tensor], Tensor]
    device: torch.device
    latent_channels: int = 16
    latent_stride: int = 8  # pixels a latent
    sigmas: Callable[[int, float], list[float]] = sampler_sigmas  # of (steps, shift), from 1 to 0
    sequential: bool = False


@torch.no_grad()  # not inference_mode: tables that the network caches here must stay usable in training
def generate(
    model: ImageModel[ConditionT],
    requests: Sequence[ImageRequest],
    conditions: Sequence[ConditionT],
    negatives: Sequence[ConditionT],
    *,
    progress: bool = True,
) -> list[Tensor]:
    """Draw a batch of pictures and return them as uint8 tensors (H, W, 3) on the CPU.

    Args:
        requests: pictures of equal settings (see `batches`), each with a prompt and a seed of its own.
        conditions, negatives: the encoded prompt and negative prompt of each.

    Raises:
        NonFiniteError: latents or pixels became NaN or infinite.
    """
    assert len({_settings(request) for request in requests}) == 1, "a batch shares its settings"
    first = requests[0]
    noise_BCHW = torch.stack([_start(model, request) for request in requests]).to(model.device)
    sigmas = model.sigmas(first.steps, first.discrete_flow_shift)
    with tqdm(total=first.steps, desc="drawing", leave=False, disable=not progress) as bar:
        velocity_at = guided(model.velocity, conditions, negatives, first, sequential=model.sequential)
        latents_BCHW = solve(velocity_at, noise_BCHW, sigmas, bar.update, sampler=first.sampler)
    # One by one: decoding takes the most memory of all, and a picture is then the same in every batch.
    latents = _finite(latents_BCHW).split(1)
    return [to_uint8(_finite(model.decode(latents_1CHW)))[0] for latents_1CHW in latents]


def to_uint8(pixels_B3HW: Tensor) -> Tensor:
    """Turn pixels in [-1, 1] into rounded bytes (B, H, W, 3) on the CPU."""
    bytes_B3HW = (pixels_B3HW.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return bytes_B3HW.permute(0, 2, 3, 1).contiguous().cpu()


def batches(requests: Sequence[ImageRequest], size: int) -> list[list[int]]:
    """Group the places of requests that can be drawn together, at most `size` in a group."""
    groups: dict[ImageRequest, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(_settings(request), []).append(place)
    return [places[i : i + size] for places in groups.values() for i in range(0, len(places), size)]


def _settings(request: ImageRequest) -> ImageRequest:
    """What pictures of a batch have in common."""
    return replace(request, prompt="", negative_prompt="", seed=None)


def _start(model: ImageModel[ConditionT], request: ImageRequest) -> Tensor:
    assert request.seed is not None, "seeds are filled in before drawing"
    assert request.width is not None and request.height is not None, "so are sizes"
    height, width = request.height // model.latent_stride, request.width // model.latent_stride
    return initial_noise((model.latent_channels, height, width), request.seed)


def _finite(tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(
            "a picture became NaN or infinite while it was drawn; use bf16 or fp32 instead of fp16."
        )
    return tensor
