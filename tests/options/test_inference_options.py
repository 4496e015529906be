"""Options of the inference scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.options.group import parse_options
from library.options.inference import LoraWeight, parse_lora_weight
from library.options.inference_kandinsky5 import Kandinsky5InferenceOptions
from library.options.inference_lumina import LuminaInferenceOptions

MODELS = ["--pretrained_model_name_or_path", "d", "--gemma2_path", "g", "--ae_path", "a"]


def parse(*words: str) -> LuminaInferenceOptions:
    return parse_options(LuminaInferenceOptions, [*MODELS, *words])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a.safetensors", LoraWeight(Path("a.safetensors"), 1.0)),
        ("a.safetensors;0.5", LoraWeight(Path("a.safetensors"), 0.5)),
        ("a.safetensors;-1", LoraWeight(Path("a.safetensors"), -1.0)),
        ("x;y/a.safetensors", LoraWeight(Path("x;y/a.safetensors"), 1.0)),
        ("x;2/a.safetensors;0.5", LoraWeight(Path("x;2/a.safetensors"), 0.5)),
        ("x;y;1e-1", LoraWeight(Path("x;y"), 0.1)),
        ("a;nan", LoraWeight(Path("a;nan"), 1.0)),
        ("C:\\loras\\a.safetensors;2", LoraWeight(Path("C:\\loras\\a.safetensors"), 2.0)),
    ],
)
def test_lora_words(word: str, expected: LoraWeight) -> None:
    assert parse_lora_weight(word) == expected


def test_a_path_that_exists_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "a;1").write_text("")
    assert parse_lora_weight(str(tmp_path / "a;1")) == LoraWeight(tmp_path / "a;1")
    assert parse_lora_weight(str(tmp_path / "a;1;0.5")) == LoraWeight(tmp_path / "a;1", 0.5)


def test_defaults_are_those_of_the_reference_tool() -> None:
    request = parse().picture.request()
    assert (request.width, request.height, request.steps, request.seed) == (1024, 1024, 36, None)
    assert (request.guidance_scale, request.cfg_trunc_ratio, request.renorm_cfg) == (3.5, 0.25, 1.0)
    assert (request.discrete_flow_shift, request.negative_prompt) == (6.0, "")
    assert request.prompt == "A beautiful sunset over the mountains"
    assert parse().run.output_dir == Path("outputs")


KANDINSKY5 = ["--dit", "d", "--text_encoder_qwen", "q", "--text_encoder_clip", "c", "--ae", "a"]


def parse_kandinsky5(*words: str) -> Kandinsky5InferenceOptions:
    return parse_options(Kandinsky5InferenceOptions, [*KANDINSKY5, *words])


def test_defaults_of_kandinsky_are_the_official_ones() -> None:
    options = parse_kandinsky5()
    request = options.picture.request()
    assert (request.width, request.height, request.steps, request.source) == (None, None, 50, None)
    assert (request.guidance_scale, request.cfg_trunc_ratio, request.renorm_cfg) == (3.5, 1.0, 0.0)
    assert (request.discrete_flow_shift, request.negative_prompt) == (3.0, "")
    models = options.models
    assert (models.task, models.edit_prompt_crop, models.qwen_max_token_length) == ("auto", "55", 512)
    assert (models.pretrained_model_name_or_path, models.vae) == (Path("d"), Path("a"))
    assert list(options.adjustments()) == []


@pytest.mark.parametrize("name", ["--scheduler_scale", "--discrete_flow_shift"])
def test_both_names_of_kandinskys_shift(name: str) -> None:
    assert parse_kandinsky5(name, "5").picture.request().discrete_flow_shift == 5.0


def test_the_picture_to_edit() -> None:
    assert parse_kandinsky5("--image", "a b.png").picture.request().source == Path("a b.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_width", "1000"], "image width 1000 is not a multiple of 16"),
        (["--task", "t2v"], "invalid choice: 't2v'"),
        (["--qwen_max_token_length", "513"], "must be from 1 to 512"),
        (["--edit_prompt_crop", "54"], "invalid choice: '54'"),
        (["--scheduler_scale", "0"], "must be above 0"),
    ],
)
def test_mistakes_with_kandinsky_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_kandinsky5(*words)


def test_flags_without_effect_are_told() -> None:
    told = "\n".join(parse_kandinsky5("--task", "t2i", "--edit_prompt_crop", "52").adjustments())
    assert "--edit_prompt_crop has no effect: --task t2i edits no pictures" in told
    told = "\n".join(parse("--block_swap_ring_size", "3", "--quantize_device", "cpu").adjustments())
    assert "--block_swap_ring_size has no effect" in told and "--quantize_device has no effect" in told
    unguided = ("--guidance_scale", "1", "--negative_prompt", "fog")
    assert "--negative_prompt has no effect" in "\n".join(parse_kandinsky5(*unguided).adjustments())
    assert list(parse_kandinsky5(*unguided, "--interactive").adjustments()) == []  # --l of a line may guide


def test_several_loras() -> None:
    found = parse("--lora_weights", "a;0.5", "b", "--seed", "0")
    assert found.loras.lora_weights == (LoraWeight(Path("a"), 0.5), LoraWeight(Path("b")))
    assert found.picture.seed == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_width", "1000"], "image width 1000 is not a multiple of 16; the nearest are 992 and 1008"),
        (["--image_height", "-16"], "image height -16"),
        (["--steps", "0"], "steps is 0; it must be from 1 to 1000"),
        (["--steps", "many"], "invalid int value"),
        (["--dtype", "int8"], "invalid choice"),
        (["--guidance_scale", "-1"], "guidance_scale is -1.0"),
        (["--merge_lora_weights"], "--merge_lora_weights needs --lora_weights"),
        (["--add_system_prompt_to_negative_prompt"], "needs --system_prompt"),
        (["--interactive", "--from_file", "p.txt"], "give one"),
        (["--from_file", "p.txt", "--prompt", "x"], "give one"),
        (["--image_widht", "64"], "did you mean '--image_width'"),
        (["--gemma2_max_token_length", "0"], "must be 1 or more"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*words)
