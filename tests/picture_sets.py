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
from library.data.items import Manifest
from library.data.scan import scan
from library.data.schema import load_datasets
from library.options.dataset import DatasetOptions

STRIDE = 8


class Encoders:
    """Stand-ins that count: how often a model was loaded, and what it was given.

    A latent is an average of pixels, a token the code of a letter: what comes out tells what went in, and
    never depends on the rest of the batch.
    """

    def __init__(self) -> None:
        self.loads = 0
        self.picture_batches: list[tuple[int, ...]] = []
        self.texts: list[str] = []

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

    def encode_texts(self, texts: list[str]) -> list[Condition]:
        self.texts += texts
        codes = [torch.tensor([2, *text.encode()], dtype=torch.float32) for text in texts]
        return [Condition(torch.stack([c, c / 7, c.cos()], dim=1)) for c in codes]


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


def manifest_of(folder: Path, *, dataset: str = "", subset: str = "", resolution: int = 64) -> Manifest:
    """Scan a folder of pictures as one dataset; `dataset` and `subset` are further lines of TOML."""
    config = folder.parent / f"{folder.name}.toml"
    config.write_text(
        f"[[datasets]]\nresolution = {resolution}\nenable_bucket = true\nbucket_reso_steps = 16\n"
        f"min_bucket_reso = 16\n{dataset}\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
        f"caption_extension = '.txt'\n{subset}\n",
        encoding="utf-8",
    )
    datasets = load_datasets(DatasetOptions(dataset_config=config), stride=16)
    return scan(datasets, skip_bad_images=False, ledger=HashLedger(folder.parent / "hashes.json"))
