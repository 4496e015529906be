"""PNG files that say how they were made.

Two text chunks: `parameters`, in the form that AUTOMATIC1111's web UI writes and many viewers read, and
`flow-scripts`, the same as JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.core.files import atomic_write
from library.options.request import ImageRequest

PARAMETERS_KEY = "parameters"
JSON_KEY = "flow-scripts"
_SAMPLER_NAMES = {"euler": "Euler", "heun": "Heun", "dpmsolver++": "DPM++ 2M"}  # as in the web UI


def write_png(path: Path, pixels_HWC: np.ndarray, request: ImageRequest, extra: Mapping[str, str]) -> None:
    """Write uint8 RGB pixels with the request and `extra` facts (model, LoRAs ...) beside them, atomically.

    Raises:
        StorageError: the file could not be written.
    """
    facts = {**asdict(request), **extra}
    facts["source"] = None if request.source is None else request.source.name
    chunks = PngInfo()
    chunks.add_text(PARAMETERS_KEY, parameters_text(request, extra))  # Pillow uses iTXt beyond Latin-1
    chunks.add_text(JSON_KEY, json.dumps(facts))
    with atomic_write(path) as handle:
        Image.fromarray(pixels_HWC).save(handle, format="PNG", pnginfo=chunks)


def parameters_text(request: ImageRequest, extra: Mapping[str, str]) -> str:
    """Return the request as prompt, negative prompt, and one line of `Name: value` pairs."""
    pairs = {
        "Steps": request.steps,
        "Sampler": _SAMPLER_NAMES[request.sampler],
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Shift": request.discrete_flow_shift,
        "CFG truncation": request.cfg_trunc_ratio,
        "CFG renorm": request.renorm_cfg,
        **({} if request.source is None else {"Source": request.source.name}),
        **extra,
        "Version": "flow-scripts",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items()))
    return "\n".join(lines)


def time_stamp() -> str:
    """Return the local time as in file names, e.g. 20250131235959."""
    return time.strftime("%Y%m%d%H%M%S")


def free_path(directory: Path, stem: str) -> Path:
    """Return `directory/stem.png`, or the first of stem_2, stem_3 ... that does not exist yet."""
    path, number = directory / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = directory / f"{stem}_{number}.png"
    return path


def _quoted(value: str) -> str:
    """Readers split the line at commas and colons, so a value that holds one is written as a JSON string."""
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:\n"') else value
