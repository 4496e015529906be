"""Small datasets on disk and stand-in encoders, for tests of caches and of the loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from library.core.hashing import HashLedger
from library.data.batch import Condition
from library.data.images import load_source
from library.data.items import Manifest
from library.data.prompt import Prompt
from library.data.scan import scan
from library.data.schema import load_datasets
from library.data.tensors import pixels_to_tensor
from library.options.dataset import DatasetOptions

STRIDE = 8


class Encoders:
    """Stand-ins that count: how often a model was loaded, and what it was given.

    A latent is an average of pixels, a token the code of a letter or, behind those, a row of the source's
    latents: what comes out tells what went in, and never depends on the rest of the batch.
    """

    def __init__(self) -> None:
        self.loads = 0
        self.picture_batches: list[tuple[int, ...]] = []
        self.prompts: list[Prompt] = []
        self.text_batches: list[int] = []

    @property
    def texts(self) -> list[str]:
        """The texts of the prompts that were encoded."""
        return [prompt.text for prompt in self.prompts]

    @property
    def pictures(self) -> int:
        """How many pictures were encoded; flipped ones count again."""
        return sum(shape[0] for shape in self.picture_batches)

    def load_picture_encoder(self):
        self.loads += 1
        return self.encode_pictures

    def load_text_encoder(self):
        self.loads += 1
        return self.encode_texts

    def encode_pictures(self, pixels_B3HW: Tensor) -> Tensor:
        self.picture_batches.append(tuple(pixels_B3HW.shape))
        return avg_pool2d(pixels_B3HW, STRIDE) * 1.7

    def encode_texts(self, prompts: list[Prompt]) -> list[Condition]:
        self.prompts += prompts
        self.text_batches.append(len(prompts))
        return [Condition(tokens_of(prompt)) for prompt in prompts]


def tokens_of(prompt: Prompt) -> Tensor:
    """Return what `Encoders` makes of a prompt."""
    codes = torch.tensor([2, *prompt.text.encode()], dtype=torch.float32)
    tokens_L3 = torch.stack([codes, codes / 7, codes.cos()], dim=1)
    if prompt.source is None:
        return tokens_L3
    pixels_3HW = pixels_to_tensor(load_source(prompt.source))
    return torch.cat([tokens_L3, avg_pool2d(pixels_3HW, STRIDE).mean(1).T])


def write_picture(path: Path, size: tuple[int, int], seed: int, alpha: bool = False) -> None:
    """Write a noisy picture; with `alpha` its transparency is noise too."""
    noise = np.random.default_rng(seed)
    values = noise.integers(0, 256, (size[1], size[0], 4 if alpha else 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def write_pictures(
    folder: Path, captions: dict[str, str], sizes: tuple[tuple[int, int], ...] = ((64, 64),)
) -> Path:
    """Write a picture and a caption for each stem, the sizes taken in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (stem, caption) in enumerate(captions.items()):
        write_picture(folder / f"{stem}.png", sizes[number % len(sizes)], seed=number)
        (folder / f"{stem}.txt").write_text(caption, encoding="utf-8")
    return folder


def manifest_of(
    folder: Path, *, dataset: str = "", subset: str = "", resolution: int = 64, edits: bool = False
) -> Manifest:
    """Scan a folder of pictures as one dataset; `dataset` and `subset` are further lines of TOML."""
    config = folder.parent / f"{folder.name}.toml"
    config.write_text(
        f"[[datasets]]\nresolution = {resolution}\nenable_bucket = true\nbucket_reso_steps = 16\n"
        f"min_bucket_reso = 16\n{dataset}\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
        f"caption_extension = '.txt'\n{subset}\n",
        encoding="utf-8",
    )
    datasets = load_datasets(DatasetOptions(dataset_config=config), stride=16, edits=edits)
    return scan(datasets, skip_bad_images=False, ledger=HashLedger(folder.parent / "hashes.json"))
