"""The same random transformer here and in diffusers, for parity tests."""

from dataclasses import dataclass

import torch
from diffusers import Lumina2Transformer2DModel

from library.models.lumina2_format import NextDiTParams, diffusers_names
from library.models.nextdit import NextDiT


@dataclass(frozen=True)
class Pair:
    """Two models with the same weights."""

    ours: NextDiT
    theirs: Lumina2Transformer2DModel


def make_params(**changes) -> NextDiTParams:
    """A tiny network; epsilon of the query and key norms as diffusers has it."""
    sizes = {
        "dim": 48, "n_layers": 2, "n_noise_refiners": 1, "n_context_refiners": 1, "n_heads": 4,
        "n_kv_heads": 2, "head_dim": 12, "ffn_dim": 64, "cap_feat_dim": 20, "time_dim": 48,
        "axes_dims": (4, 4, 4), "in_channels": 4, "qk_norm_eps": 1e-5,
    }  # fmt: skip
    return NextDiTParams(**(sizes | changes))


def make_pair(params: NextDiTParams, seed: int = 0) -> Pair:
    """Random weights in which nothing is zero."""
    torch.manual_seed(seed)
    theirs = Lumina2Transformer2DModel(
        patch_size=params.patch_size,
        in_channels=params.in_channels,
        hidden_size=params.dim,
        num_layers=params.n_layers,
        num_refiner_layers=params.n_noise_refiners,
        num_attention_heads=params.n_heads,
        num_kv_heads=params.n_kv_heads,
        multiple_of=params.ffn_dim,
        ffn_dim_multiplier=params.ffn_dim / (4 * params.dim),
        norm_eps=params.norm_eps,
        axes_dim_rope=params.axes_dims,
        cap_feat_dim=params.cap_feat_dim,
    )
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5) if weight.dim() == 2 else weight.normal_(1.0, 0.2)
    ours = NextDiT(params)
    ours.load_state_dict({name: from_theirs(theirs.state_dict(), name) for name in ours.state_dict()})
    return Pair(ours, theirs)


def from_theirs(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What of diffusers corresponds to one of our parameters."""
    return torch.cat([tensors[part] for part in diffusers_names(name)])


@dataclass(frozen=True)
class Inputs:
    """A batch with captions of its own lengths."""

    x_BCHW: torch.Tensor
    t_B: torch.Tensor
    captions: list[torch.Tensor]

    def ours(self, model: NextDiT) -> torch.Tensor:
        """Run our model."""
        return torch.stack(model(self.x_BCHW.unbind(), self.t_B, self.captions))

    def theirs(self, model: Lumina2Transformer2DModel) -> torch.Tensor:
        """Run diffusers' model, which wants captions padded and masked."""
        padded = torch.nn.utils.rnn.pad_sequence(self.captions, batch_first=True)
        mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
        for row, caption in zip(mask, self.captions, strict=True):
            row[: len(caption)] = True
        return model(self.x_BCHW, self.t_B, padded, mask, return_dict=False)[0]


def make_inputs(params: NextDiTParams, lengths: tuple[int, ...], size: tuple[int, int]) -> Inputs:
    """Draw a batch: one sample for each caption length, latents of (height, width)."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(len(lengths), params.in_channels, *size, generator=generator)
    captions = [torch.randn(length, params.cap_feat_dim, generator=generator) for length in lengths]
    return Inputs(x, torch.rand(len(lengths), generator=generator), captions)
