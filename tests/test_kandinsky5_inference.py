"""kandinsky5_minimal_inference.py from end to end, with tiny models; its pictures are those of diffusers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import kandinsky5_minimal_inference
from library.core.errors import UserError
from library.data import images
from library.data.batch import Condition
from library.data.images import source_picture
from library.data.prompt import Prompt
from library.models.clip_tokenizer import find_clip_tokenizer
from library.models.kandinsky5 import load_kandinsky5
from library.models.kandinsky5_prompt import Kandinsky5Tokenizers
from library.models.kandinsky5_text import encode_prompts, load_text_encoders
from library.models.qwen_tokenizer import find_qwen_tokenizer
from networks.files import save_network
from networks.lora_kandinsky5 import create_network
from networks.request import NetworkRequest
from tests.kandinsky5_checkpoints import Kandinsky5Folder, write_pipeline

CPU = torch.device("cpu")
FP32 = ("--dtype=fp32", "--text_encoder_dtype=fp32", "--vae_dtype=fp32", "--device=cpu")
SMALL = ("--image_width=64", "--image_height=48", "--steps=4")
PROMPT, NEGATIVE = "a red fox on the table", "fog, grey sky"


@pytest.fixture(scope="module")
def t2i(tmp_path_factory: pytest.TempPathFactory) -> Kandinsky5Folder:
    torch.set_num_threads(1)  # at this size threads cost more than they bring
    return write_pipeline(tmp_path_factory.mktemp("t2i") / "pipeline", "t2i")


@pytest.fixture(scope="module")
def i2i(tmp_path_factory: pytest.TempPathFactory) -> Kandinsky5Folder:
    return write_pipeline(tmp_path_factory.mktemp("i2i") / "pipeline", "i2i")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is wider than what is drawn."""
    path = tmp_path_factory.mktemp("source") / "a source.png"
    corners = np.random.default_rng(5).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    Image.fromarray(corners).resize((200, 96), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def lora(t2i: Kandinsky5Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dit = load_kandinsky5(t2i.flags["pretrained_model_name_or_path"], device=CPU, dtype=torch.float32)
    network = create_network(dit, NetworkRequest(dim=4))
    generator = torch.Generator().manual_seed(0)
    for layer in network.loras.values():
        nn.init.normal_(layer.up, std=0.1, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_network(path, network.export_state(), {})
    return path


def run(models: Kandinsky5Folder, folder: Path, *words: object) -> list[Path]:
    """Run the script in this process; return its pictures in the order in which they were drawn."""
    flags = [f"--{name}={path}" for name, path in models.flags.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *flags, *FP32, f"--output_dir={folder}", *map(str, words)])
        kandinsky5_minimal_inference.main()
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def facts(path: Path) -> dict[str, object]:
    return json.loads(Image.open(path).text["flow-scripts"])


def one(models: Kandinsky5Folder, folder: Path, *words: object) -> np.ndarray:
    """Draw the usual picture."""
    usual = ("--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--seed=7", *SMALL)
    (path,) = run(models, folder, *usual, *words)
    return pixels(path)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return np.abs(one - other).max()


# --- the same picture from diffusers' pieces ---


def our_texts(models: Kandinsky5Folder, prompts: Sequence[Prompt]) -> list[Condition]:
    """Text features: they have tests of their own."""
    qwen, clip = (models.flags[f"text_encoder_{name}"] for name in ("qwen", "clip"))
    tokenizers = Kandinsky5Tokenizers(find_qwen_tokenizer(qwen).build(), find_clip_tokenizer(clip).build())
    encoders = load_text_encoders(qwen, clip, device=CPU, dtype=torch.float32, vision=True)
    return encode_prompts(encoders, tokenizers, prompts, max_length=512, edit_crop=55, batch_size=1)


def cut_by_hand(path: Path, size: tuple[int, int]) -> Tensor:
    """The source at the size of the output: as high, and the middle of its width; in [-1, 1]."""
    picture = Image.open(path)
    wide = round(picture.width * size[1] / picture.height)
    left = (wide - size[0]) // 2
    cut = picture.resize((wide, size[1]), Image.Resampling.BOX).crop((left, 0, left + size[0], size[1]))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None] / 127.5 - 1


@torch.no_grad()
def draw_with_diffusers(
    models: Kandinsky5Folder, source: Path | None = None, *, guidance: float = 3.5, shift: float = 3.0
) -> np.ndarray:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

    dit = Kandinsky5Transformer3DModel.from_pretrained(models.flags["pretrained_model_name_or_path"])
    vae = AutoencoderKL.from_pretrained(models.flags["vae"])
    scale = vae.config.scaling_factor
    picture = None if source is None else source_picture(source, (64, 48))
    positive, negative = our_texts(models, [Prompt(PROMPT, picture), Prompt(NEGATIVE, picture)])
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    latents = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(7))
    beside = torch.zeros(1, 17, 6, 8)
    if source is not None:
        encoded = vae.encode(cut_by_hand(source, (64, 48))).latent_dist.mode() * scale
        beside = torch.cat([encoded, torch.ones(1, 1, 6, 8)], dim=1)

    def predict(timestep: Tensor, condition: Condition) -> Tensor:
        channels = torch.cat([latents, beside], dim=1) if dit.config.visual_cond else latents
        out = dit(
            channels.permute(0, 2, 3, 1)[:, None],
            condition.tokens_LD[None],
            timestep[None],
            condition.pooled_D[None],
            visual_rope_pos=[torch.arange(1), torch.arange(3), torch.arange(4)],
            text_rope_pos=torch.arange(len(condition.tokens_LD)),
            return_dict=False,
        )
        return out[:, 0].permute(0, 3, 1, 2)

    for timestep in scheduler.timesteps:
        conditional, unconditional = predict(timestep, positive), predict(timestep, negative)
        velocity = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    decoded = vae.decode(latents / scale, return_dict=False)[0][0]
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().astype(int)


def test_a_picture_from_text_is_that_of_diffusers(t2i: Kandinsky5Folder, tmp_path: Path) -> None:
    expected = draw_with_diffusers(t2i)
    assert difference(one(t2i, tmp_path), expected) <= 1
    assert expected.std() > 10  # a grey picture would prove nothing


def test_guidance_and_shift_are_those_of_diffusers(t2i: Kandinsky5Folder, tmp_path: Path) -> None:
    found = one(t2i, tmp_path, "--guidance_scale=5", "--scheduler_scale=5")
    assert difference(found, draw_with_diffusers(t2i, guidance=5, shift=5)) <= 1


def test_an_edited_picture_is_that_of_diffusers(i2i: Kandinsky5Folder, source: Path, tmp_path: Path) -> None:
    expected = draw_with_diffusers(i2i, source)
    assert difference(one(i2i, tmp_path / "a", "--image", source), expected) <= 2
    without = draw_with_diffusers(i2i)
    assert difference(one(i2i, tmp_path / "b"), without) <= 1
    assert difference(without, expected) > 10 and expected.std() > 10


# --- what must change nothing, or something ---


def test_modes_of_running_change_nothing(i2i: Kandinsky5Folder, source: Path, tmp_path: Path) -> None:
    plain = one(i2i, tmp_path / "plain", "--image", source)
    for name, words in {
        "offloaded": ["--offload"],
        "swapped": ["--blocks_to_swap=3", "--offload"],
        "streamed": ["--stream_text_encoder", "--offload"],
    }.items():
        assert difference(one(i2i, tmp_path / name, "--image", source, *words), plain) == 0, name
    assert difference(one(i2i, tmp_path / "s", "--image", source, "--sequential_cfg"), plain) <= 1


def test_quantised_models_draw_nearly_the_same(t2i: Kandinsky5Folder, tmp_path: Path) -> None:
    plain = one(t2i, tmp_path / "plain")
    found = one(t2i, tmp_path / "int8", "--base_quant=int8", "--text_encoder_quant=int8")
    assert 0 < difference(found, plain) and np.abs(found - plain).mean() < 8


def test_loras_merged_and_applied(t2i: Kandinsky5Folder, lora: Path, tmp_path: Path) -> None:
    base, applied = one(t2i, tmp_path / "a"), one(t2i, tmp_path / "b", "--lora_weights", lora)
    assert difference(applied, base) > 5
    merged = one(t2i, tmp_path / "c", "--lora_weights", lora, "--merge_lora_weights", "--blocks_to_swap=2")
    assert difference(merged, applied) <= 1
    assert difference(one(t2i, tmp_path / "d", "--lora_weights", f"{lora};0"), base) == 0


def test_prompts_of_a_file_have_pictures_of_their_own(
    i2i: Kandinsky5Folder, source: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (30, 60), "red").save(tmp_path / "red.png")
    lines = ["a fox --d 7", "a fox --d 7 --ci -", "a fox --d 7 --ci red.png", "a hen --d 7 --h 32 --w 32"]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    found = run(i2i, tmp_path / "out", "--from_file", tmp_path / "p.txt", "--image", source, *SMALL)
    assert [facts(path)["source"] for path in found] == ["a source.png", None, "red.png", "a source.png"]
    first, text_only, red, small = map(pixels, found)
    assert min(difference(first, text_only), difference(first, red), difference(text_only, red)) > 0
    assert small.shape == (32, 32, 3)
    (alone,) = run(i2i, tmp_path / "alone", "--image", source, "--prompt=a fox", "--seed=7", *SMALL)
    assert difference(pixels(alone), first) == 0


def test_the_size_follows_the_picture_that_is_edited(
    i2i: Kandinsky5Folder, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kandinsky5_minimal_inference, "SIZES", ((48, 48), (64, 32), (32, 64)))
    typed = "a fox\na fox --ci -\na fox --w 32\nexit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    found = run(i2i, tmp_path, "--interactive", "--image", source, "--steps=1")
    assert [Image.open(path).size for path in found] == [(64, 32), (48, 48), (32, 48)]


def test_prompts_of_any_length(
    i2i: Kandinsky5Folder, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(f"fox{n}" for n in range(2000))
    (tmp_path / "p.json").write_text(json.dumps([text, {"prompt": "", "control_image": str(source)}]))
    found = run(i2i, tmp_path / "out", "--from_file", tmp_path / "p.json", *SMALL, "--steps=1")
    assert len(found) == 2 and pixels(found[1]).std() > 0
    said = capsys.readouterr().err
    assert "Qwen2.5-VL takes only the first 512 of" in said and "CLIP takes only the first 77 of" in said


def test_a_picture_is_decoded_once_to_be_looked_at_and_once_to_be_edited(
    i2i: Kandinsky5Folder, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    decode = images._open
    monkeypatch.setattr(images, "_open", lambda path: decoded.append(path) or decode(path))
    lines = "a fox --n fog\na cat --n rain\n"
    (tmp_path / "p.txt").write_text(lines)
    words = ("--from_file", tmp_path / "p.txt", "--image", source, *SMALL, "--steps=1")
    assert len(run(i2i, tmp_path / "out", *words)) == 2
    assert decoded == [source, source]


def test_options_in_a_prompt_of_the_command_line_are_told_to_be_text(
    i2i: Kandinsky5Folder, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(i2i, tmp_path, "--prompt", f"a fox -- red --ci {source}", *SMALL, "--steps=1")
    assert "--prompt is one text, options in it too: only 'a fox -- red' is" in capsys.readouterr().err
    (path,) = run(i2i, tmp_path / "plain", "--prompt", "a fox -- red", *SMALL, "--steps=1")
    assert "--prompt is one text" not in capsys.readouterr().err


def test_pictures_of_any_kind_can_be_edited(i2i: Kandinsky5Folder, tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "tiny.png")
    Image.new("L", (3000, 2000), 90).save(tmp_path / "huge.jpg")
    for name in ("tiny.png", "huge.jpg"):
        one(i2i, tmp_path / f"{name} pictures", "--image", tmp_path / name, "--steps=1")


def test_the_file_says_how_it_was_made(i2i: Kandinsky5Folder, source: Path, tmp_path: Path) -> None:
    (path,) = run(i2i, tmp_path, "--prompt=a fox", "--seed=3", "--image", source, *SMALL)
    found = facts(path)
    assert (found["Model"], found["source"], found["steps"]) == ("transformer", "a source.png", 4)
    assert (found["discrete_flow_shift"], found["cfg_trunc_ratio"], found["renorm_cfg"]) == (3.0, 1.0, 0.0)
    assert path.name.endswith("_3.png") and (found["width"], found["height"]) == (64, 48)


# --- mistakes ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image={source}"], "draws from text alone; leave it out, or name a model that edits pictures"),
        (["--task=i2i"], "--task is i2i, but .* draws from text"),
        (["--dit={vae}"], "is not a Kandinsky 5 image transformer|autoencoder"),
        (["--text_encoder_qwen={clip}"], "CLIP"),
        (["--text_encoder_clip={qwen}"], "Qwen"),
        (["--vae={dit}"], "Kandinsky"),
        (["--vae={folder}/absent.safetensors"], "There is no weight file or folder .*absent.safetensors"),
        (["--qwen_tokenizer={folder}"], "--qwen_tokenizer .* holds neither"),
        (["--image_height=100"], "image height 100 is not a multiple of 16; the nearest are 96 and 112"),
        (["--image_height=2064"], "too large for Kandinsky 5"),
        (["--blocks_to_swap=6"], "--blocks_to_swap is 6, but the model has 5 blocks"),
        (["--from_file={prompts}"], "gone.png, but .* draws from text alone"),
        (["--lora_weights={folder}/none.safetensors"], "There is no weight file or folder"),
    ],
)
def test_mistakes_are_one_sentence(
    t2i: Kandinsky5Folder, source: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "p.txt").write_text("a fox --ci gone.png", encoding="utf-8")
    names = {"dit": "transformer", "qwen": "text_encoder", "clip": "text_encoder_2", "vae": "vae"}
    places = {key: t2i.folder / name for key, name in names.items()}
    places |= {"source": source, "folder": tmp_path, "prompts": tmp_path / "p.txt"}
    words = [word.format(**places) for word in words]
    with pytest.raises(UserError, match=message) as caught:
        run(t2i, tmp_path / "out", *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not there"), (b"no picture", "cannot be decoded"), ((2, 6000), "so long and thin|1/50")],
)
def test_a_source_that_cannot_be_used(
    i2i: Kandinsky5Folder, tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / "source.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        Image.new("RGB", content).save(path)
    with pytest.raises(UserError, match=message) as caught:
        one(i2i, tmp_path / "out", "--image", path)
    assert str(path) in str(caught.value)


def test_the_mark_of_a_picture_is_no_text(i2i: Kandinsky5Folder, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has <\|image_pad\|> in it, which stands for the source picture"):
        run(i2i, tmp_path, "--image", source, "--prompt", "a <|image_pad|> of a fox")
    assert not list(tmp_path.iterdir())
