"""lumina_minimal_inference.py from end to end, with nano models."""

from __future__ import annotations

import io
import json
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import lumina_minimal_inference
from library.flow.generate import ImageModel, generate, to_uint8
from library.models.flux_vae import load_flux_vae
from library.models.gemma2 import encode_prompts, load_gemma2
from library.models.gemma2_tokenizer import format_prompt, load_gemma2_tokenizer
from library.models.lumina2 import load_nextdit, velocity
from library.options.request import ImageRequest
from networks.files import save_network
from networks.lora_lumina import create_network
from networks.request import NetworkRequest
from tools.make_nano_models import make_nano_models

RunScript = Callable[..., Any]  # the fixture `run_script`
CPU = torch.device("cpu")
SCRIPT = "lumina_minimal_inference.py"
SYSTEM = "You draw."
FP32 = ("--dtype", "fp32", "--gemma2_dtype", "fp32", "--ae_dtype", "fp32")
SMALL = ("--image_width", "64", "--image_height", "48", "--steps", "3", "--device", "cpu")


@dataclass(frozen=True)
class Nano:
    """Nano models in diffusers' layout, and a LoRA for them."""

    folder: Path
    dit: Path
    gemma2: Path
    ae: Path
    tokenizer: Path | None  # None: inside the file of the text encoder
    lora: Path

    @property
    def flags(self) -> list[str]:
        places = {
            "pretrained_model_name_or_path": self.dit,
            "gemma2_path": self.gemma2,
            "ae_path": self.ae,
            "gemma2_tokenizer": self.tokenizer,
        }
        return [f"--{name}={path}" for name, path in places.items() if path is not None]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Nano:
    torch.set_num_threads(1)  # at this size threads cost more than they bring
    folder = tmp_path_factory.mktemp("nano")
    paths = make_nano_models(folder, seed=3, layout="diffusers")
    network = create_network(
        load_nextdit(paths.dit, device=CPU, dtype=torch.float32), NetworkRequest(dim=4, alpha=4)
    )
    generator = torch.Generator().manual_seed(0)
    for lora in network.loras.values():
        nn.init.normal_(lora.up, std=0.2, generator=generator)
    save_network(folder / "style;2.safetensors", network.export_state(), {})
    return Nano(folder, paths.dit, paths.gemma2, paths.ae, paths.tokenizer, folder / "style;2.safetensors")


def draw(nano: Nano, folder: Path, *words: str) -> list[np.ndarray]:
    """Run the script in this process; return its pictures in the order in which it printed them."""
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["script", *nano.flags, *SMALL, *FP32, "--output_dir", str(folder), *words]
        patch.setattr(sys, "argv", arguments)
        lumina_minimal_inference.main()
    return [
        np.asarray(Image.open(path)) for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    ]


def one(nano: Nano, folder: Path, *words: str) -> np.ndarray:
    (picture,) = draw(nano, folder, "--prompt", "a red fox", "--seed", "7", *words)
    return picture


def assert_close(one: np.ndarray, other: np.ndarray, levels: int = 1) -> None:
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= levels


def test_the_guides_command(nano: Nano, tmp_path: Path, run_script: RunScript) -> None:
    result = run_script(
        *(SCRIPT, *nano.flags),
        *("--output_dir", str(tmp_path / "new" / "folder"), "--offload", "--seed", "1234"),
        *("--prompt", "Positive prompt", "--system_prompt", SYSTEM, "--negative_prompt", "negative prompt"),
        *SMALL,
    )
    assert result.code == 0, result.err
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert result.out.strip() == str(path)
    assert path.name.startswith("image_") and path.name.endswith("_1234.png")
    with Image.open(path) as picture:
        assert picture.size == (64, 48)
        facts = json.loads(picture.text["flow-scripts"])
        assert picture.text["parameters"].startswith(
            "Positive prompt\nNegative prompt: negative prompt\nSteps: 3,"
        )
    assert facts["seed"] == 1234 and facts["System prompt"] == SYSTEM and facts["Model"] == nano.dit.stem


def test_prompts_typed_at_the_keyboard(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "a fox --w 32 --d 5\na hen --w wide\na hen\n--d 6 --n -\nexit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    draw(nano, tmp_path, "--negative_prompt", "fog", "--interactive")
    assert "--w: 'wide' is not a whole number" in capsys.readouterr().err
    paths = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    facts = [json.loads(Image.open(path).text["flow-scripts"]) for path in paths]
    assert [(f["prompt"], f["width"], f["negative_prompt"]) for f in facts] == [
        ("a fox", 32, "fog"),
        ("a hen", 32, "fog"),
        ("a hen", 32, ""),
    ]
    assert facts[0]["seed"] == 5 and facts[1]["seed"] not in (5, 6) and facts[2]["seed"] == 6


def test_prompts_of_a_file(nano: Nano, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(
        "a fox --d 1\n# none\na hen --d 2 --w 32\na fox --d 1\n", encoding="utf-8"
    )
    found = draw(nano, tmp_path / "out", "--from_file", str(tmp_path / "p.txt"))
    assert [picture.shape for picture in found] == [(48, 64, 3), (48, 32, 3), (48, 64, 3)]
    assert np.array_equal(found[0], found[2])


def test_offload_changes_nothing_in_the_picture(nano: Nano, tmp_path: Path) -> None:
    assert np.array_equal(one(nano, tmp_path / "a"), one(nano, tmp_path / "b", "--offload"))


def test_block_swap_changes_nothing_in_the_picture(nano: Nano, tmp_path: Path) -> None:
    def with_lora(name: str, *words: str) -> np.ndarray:
        return one(nano, tmp_path / name, "--lora_weights", str(nano.lora), *words)

    swap = ("--blocks_to_swap", "5", "--offload")
    assert np.array_equal(with_lora("applied"), with_lora("applied, swapped", *swap))
    merge = "--merge_lora_weights"
    assert np.array_equal(with_lora("merged", merge), with_lora("merged, swapped", merge, *swap))


def test_sequential_guidance_draws_the_same_picture(nano: Nano, tmp_path: Path) -> None:
    together = one(nano, tmp_path / "a", "--negative_prompt", "fog")
    assert_close(one(nano, tmp_path / "b", "--negative_prompt", "fog", "--sequential_cfg"), together)


def library_model(nano: Nano) -> ImageModel:
    """The models as training wires them for its sample pictures."""
    dit = load_nextdit(nano.dit, device=CPU, dtype=torch.float32)
    vae = load_flux_vae(nano.ae, device=CPU, dtype=torch.float32)
    return ImageModel(lambda x, sigma, conditions: velocity(dit, x, sigma, conditions), vae.decode, CPU)


def library_conditions(nano: Nano, texts: Sequence[str]) -> list:
    encoder = load_gemma2(nano.gemma2, device=CPU, dtype=torch.float32)
    return encode_prompts(
        encoder, load_gemma2_tokenizer(nano.gemma2, nano.tokenizer), texts, 256, batch_size=1
    )


def test_a_sample_picture_of_training_is_the_same_bit_for_bit(nano: Nano, tmp_path: Path) -> None:
    settings = ("--system_prompt", SYSTEM, "--negative_prompt", "fog", "--cfg_trunc_ratio", "0.5")
    found = one(nano, tmp_path, *settings)
    request = ImageRequest(
        prompt="a red fox", negative_prompt="fog", width=64, height=48, steps=3, seed=7, cfg_trunc_ratio=0.5
    )
    texts = [format_prompt(SYSTEM, request.prompt), format_prompt("", request.negative_prompt)]
    prompt, negative = library_conditions(nano, texts)
    (expected,) = generate(library_model(nano), [request], [prompt], [negative], progress=False)
    assert np.array_equal(found, expected.numpy())


def draw_with_diffusers(nano: Nano, prompt: str, negative: str) -> np.ndarray:
    """The same picture from diffusers' and transformers' own models, scheduler and a loop written here."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
    from transformers import Gemma2Model

    dit = Lumina2Transformer2DModel.from_pretrained(nano.dit)
    vae = AutoencoderKL.from_pretrained(nano.ae)
    gemma2 = Gemma2Model.from_pretrained(nano.gemma2, attn_implementation="eager").eval()
    tokenizer = load_gemma2_tokenizer(nano.gemma2, nano.tokenizer)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0)
    scheduler.set_timesteps(3)

    def features(text: str) -> Tensor:
        ids = torch.tensor([tokenizer.ids(text, 256)])
        return gemma2(ids, output_hidden_states=True).hidden_states[-2]

    def predict(latents: Tensor, t: Tensor, text_features: Tensor) -> Tensor:
        mask = torch.ones(text_features.shape[:2], dtype=torch.bool)
        return -dit(latents, 1 - t[None] / 1000, text_features, mask, return_dict=False)[0]

    with torch.no_grad():
        conditional, unconditional = features(prompt), features(negative)
        latents = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(7))
        for t in scheduler.timesteps:
            v = c = predict(latents, t, conditional)
            if 1 - t / 1000 < 0.25:
                u = predict(latents, t, unconditional)
                v = u + 3.5 * (c - u)
                v = v * (c.norm() / v.norm()) if v.norm() > c.norm() else v
            latents = scheduler.step(v, t, latents, return_dict=False)[0]
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[
            0
        ]
    return to_uint8(pixels)[0].numpy()


def test_an_independent_implementation_draws_the_same_picture(nano: Nano, tmp_path: Path) -> None:
    found = one(nano, tmp_path, "--system_prompt", SYSTEM, "--negative_prompt", "fog")
    assert_close(found, draw_with_diffusers(nano, f"{SYSTEM} <Prompt Start> a red fox", "fog"))
    assert found.std() > 5  # a grey picture would prove nothing


def test_system_prompt_goes_before_the_negative_prompt_only_if_asked_for(nano: Nano, tmp_path: Path) -> None:
    system = ("--system_prompt", SYSTEM)
    plain = one(nano, tmp_path / "a", *system)
    added = one(nano, tmp_path / "b", *system, "--add_system_prompt_to_negative_prompt")
    typed = one(nano, tmp_path / "c", *system, "--negative_prompt", f"{SYSTEM} <Prompt Start> ")
    assert not np.array_equal(plain, added)
    assert np.array_equal(added, typed)


def test_loras_merged_applied_weighed_and_added_up(nano: Nano, tmp_path: Path) -> None:
    def with_loras(name: str, *words: str) -> np.ndarray:
        return one(nano, tmp_path / name, "--lora_weights", *words)

    base, applied = one(nano, tmp_path / "base"), with_loras("applied", str(nano.lora))
    assert np.abs(applied.astype(int) - base.astype(int)).max() > 5
    assert np.array_equal(with_loras("zero", f"{nano.lora};0"), base)
    assert_close(with_loras("halves", f"{nano.lora};0.5", f"{nano.lora};0.5"), applied)
    assert_close(with_loras("merged", str(nano.lora), "--merge_lora_weights"), applied)
    assert_close(
        with_loras("both", f"{nano.lora};0.25", f"{nano.lora};0.75", "--merge_lora_weights"), applied
    )


def test_multipliers_of_a_prompt_win_for_that_prompt(nano: Nano, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox --d 1 --m 0\na fox --d 1\na fox --d 1 --m 0.5\n", encoding="utf-8")
    prompts = ("--from_file", str(tmp_path / "p.txt"))
    zero, full, half = draw(nano, tmp_path / "a", *prompts, "--lora_weights", str(nano.lora))
    (tmp_path / "p.txt").write_text("a fox --d 1\n", encoding="utf-8")
    (base,) = draw(nano, tmp_path / "b", *prompts)
    (whole,) = draw(nano, tmp_path / "c", *prompts, "--lora_weights", str(nano.lora))
    assert np.array_equal(zero, base) and np.array_equal(full, whole)
    assert not np.array_equal(half, base) and not np.array_equal(half, whole)


def test_help_answers_in_half_a_second_of_work(run_script: RunScript) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_script(SCRIPT, "--help", cold=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.code == 0 and "--lora_weights" in result.out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_width", "1000"], "image width 1000 is not a multiple of 16; the nearest are 992 and 1008"),
        (["--stesp", "3"], "unknown argument '--stesp'; did you mean '--steps'?"),
        (
            ["--lora_weights", "absent.safetensors;0.5"],
            "There is no weight file or folder absent.safetensors",
        ),
        (["--ae_path", "{dit}"], "transformer"),
        (["--pretrained_model_name_or_path", "{gemma2}"], "Gemma2"),
        (["--gemma2_path", "{broken}"], "not a complete safetensors file"),
        (["--from_file", "absent.txt"], "absent.txt cannot be read"),
        (["--output_dir", "{file}/below"], "--output_dir"),
        (["--lora_weights", "{other}"], "has LoRAs for 1 layers that this model lacks: lora_unet_blocks_0_q"),
        (["--blocks_to_swap", "99"], "--blocks_to_swap is 99, but the model has 6 blocks"),
        (
            ["--lora_weights", "{lora}", "--from_file", "{prompts}"],
            "--m gives 2 multipliers, but --lora_weights names 1",
        ),
    ],
)
def test_mistakes_end_with_a_sentence(
    nano: Nano, tmp_path: Path, run_script: RunScript, words: list[str], message: str
) -> None:
    result = run_script(SCRIPT, *spoilt(nano, tmp_path, words))
    assert result.code == 2, result.err
    assert result.err.startswith("error: ") and message in result.err


def test_the_last_mistake_to_be_found_is_told_before_torch_is_imported(
    nano: Nano, tmp_path: Path, run_script: RunScript
) -> None:
    code = (
        "import sys, runpy\n"
        "try:\n    runpy.run_path('lumina_minimal_inference.py', run_name='__main__')\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    result = run_script("-c", code, *spoilt(nano, tmp_path, ["--output_dir", "{file}/below"]))
    assert result.code == 2 and result.err.startswith("error: --output_dir"), result.err


def spoilt(nano: Nano, tmp_path: Path, words: list[str]) -> list[str]:
    """Return a command's words, the last of which are wrong; what they name is written to `tmp_path`."""
    places = {
        "dit": nano.dit,
        "gemma2": nano.gemma2,
        "lora": nano.lora,
        "broken": tmp_path / "broken.safetensors",
        "other": tmp_path / "other.safetensors",
    }
    other = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    save_network(places["other"], {f"lora_unet_blocks_0_q.{key}": value for key, value in other.items()}, {})
    places |= {"file": tmp_path / "file", "prompts": tmp_path / "p.txt"}
    (tmp_path / "file").write_text("")
    (tmp_path / "p.txt").write_text("a fox --m 1,2")
    (tmp_path / "broken.safetensors").write_bytes(next(nano.ae.glob("*.safetensors")).read_bytes()[:5000])
    words = [word.format(**places) for word in words]
    return [*nano.flags, "--output_dir", str(tmp_path / "out"), *words]
