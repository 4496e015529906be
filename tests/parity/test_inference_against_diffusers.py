"""lumina_minimal_inference.py with a trained LoRA, pixel by pixel against a sampler written on diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.parity.independent import State
from tests.parity.independent_lumina import Lumina, draw
from tests.parity.runs import RECIPE, Run, flags, inference_flags

NEGATIVE = "grass, gravel"
STRENGTH = 0.7
# The first as the guide has it; the second is guided longer, and too weakly for the norm to need its bound.
PICTURES = {
    "a smiling woman with a small dog at the table": {"size": (96, 64), "seed": 11, "steps": 6},
    "rocket": {"size": (48, 80), "seed": 0, "steps": 4, "guidance": 0.5, "truncation": 0.8},
}
INLINE = {"seed": "d", "steps": "s", "guidance": "g", "truncation": "ctr"}

Pictures = list[np.ndarray]


@pytest.fixture(scope="module")
def script(
    pipeline: Path, tmp_path_factory: pytest.TempPathFactory, launch: Callable[[Sequence[object]], str]
) -> Callable[..., Pictures]:
    """Draw the pictures with the script and these LoRA flags."""

    def run(**lora: object) -> Pictures:
        folder = tmp_path_factory.mktemp("pictures")
        lines = []
        for prompt, settings in PICTURES.items():
            width, height = settings["size"]
            inline = [f"--{INLINE[name]} {value}" for name, value in settings.items() if name in INLINE]
            lines.append(" ".join([prompt, f"--w {width} --h {height}", *inline]))
        (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
        given = inference_flags(pipeline) | {
            "from_file": folder / "prompts.txt",
            "negative_prompt": NEGATIVE,
            "system_prompt": RECIPE.system_prompt,
            "output_dir": folder / "out",
        }
        printed = launch(["lumina_minimal_inference.py", *flags(given | lora)])
        paths = [line for line in printed.splitlines() if line.endswith(".png")]
        return [np.asarray(Image.open(path)) for path in paths]

    return run


@pytest.fixture(scope="module")
def expected(pipeline: Path, trained: Run) -> dict[str, Pictures]:
    """The pictures without the LoRA, and with it, from the independent sampler."""
    lumina = Lumina(pipeline)

    def pictures(lora: State) -> Pictures:
        texts = [f"{RECIPE.system_prompt} <Prompt Start> {prompt}" for prompt in PICTURES]
        settings = PICTURES.values()
        return [
            draw(lumina, text, NEGATIVE, lora, strength=STRENGTH, **given)
            for text, given in zip(texts, settings, strict=True)
        ]

    return {"without": pictures({}), "with": pictures(trained.lora)}


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return np.abs(one.astype(int) - other.astype(int)).max()


def test_the_pictures_have_contrast_and_the_lora_changes_them(expected: dict[str, Pictures]) -> None:
    for plain, changed in zip(expected["without"], expected["with"], strict=True):
        assert min(plain.std(), changed.std()) > 10
        assert difference(plain, changed) > 20


@pytest.mark.parametrize("merge", [False, True], ids=["applied", "merged"])
def test_every_pixel_is_the_same(
    merge: bool, script: Callable[..., Pictures], expected: dict[str, Pictures], trained: Run
) -> None:
    found = script(lora_weights=f"{trained.path};{STRENGTH}", merge_lora_weights=merge)
    for ours, theirs in zip(found, expected["with"], strict=True):
        assert difference(ours, theirs) <= 1
        assert np.mean(ours == theirs) > 0.99
