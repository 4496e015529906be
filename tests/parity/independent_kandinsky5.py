"""Kandinsky 5.0 Image, written from its documents on diffusers, transformers and torch; see independent.py.

Every picture goes through the transformer alone, so no text is padded there and none is masked.

diffusers' attention rounds rotated queries and keys to bf16, in fp32 runs too. Training here does not
(library/models/kandinsky5_dit.py says why), and two runs that differ before such a rounding by one bit of
fp32 differ after it by one of bf16. So `Attend` takes the place of diffusers' attention: the same without
rounding. All else of the transformer is diffusers' own.

Shapes: B pictures, C latent channels, h and w latent height and width, L tokens, D features, H heads, F
features of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, Kandinsky5Transformer3DModel
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers import CLIPTextModel, CLIPTokenizer, Qwen2_5_VLModel, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.parity.independent import Place, Recipe, Sample, State, added, as_bytes

SCALE = 0.3611  # of the FLUX autoencoder; its shift is not for Kandinsky
# As the official code spells them, with the number of features that it drops in front.
FROM_TEXT, TEXT_CROP = (
    "<|im_start|>system\nYou are a promt engineer. Describe the image by detailing the color, shape, size, "
    "texture, quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>",
    41,
)
FROM_PICTURE, EDIT_CROP = (
    "<|im_start|>system\nYou are a promt engineer. Based on the provided source image (first image) and "
    "target image (second image), create an interesting text prompt that can be used together with the "
    "source image to create the target image:<|im_end|>\n<|im_start|>user\n{}"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>",
    55,
)


@dataclass(frozen=True)
class Condition:
    """What a picture is made of: text features (L, D), CLIP's vector, and the latents that are edited."""

    tokens_LD: Tensor
    pooled_D: Tensor
    source_Chw: Tensor | None


class Attend:
    """diffusers' `Kandinsky5AttnProcessor` without its roundings and without its sparse attention."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            linear(x).unflatten(-1, (attn.num_heads, -1))
            for linear, x in ((attn.to_query, hidden_states), (attn.to_key, seen), (attn.to_value, seen))
        )
        query, key = attn.query_norm(query), attn.key_norm(key)
        if rotary_emb is not None:
            query, key = _rotated(query, rotary_emb), _rotated(key, rotary_emb)
        heads = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        return attn.out_layer(heads.transpose(1, 2).flatten(2))


def _rotated(x_BLHF: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of features by 2 x 2 matrices."""
    pairs = x_BLHF.unflatten(-1, (-1, 2))
    return torch.einsum("...ij,...j->...i", turns, pairs).flatten(-2)


class Kandinsky:
    """The models of a pipeline folder, as diffusers and transformers load them, in fp32.

    max_length: how many tokens of a caption count.
    """

    def __init__(self, folders: Mapping[str, Path], tokenizers: Path, max_length: int = 512) -> None:
        self.dit = Kandinsky5Transformer3DModel.from_pretrained(folders["pretrained_model_name_or_path"])
        self.dit.requires_grad_(False).set_attn_processor(Attend())
        self.vae = AutoencoderKL.from_pretrained(folders["vae"]).requires_grad_(False)
        self.qwen = Qwen2_5_VLModel.from_pretrained(folders["text_encoder_qwen"]).requires_grad_(False).eval()
        self.clip = CLIPTextModel.from_pretrained(folders["text_encoder_clip"]).requires_grad_(False).eval()
        self.tokenizer = Qwen2Tokenizer.from_pretrained(tokenizers / "tokenizer", padding_side="right")
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer_2")
        self.processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
        self.max_length = max_length
        self.places = lora_places(self.dit)
        self._conditions: dict[tuple[str, bytes | None], Condition] = {}

    def latents(self, pixels_B3HW: Tensor) -> Tensor:
        """Scaled means of the posterior."""
        return self.vae.encode(pixels_B3HW).latent_dist.mean * SCALE

    def pixels(self, latents_BChw: Tensor) -> Tensor:
        """Pictures in about [-1, 1]."""
        return self.vae.decode(latents_BChw / SCALE, return_dict=False)[0]

    def condition(self, text: str, source_3HW: Tensor | None) -> Condition:
        """A prompt, and the picture that it edits, as large as what is made of it."""
        key = text, None if source_3HW is None else source_3HW.numpy().tobytes()
        if key not in self._conditions:
            source = None if source_3HW is None else self.latents(source_3HW[None])[0]
            tokens = self._of_text(text) if source_3HW is None else self._of_picture(text, source_3HW)
            self._conditions[key] = Condition(tokens, self._pooled(text), source)
        return self._conditions[key]

    def velocity(
        self,
        x_BChw: Tensor,
        sigma_B: Tensor,
        conditions: Sequence[Condition],
        lora: State,
        strength: float = 1.0,
    ) -> Tensor:
        """noise - x0: the clock shows 1000 sigma."""
        weights = added(self.dit, self.places, lora, strength)
        found = []
        for x, sigma, condition in zip(x_BChw, sigma_B, conditions, strict=True):
            if self.dit.config.visual_cond:
                source = condition.source_Chw
                given = torch.zeros_like(x) if source is None else source
                mask = torch.full_like(x[:1], 0 if source is None else 1)
                x = torch.cat([x, given, mask])
            rows, columns = x.shape[1] // 2, x.shape[2] // 2
            inputs = {
                "hidden_states": x.permute(1, 2, 0)[None, None],
                "encoder_hidden_states": condition.tokens_LD[None],
                "timestep": 1000 * sigma[None],
                "pooled_projections": condition.pooled_D[None],
                "visual_rope_pos": [torch.arange(1), torch.arange(rows), torch.arange(columns)],
                "text_rope_pos": torch.arange(len(condition.tokens_LD)),
                "return_dict": False,
            }
            found.append(functional_call(self.dit, weights, (), inputs)[0, 0].permute(2, 0, 1))
        return torch.stack(found)

    def predicted(
        self, noisy_BChw: Tensor, sigma_B: Tensor, samples: Sequence[Sample], lora: State, recipe: Recipe
    ) -> Tensor:
        """noise - x0, for training."""
        conditions = [self.condition(sample.caption, sample.source_3HW) for sample in samples]
        return self.velocity(noisy_BChw, sigma_B, conditions, lora, recipe.strength)

    def _of_text(self, text: str) -> Tensor:
        """The last hidden state at the prompt's own tokens.

        Padded to the full length, and Qwen is given no mask: it looks to the left only.
        """
        tokens = self.tokenizer(
            FROM_TEXT.format(text),
            max_length=TEXT_CROP + self.max_length,
            truncation=True,
            padding="max_length",
            return_tensors="pt",
        )
        states_LD = self.qwen(input_ids=tokens["input_ids"]).last_hidden_state[0]
        return states_LD[TEXT_CROP:][tokens["attention_mask"][0, TEXT_CROP:].bool()]

    def _of_picture(self, text: str, source_3HW: Tensor) -> Tensor:
        """The same with a picture behind the text, halved before the processor resizes it to its patches."""
        pixels_BCHW = torch.from_numpy(as_bytes(source_3HW)).permute(2, 0, 1)[None].float()
        half = [side // 2 for side in pixels_BCHW.shape[2:]]
        halved = interpolate(pixels_BCHW, size=half, mode="bilinear", antialias=True)[0].round().byte()
        seen = self.processor(Image.fromarray(halved.permute(1, 2, 0).numpy()), return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // 4
        template = FROM_PICTURE.replace("<|image_pad|>", "<|image_pad|>" * count)
        ids = self.tokenizer(template.format(text), return_tensors="pt")["input_ids"]
        kinds = (ids == self.qwen.config.image_token_id).int()
        states = self.qwen(input_ids=ids, mm_token_type_ids=kinds, **seen).last_hidden_state
        return states[0, EDIT_CROP:]

    def _pooled(self, text: str) -> Tensor:
        tokens = self.clip_tokenizer(
            text, max_length=77, truncation=True, padding="max_length", return_tensors="pt"
        )
        return self.clip(**tokens).pooler_output[0]


def lora_places(dit: Kandinsky5Transformer3DModel) -> dict[str, Place]:
    """Every linear weight: files call them as diffusers does, with underscores."""
    names = [name for name, weight in dit.named_parameters() if weight.ndim == 2]
    return {name: Place(name.removesuffix(".weight").replace(".", "_"), slice(None)) for name in names}


@torch.no_grad()
def draw(
    kandinsky: Kandinsky,
    prompt: str,
    negative: str,
    lora: State,
    *,
    size: tuple[int, int],
    seed: int,
    steps: int,
    source_3HW: Tensor | None = None,
    guidance: float = 3.5,
) -> np.ndarray:
    """Draw a picture (H, W, 3) of bytes; the negative prompt goes with the source picture too."""
    positive, empty = (kandinsky.condition(text, source_3HW) for text in (prompt, negative))
    x = torch.randn(1, 16, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))
    even = torch.linspace(1, 0, steps + 1)
    sigmas = 3 * even / (1 + 2 * even)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        wanted, unwanted = (
            kandinsky.velocity(x, sigma[None], [condition], lora) for condition in (positive, empty)
        )
        x = x + (following - sigma) * (unwanted + guidance * (wanted - unwanted))
    return as_bytes(kandinsky.pixels(x)[0])
