"""The same random transformer here and in diffusers, for parity tests."""

from dataclasses import dataclass

import torch
from diffusers import Kandinsky5Transformer3DModel

from library.models.kandinsky5_dit import Kandinsky5DiT
from library.models.kandinsky5_format import Kandinsky5Params


@dataclass(frozen=True)
class Pair:
    """Two models with the same weights."""

    ours: Kandinsky5DiT
    theirs: Kandinsky5Transformer3DModel


def make_params(**changes) -> Kandinsky5Params:
    """A tiny network."""
    sizes = {
        "model_dim": 64, "ff_dim": 128, "n_text_blocks": 2, "n_visual_blocks": 3, "head_dim": 32,
        "text_dim": 20, "pooled_dim": 24, "time_dim": 32, "axes_dims": (8, 12, 12),
    }  # fmt: skip
    return Kandinsky5Params(**(sizes | changes))


def make_theirs(params: Kandinsky5Params, seed: int = 0) -> Kandinsky5Transformer3DModel:
    """Random weights in which nothing is zero, modulation and biases included."""
    torch.manual_seed(seed)
    theirs = Kandinsky5Transformer3DModel(
        in_visual_dim=params.latent_channels,
        out_visual_dim=params.latent_channels,
        in_text_dim=params.text_dim,
        in_text_dim2=params.pooled_dim,
        time_dim=params.time_dim,
        patch_size=(1, params.patch_size, params.patch_size),
        model_dim=params.model_dim,
        ff_dim=params.ff_dim,
        num_text_blocks=params.n_text_blocks,
        num_visual_blocks=params.n_visual_blocks,
        axes_dims=params.axes_dims,
        visual_cond=params.task == "i2i",
    )
    randomise(theirs)
    return theirs


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Fill a model of either kind with weights of sane size."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(std=weight.shape[1] ** -0.5)
        else:
            weight.normal_(1.0 if "norm.weight" in name else 0.0, 0.2)


def make_pair(params: Kandinsky5Params, seed: int = 0) -> Pair:
    """Both models; ours rounds rotated queries and keys as theirs does."""
    theirs = make_theirs(params, seed)
    ours = Kandinsky5DiT(params)
    ours.load_state_dict(theirs.state_dict())
    ours.round_rotated = True
    return Pair(ours, theirs)


@dataclass(frozen=True)
class Inputs:
    """A batch with texts of their own lengths. `theirs` wants them equal, because it knows no mask."""

    x: list[torch.Tensor]
    time_B: torch.Tensor
    tokens: list[torch.Tensor]
    pooled_BP: torch.Tensor

    def ours(self, model: Kandinsky5DiT) -> list[torch.Tensor]:
        """Run our model."""
        return model(self.x, self.time_B, self.tokens, self.pooled_BP)

    def theirs(self, model: Kandinsky5Transformer3DModel) -> list[torch.Tensor]:
        """Run diffusers' model, one sample after another."""
        parts = []
        for index, (x_Chw, tokens_LD) in enumerate(zip(self.x, self.tokens, strict=True)):
            rows, columns = (size // 2 for size in x_Chw.shape[1:])
            out = model(
                x_Chw.permute(1, 2, 0)[None, None],
                tokens_LD[None],
                self.time_B[index : index + 1],
                self.pooled_BP[index : index + 1],
                visual_rope_pos=[torch.arange(1), torch.arange(rows), torch.arange(columns)],
                text_rope_pos=torch.arange(len(tokens_LD)),
                return_dict=False,
            )
            parts.append(out[0, 0].permute(2, 0, 1))
        return parts

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Cast all but the time."""
        return Inputs(
            [x.to(dtype) for x in self.x],
            self.time_B,
            [t.to(dtype) for t in self.tokens],
            self.pooled_BP.to(dtype),
        )

    def leaves(self) -> list[torch.Tensor]:
        """All that a gradient can be taken to."""
        return [*self.x, *self.tokens, self.pooled_BP]


def make_inputs(params: Kandinsky5Params, lengths: tuple[int, ...], *sizes: tuple[int, int]) -> Inputs:
    """Draw a batch: one sample for each text length; latents of (height, width), one size or one for each."""
    draw = torch.Generator().manual_seed(7)
    sizes = sizes * len(lengths) if len(sizes) == 1 else sizes
    return Inputs(
        [torch.randn(params.in_channels, *size, generator=draw) for size in sizes],
        1000 * torch.rand(len(lengths), generator=draw),
        [torch.randn(length, params.text_dim, generator=draw) for length in lengths],
        torch.randn(len(lengths), params.pooled_dim, generator=draw),
    )
