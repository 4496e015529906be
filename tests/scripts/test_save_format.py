"""--save_format of the scripts: the same run, saved for kohya's readers and for diffusers, which loads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel, Lumina2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from library.models.kandinsky5 import load_kandinsky5
from library.models.lumina2 import load_nextdit
from networks.from_file import create_network_from_file
from tests.kandinsky5_checkpoints import write_pipeline
from tests.models import kandinsky5_pairs, lumina2_pairs
from tests.picture_sets import write_pictures
from tools.make_nano_models import make_nano_models

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Family:
    """A training script, its words about models, and the transformer here and in diffusers."""

    script: str
    words: tuple[str, ...]
    ours: nn.Module
    theirs: nn.Module
    pairs: object

    def output(self, model: nn.Module) -> Tensor:
        """What one of the two transformers makes of the same latents and texts."""
        inputs = self.pairs.make_inputs(self.ours.params, (5, 9), (4, 6))
        outputs = inputs.ours(model) if model is self.ours else inputs.theirs(model)
        return torch.cat([output.flatten() for output in outputs])


def lumina(folder: Path) -> Family:
    paths = make_nano_models(folder, seed=3, layout="diffusers")
    words = (f"--pretrained_model_name_or_path={paths.dit}", f"--gemma2={paths.gemma2}", f"--ae={paths.ae}")
    return Family(
        "lumina_train_network.py",
        (*words, f"--gemma2_tokenizer={paths.tokenizer}", "--network_module=networks.lora_lumina"),
        load_nextdit(paths.dit, device=CPU, dtype=torch.float32),
        Lumina2Transformer2DModel.from_pretrained(paths.dit, torch_dtype=torch.float32),
        lumina2_pairs,
    )


def kandinsky5(folder: Path) -> Family:
    flags = write_pipeline(folder / "pipeline", "t2i").flags
    dit = flags["pretrained_model_name_or_path"]
    model = load_kandinsky5(dit, device=CPU, dtype=torch.float32)
    model.round_rotated = True  # as diffusers does
    return Family(
        "kandinsky5_train_network.py",
        (*(f"--{name}={path}" for name, path in flags.items()), "--network_module=networks.lora_kandinsky5"),
        model,
        Kandinsky5Transformer3DModel.from_pretrained(dit, torch_dtype=torch.float32),
        kandinsky5_pairs,
    )


@pytest.mark.parametrize("make", [lumina, kandinsky5])
@torch.no_grad()
def test_diffusers_loads_what_a_script_saves_for_it(
    make: Callable[[Path], Family], run_script: Callable, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    family = make(tmp_path / "models")
    write_pictures(tmp_path / "pictures", {"a": "a cat", "b": "two dogs"})
    (tmp_path / "d.toml").write_text(
        "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
        f"image_dir = '{tmp_path / 'pictures'}'\n"
    )
    for saved in ("kohya", "diffusers"):
        result = run_script(
            family.script,
            *(*family.words, f"--dataset_config={tmp_path / 'd.toml'}", f"--output_dir={tmp_path / saved}"),
            *("--output_name=kiwi", "--max_train_steps=3", "--save_every_n_steps=2", "--learning_rate=3e-2"),
            *("--network_dim=3", "--network_alpha=5", "--seed=7", f"--save_format={saved}"),
        )
        assert result.code == 0, result.err
    plain = family.output(family.theirs)
    outputs = {}
    for name in ("kiwi-step00000002.safetensors", "kiwi.safetensors"):
        keys = load_file(tmp_path / "diffusers" / name)
        assert all(key.startswith("transformer.") and ".lora_" in key for key in keys)
        network = create_network_from_file(family.ours, tmp_path / "kohya" / name)
        network.apply_to(family.ours)
        expected = family.output(family.ours)
        network.remove()
        family.theirs.load_lora_adapter(
            tmp_path / "diffusers", weight_name=name, use_safetensors=True, adapter_name="one"
        )
        outputs[name] = family.output(family.theirs)
        family.theirs.delete_adapters("one")
        assert (outputs[name] - expected).norm() < 1e-4 * expected.norm()
        assert (plain - expected).norm() > 0.01 * expected.norm()
    first, last = outputs.values()
    assert not torch.allclose(first, last, rtol=1e-3)
