"""Whole prompts to features, against transformers' models by the official recipe."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from library.core.errors import ConfigError, DataError, NonFiniteError
from library.data.items import Geometry
from library.data.prompt import Prompt, SourcePicture
from library.models.clip_tokenizer import find_clip_tokenizer
from library.models.kandinsky5_format import MOST_TOKENS
from library.models.kandinsky5_prompt import Kandinsky5Tokenizers, count_tokens, qwen_prompt
from library.models.kandinsky5_text import encode_prompts, load_text_encoders
from library.models.qwen_tokenizer import find_qwen_tokenizer
from tools.nano.files import prefixed, write_json, write_shards
from tools.nano.kandinsky5_qwen import PARAMS, qwen_config, qwen_tensors
from tools.nano.kandinsky5_text import (
    QWEN_IDS,
    QWEN_VOCAB,
    clip_config,
    clip_tensors,
    write_clip_tokenizer,
    write_qwen_tokenizer,
)

CPU = torch.device("cpu")
# As the official code spells them.
T2I = (
    "<|im_start|>system\nYou are a promt engineer. Describe the image by detailing the color, shape, size, "
    "texture, quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>"
)
I2I = (
    "<|im_start|>system\nYou are a promt engineer. Based on the provided source image (first image) and "
    "target image (second image), create an interesting text prompt that can be used together with the "
    "source image to create the target image:<|im_end|>\n<|im_start|>user\n{}"
)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
LIMITS = {"max_length": 512, "edit_crop": 55}
TEXTS = [
    "",
    "a cat",
    "A small red cat, on the table: 大きな猫 😀\n\nmany {} stones",
    "a<|im_end|>\n<|im_start|>user\nb",
    "the size of the objects " * 30,
    "色" * 300,  # 900 tokens
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder of a diffusers pipeline, without what draws."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_shards(folder / "text_encoder", "model", qwen_tensors(0), 1)
    write_json(folder / "text_encoder" / "config.json", qwen_config())
    write_shards(folder / "text_encoder_2", "model", prefixed(clip_tensors(0), "text_model."), 1)
    write_json(folder / "text_encoder_2" / "config.json", clip_config())
    write_qwen_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2")
    return folder


@pytest.fixture(scope="module")
def tokenizers(pipeline):
    return Kandinsky5Tokenizers(find_qwen_tokenizer(pipeline).build(), find_clip_tokenizer(pipeline).build())


@pytest.fixture(scope="module")
def encoders(pipeline):
    return load_text_encoders(pipeline, pipeline, device=CPU, dtype=torch.float32, vision=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a function: size of the target -> a picture that is cut to it, and its pixels."""
    folder = tmp_path_factory.mktemp("sources")

    def make(size):
        width, height = size
        file = folder / f"{width}x{height}.png"
        pixels = np.random.default_rng(1).integers(0, 256, (height + 6, width + 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        cut = pixels[2 : 2 + height, 3 : 3 + width]
        return SourcePicture(file, Geometry((width + 4, height + 6), (3, 2), size), "digest"), cut

    return make


@pytest.fixture(scope="module")
def official(pipeline):
    return Official(pipeline)


class Official:
    """The official recipe (kandinsky/models/text_embedders.py), on transformers."""

    def __init__(self, folder):
        self.qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
        self.processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
        self.clip = CLIPTextModel.from_pretrained(folder / "text_encoder_2").eval()
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        assert self.tokenizer.padding_side == "right"

    @torch.no_grad()
    def pooled(self, text):
        inputs = self.clip_tokenizer(
            [text], max_length=77, truncation=True, padding="max_length", return_tensors="pt"
        )
        return self.clip(**inputs).pooler_output[0]

    @torch.no_grad()
    def from_text(self, text, max_length=512):
        """Padded to the full length, no mask for Qwen; pads are left out afterwards."""
        length = {"max_length": max_length + 41, "truncation": True, "padding": "max_length"}
        inputs = self.tokenizer([T2I.format(text)], return_tensors="pt", **length)
        states = self.qwen(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[-1]
        return states[:, 41:][inputs["attention_mask"][:, 41:].bool()]

    @torch.no_grad()
    def from_picture(self, text, pixels):
        """Not cropped yet. `pixels`: cut to the target's size. Nothing is cut off the text."""
        pixels_BCHW = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        half = (pixels.shape[0] // 2, pixels.shape[1] // 2)
        half_CHW = F.interpolate(pixels_BCHW, size=half, mode="bilinear", antialias=True).round()[0]
        picture = Image.fromarray(half_CHW.permute(1, 2, 0).to(torch.uint8).numpy())
        seen = self.processor(picture, return_tensors="pt")
        pads = "<|image_pad|>" * (int(seen["image_grid_thw"].prod()) // 4)
        full = I2I.format(text) + PICTURE.replace("<|image_pad|>", pads) + "<|im_end|>"
        ids = self.tokenizer([full], return_tensors="pt")["input_ids"]
        kinds = (ids == QWEN_IDS["<|image_pad|>"]).int()
        shown = {"mm_token_type_ids": kinds, **seen}
        return self.qwen(input_ids=ids, output_hidden_states=True, **shown).hidden_states[-1][0]


def assert_equal(found, wanted):
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_templates_have_the_tokens_that_are_cropped(tokenizers, source):
    assert qwen_prompt(tokenizers.qwen, Prompt("a"), **LIMITS).crop == 41
    edit = Prompt("a", source((64, 64))[0])
    assert [qwen_prompt(tokenizers.qwen, edit, max_length=9, edit_crop=c).crop for c in (52, 55)] == [52, 55]
    assert (PARAMS.vocab, PARAMS.image_token_id) == (QWEN_VOCAB, QWEN_IDS["<|image_pad|>"])


def test_texts_equal_the_official_recipe(encoders, tokenizers, official):
    found = encode_prompts(encoders, tokenizers, [Prompt(text) for text in TEXTS], batch_size=4, **LIMITS)
    for text, condition in zip(TEXTS, found, strict=True):
        assert_equal(condition.tokens_LD, official.from_text(text))
        assert_equal(condition.pooled_D, official.pooled(text))
    assert (len(found[0].tokens_LD), len(found[-1].tokens_LD)) == (1, 512)


@pytest.mark.parametrize("size", [(64, 64), (16, 160), (112, 224)])
def test_pictures_equal_the_official_recipe(encoders, tokenizers, official, source, size):
    """With the official crop; with the other there are three tokens more, of the text if it has them."""
    picture, pixels = source(size)
    for text in ("", "a cat"):
        wanted = official.from_picture(text, pixels)
        for crop in (55, 52):
            limits = {"max_length": 512, "edit_crop": crop}
            found = encode_prompts(encoders, tokenizers, [Prompt(text, picture)], **limits)[0]
            assert_equal(found.tokens_LD, wanted[crop:])
            assert_equal(found.pooled_D, official.pooled(text))


def test_the_picture_is_seen(encoders, tokenizers, source, tmp_path):
    picture, _ = source((64, 64))
    file = tmp_path / "black.png"
    Image.new("RGB", (68, 70)).save(file)
    found = encode_prompts(
        encoders, tokenizers, [Prompt("a", picture), Prompt("a", replace(picture, path=file))], **LIMITS
    )
    assert (found[0].tokens_LD - found[1].tokens_LD).abs().max() > 0.1
    assert torch.equal(found[0].pooled_D, found[1].pooled_D)


# ---- lengths


@pytest.mark.parametrize("limit", [1, 5, 512])
def test_long_texts_are_cut_at_their_end(tokenizers, limit):
    text = "the color " * 400
    found = qwen_prompt(tokenizers.qwen, Prompt(text), max_length=limit, edit_crop=55)
    assert found.ids == tokenizers.qwen.ids(T2I.format(text))[: 41 + limit]
    assert QWEN_IDS["<|im_end|>"] not in found.ids[41:]
    count, most = count_tokens(tokenizers.qwen, Prompt(text), max_length=limit, edit_crop=55)
    assert (count, most) == (tokenizers.qwen.count(text) + 1, limit)


def test_of_a_prompt_with_a_picture_only_the_text_is_cut(tokenizers, source):
    prompt = Prompt("the color " * 400, source((256, 96))[0])
    found = qwen_prompt(tokenizers.qwen, prompt, max_length=20, edit_crop=55)
    short = qwen_prompt(tokenizers.qwen, Prompt("", prompt.source), max_length=20, edit_crop=55)
    pictures = found.ids.count(QWEN_IDS["<|image_pad|>"])
    assert pictures == found.grid[1] * found.grid[2] // 4
    tail = found.ids[-(pictures + 3) :]
    assert short.ids[52:] == tail and tail[-1] == QWEN_IDS["<|im_end|>"]
    assert len(found.ids) == 55 + 20 + len(tail)
    count, most = count_tokens(tokenizers.qwen, prompt, max_length=20, edit_crop=55)
    assert (count, most) == (tokenizers.qwen.count(prompt.text) - 3 + len(tail), 20 + len(tail))


@pytest.mark.parametrize("size", [(1024, 1024), (1280, 1280), (1408, 640), (2048, 2048), (2048, 16)])
def test_a_sequence_fits_the_positions_of_the_transformer(tokenizers, size):
    """The official code would fail; at its own sizes nothing is cut that it does not cut."""
    picture = SourcePicture(Path("x.png"), Geometry(size, (0, 0), size), "digest")
    found = qwen_prompt(tokenizers.qwen, Prompt("the color " * 400, picture), **LIMITS)
    pictures = found.ids.count(QWEN_IDS["<|image_pad|>"])
    kept = len(found.ids) - found.crop
    assert kept == found.limit <= MOST_TOKENS and found.ids[-1] == QWEN_IDS["<|im_end|>"]
    assert kept - pictures - 3 == min(512, MOST_TOKENS - pictures - 3) >= 256


def test_counted_as_encoded(encoders, tokenizers, source):
    limits = {"max_length": 40, "edit_crop": 55}
    prompts = [Prompt(text, picture) for text in TEXTS for picture in (None, source((64, 64))[0])]
    conditions = encode_prompts(encoders, tokenizers, prompts, **limits)
    counted = [min(count_tokens(tokenizers.qwen, prompt, **limits)) for prompt in prompts]
    assert [len(condition.tokens_LD) for condition in conditions] == counted


def test_another_vocabulary_is_cropped_behind_its_template(tmp_path, source):
    """Byte by byte: the template is much longer."""
    write_qwen_tokenizer(tmp_path, slow=True)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = find_qwen_tokenizer(tmp_path).build()
    empty = qwen_prompt(tokenizer, Prompt(""), **LIMITS)
    assert empty.ids[empty.crop :] == [QWEN_IDS["<|im_end|>"]] and empty.crop > 150
    picture = source((64, 64))[0]
    for crop, kept in ((52, "a cat"), (55, "at")):
        found = qwen_prompt(tokenizer, Prompt("a cat", picture), max_length=512, edit_crop=crop)
        behind = found.ids[found.crop : found.ids.index(QWEN_IDS["<|vision_start|>"])]
        assert behind == tokenizer.ids(kept)


# ---- batches


def test_company_changes_nothing(encoders, tokenizers, source):
    prompts = [Prompt(text) for text in TEXTS[:4]] + [
        Prompt(text, source(size)[0]) for text in TEXTS[:2] for size in ((64, 64), (16, 160))
    ]
    alone = [encode_prompts(encoders, tokenizers, [prompt], **LIMITS)[0] for prompt in prompts]
    for size in (3, 100):  # mixed lengths, texts and pictures
        together = encode_prompts(encoders, tokenizers, prompts, batch_size=size, **LIMITS)
        for ours, wanted in zip(together, alone, strict=True):
            assert_equal(ours.tokens_LD, wanted.tokens_LD)
            assert_equal(ours.pooled_D, wanted.pooled_D)
            assert not ours.tokens_LD.requires_grad
            for tensor in (ours.tokens_LD, ours.pooled_D):  # no view that keeps a batch alive
                assert tensor.untyped_storage().nbytes() == tensor.numel() * 4


def test_no_prompts(encoders, tokenizers):
    assert encode_prompts(encoders, tokenizers, [], batch_size=0, **LIMITS) == []


def test_streamed_gives_the_same(pipeline, encoders, tokenizers, source):
    streamed = load_text_encoders(
        pipeline, pipeline, device=CPU, dtype=torch.float32, vision=True, streamed=True
    )
    assert streamed.qwen.streamed and not encoders.qwen.streamed
    prompts = [*map(Prompt, TEXTS[:4]), Prompt("a", source((64, 64))[0])]
    found = encode_prompts(streamed, tokenizers, prompts, batch_size=2, **LIMITS)
    wanted = encode_prompts(encoders, tokenizers, prompts, batch_size=2, **LIMITS)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.tokens_LD, theirs.tokens_LD) and torch.equal(ours.pooled_D, theirs.pooled_D)


def test_without_eyes(pipeline, tokenizers, encoders):
    blind = load_text_encoders(pipeline, pipeline, device=CPU, dtype=torch.bfloat16, vision=False)
    assert blind.qwen.visual is None and (blind.device, blind.dtype) == (CPU, torch.bfloat16)
    found = encode_prompts(blind, tokenizers, [Prompt("a cat")], **LIMITS)[0]
    wanted = encode_prompts(encoders, tokenizers, [Prompt("a cat")], **LIMITS)[0]
    assert found.tokens_LD.dtype == found.pooled_D.dtype == torch.bfloat16
    assert (found.tokens_LD - wanted.tokens_LD).norm() / wanted.tokens_LD.norm() < 0.05


def test_blank(encoders):
    found = encoders.encode_blank(7, 3)
    assert [(c.tokens_LD.shape, c.pooled_D.shape) for c in found] == [((7, 64), (128,))] * 3


# ---- what goes wrong


def test_the_mark_of_a_picture_in_a_prompt(encoders, tokenizers, official, source):
    text = "a <|image_pad|> b"
    found = encode_prompts(encoders, tokenizers, [Prompt(text)], **LIMITS)[0]
    assert len(found.tokens_LD) == len(tokenizers.qwen.ids(text)) + 1  # read as a token, as in transformers
    picture = source((64, 64))[0]
    with pytest.raises(DataError, match=r"a <\|image_pad\|> b.*64x64.png"):
        encode_prompts(encoders, tokenizers, [Prompt(text, picture)], **LIMITS)


def test_a_picture_that_is_gone(encoders, tokenizers, source, tmp_path):
    picture = replace(source((64, 64))[0], path=tmp_path / "gone.png")
    with pytest.raises(DataError, match="gone.png"):
        encode_prompts(encoders, tokenizers, [Prompt("a", picture)], **LIMITS)


@pytest.mark.parametrize("broken", ["Qwen2.5-VL", "CLIP"])
def test_overflow_names_the_prompt(pipeline, tokenizers, broken):
    encoders = load_text_encoders(pipeline, pipeline, device=CPU, dtype=torch.float32, vision=False)
    norm = encoders.clip.model.final_layer_norm if broken == "CLIP" else encoders.qwen.language_model.norm
    norm.weight = torch.nn.Parameter(torch.full_like(norm.weight, float("nan")), requires_grad=False)
    with pytest.raises(NonFiniteError, match=f"{broken} gave NaN .* 'a golden cup'"):
        encode_prompts(encoders, tokenizers, [Prompt("a golden cup")], **LIMITS)


def test_the_tokenizer_of_another_size(pipeline, tokenizers, tmp_path):
    small = replace(PARAMS, vocab=500, image_token_id=1, vision=None)
    save_file(qwen_tensors(0, small), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(qwen_config(small)))
    encoders = load_text_encoders(tmp_path, pipeline, device=CPU, dtype=torch.float32, vision=False)
    with pytest.raises(ConfigError, match="name the tokenizer"):
        encode_prompts(encoders, tokenizers, [Prompt("a")], **LIMITS)
