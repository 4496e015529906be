"""The post-hoc average: its weights against numerical integrals, its files, its mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.core.errors import ConfigError
from tools.post_hoc_ema import AverageOptions, gamma_of, profile_of, weights_of

ROOT = Path(__file__).resolve().parents[1]
TWO = (Path("a.safetensors"), Path("b.safetensors"))


@pytest.mark.parametrize("sigma_rel", [0.05, 0.15, 0.28])
def test_sigma_rel_is_the_width_of_the_profile(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    t = (np.arange(200_000) + 0.5) / 200_000
    profile = t**gamma / (t**gamma).sum()
    mean = (profile * t).sum()
    assert np.sqrt((profile * (t - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("profile", [{"sigma_rel": 0.2}, {"decay": 0.99}])
def test_each_network_gets_its_part_of_the_profile(profile: dict[str, float]) -> None:
    steps = [100, 150, 400]
    options = AverageOptions(networks=TWO, output=Path("c.safetensors"), **profile)
    weights = weights_of(steps, profile_of(options, steps[-1])[0])
    t = np.arange(0.0, 400.0, 0.001) + 0.0005
    density = 0.99 ** (400 - t) if "decay" in profile else t ** gamma_of(0.2)
    if "decay" in profile:
        density[t < 100] *= 1 / (1 - 0.99**100)  # the first network also stands for all before the run
    parts = [density[(t > a) & (t < b)].sum() for a, b in ((0, 100), (100, 150), (150, 400))]
    assert sum(weights) == pytest.approx(1)
    assert weights == pytest.approx(np.array(parts) / sum(parts), abs=2e-3)


def test_an_exponential_average_of_every_step_is_the_running_average() -> None:
    decay, values = 0.8, np.random.default_rng(0).normal(size=60)
    running = values[0]
    for value in values[1:]:
        running = decay * running + (1 - decay) * value
    options = AverageOptions(networks=TWO, output=Path("c.safetensors"), decay=decay)
    weights = weights_of(range(1, 61), profile_of(options, 60)[0])
    assert np.dot(weights, values) == pytest.approx(running)


def write_network(path: Path, value: float, step: int | None, rank: int = 2, alpha: float = 1.0) -> Path:
    tensors = {
        "lora_unet_a.lora_down.weight": torch.full((rank, 3), value, dtype=torch.bfloat16),
        "lora_unet_a.lora_up.weight": torch.full((3, rank), 2 * value),
        "lora_unet_a.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path, None if step is None else {"ss_steps": str(step), "ss_seed": "5"})
    return path


def average(run_script, *words: object, cold: bool = False):
    return run_script(ROOT / "tools/post_hoc_ema.py", *words, cold=cold)


def test_the_file(tmp_path: Path, run_script) -> None:
    late = write_network(tmp_path / "late.safetensors", 4.0, step=20)
    early = write_network(tmp_path / "early.safetensors", 0.0, step=10)
    output = tmp_path / "new folder" / "average.safetensors"
    result = average(run_script, "--networks", late, early, "--output", output, "--decay", "0.9", cold=True)
    assert result.code == 0, result.err
    share = 1 - 0.9**10
    found = load_file(output)
    assert torch.allclose(found["lora_unet_a.lora_down.weight"], torch.tensor(4.0 * share))
    assert torch.allclose(found["lora_unet_a.lora_up.weight"], torch.tensor(8.0 * share))
    assert found["lora_unet_a.alpha"] == 1.0
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_weights"] == "average (exponential, decay 0.9) of steps 10, 20"
    assert (metadata["ss_steps"], metadata["ss_seed"]) == ("20", "5")
    assert len(metadata["sshs_model_hash"]) == 64


def test_mistakes_with_files(tmp_path: Path, run_script) -> None:
    one = write_network(tmp_path / "one.safetensors", 1.0, step=10)
    wider = write_network(tmp_path / "wider.safetensors", 1.0, step=20, rank=4)
    silent = write_network(tmp_path / "silent.safetensors", 1.0, step=None)
    copy = write_network(tmp_path / "copy.safetensors", 1.0, step=10)
    stronger = write_network(tmp_path / "stronger.safetensors", 1.0, step=20, alpha=2.0)
    for other, message in (
        (wider, "wider.safetensors is not of the same network"),
        (silent, "silent.safetensors does not say its step"),
        (copy, "each must be of its own step"),
        (stronger, "has another 'lora_unet_a.alpha'"),
        (tmp_path / "gone.safetensors", "There is no weight file"),
    ):
        result = average(run_script, "--networks", one, other, "--output", tmp_path / "out.safetensors")
        assert result.code == 2
        assert message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": TWO[:1]}, "at least two"),
        ({"sigma_rel": 0.1, "decay": 0.9}, "two different profiles"),
        ({"sigma_rel": 0.3}, "below 0.2887"),
        ({"decay": 1.0}, "between 0 and 1"),
        ({"steps": (1, 2, 3)}, "3 numbers for 2 networks"),
        ({"output": TWO[1]}, "one of the --networks"),
        ({"output": Path("x.ckpt")}, "must end in .safetensors"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AverageOptions(**({"networks": TWO, "output": Path("c.safetensors")} | options))
