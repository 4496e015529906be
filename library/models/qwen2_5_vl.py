"""Qwen2.5-VL as the text encoder of Kandinsky 5.0: token ids, and a picture, to features.

The features are the language model's last hidden state, after its final norm; the head that would predict
tokens is never built, and the vision tower only where pictures are shown. Layers and vision blocks are
transformers' own, with our linear layers, which multiply in the fastest dtype.

Notable facts:
- Attention is causal: a token sees only what stands left of it. So the texts of a batch are padded on the
  right without any mask, and the padding changes nothing.
- The table of token embeddings stays in the computer's memory, or in the memory-mapped file: only the rows
  of the tokens at hand go to the device.
- Streamed, so do the layers and vision blocks. Each comes to the device when it is its turn, while the next
  one is copied, and all sequences of a call go through one layer before the next. The computation is that of
  the encoder that is not streamed, bit for bit.
- A picture goes through the vision tower alone, so its features do not hang on other pictures.

B batch, L tokens, D features; N patches of a picture, P numbers of a patch, U tokens of a picture (each
stands for a square of patches), F angles of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextModel,
)

from library.core.device import sent
from library.core.errors import ConfigError
from library.models.qwen2_5_vl_format import (
    Qwen2_5_VLCheckpoint,
    Qwen2_5_VLParams,
    VisionParams,
    inspect_qwen2_5_vl,
    quantisable_layers,
)
from library.nn.products import Linear
from library.nn.swap.block_swap import BlockSwap, ring_bytes
from library.nn.weights.loading import Source, load_module
from library.nn.weights.quant import use_quant_layers
from library.options.quant import TextQuantOptions

_PAD_ID = 0
_RING_SIZE = 2  # a layer in use, and the next one on its way
_STATES_ON_DEVICE = 2**29  # bytes of hidden states that a streamed encoder keeps on the device between layers
_CPU = torch.device("cpu")
_WHOLE = TextQuantOptions()


@dataclass(frozen=True)
class QwenInput:
    """A text, and the picture that its image tokens stand for, in patches as the processor cuts them.

    grid_thw: how many patches the picture has in time (one), height and width.
    """

    token_ids: list[int]
    patches_NP: Tensor | None = None
    grid_thw: tuple[int, int, int] | None = None


class Qwen2_5_VLEncoder(nn.Module):
    """The language model without its head and, where `params.vision` is there, the vision tower."""

    def __init__(self, params: Qwen2_5_VLParams) -> None:
        super().__init__()
        self.params = params
        self.states_on_device = _STATES_ON_DEVICE
        self.language_model = Qwen2_5_VLTextModel(_text_config(params))
        self.visual: Qwen2_5_VisionTransformerPretrainedModel | None = None
        if params.vision is not None:
            self.visual = Qwen2_5_VisionTransformerPretrainedModel(_vision_config(params, params.vision))
            self.visual.rotary_pos_emb = nn.Identity()  # `_Grid` has the positions
        for path, layer in list(self.named_modules()):
            if isinstance(layer, nn.Linear):
                ours = Linear(layer.in_features, layer.out_features, layer.bias is not None)
                self.set_submodule(path, ours)
        self._rings: dict[nn.ModuleList, BlockSwap] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and features."""
        return self.language_model.norm.weight.dtype

    @property
    def streamed(self) -> bool:
        """Whether layers and vision blocks come to the device one by one."""
        return bool(self._rings)

    @property
    def _moves(self) -> bool:
        """Whether weights and hidden states come and go; on the meta device there is nothing to copy."""
        return self.streamed and self.device.type != "meta"

    def stream_to(self, device: torch.device) -> None:
        """From now on bring layers and vision blocks, which are on the CPU, to `device` one by one."""
        self._rings = {blocks: BlockSwap(blocks, device, ring_size=_RING_SIZE) for blocks in self._stacks()}

    def device_bytes(self) -> int:
        """Return how many bytes of weights the device has room for at once.

        Streamed, these are two layers, two vision blocks, the final norm, and what is before and behind the
        vision blocks; else all but the table of token embeddings.
        """
        tensors = [t for part in self._resident() for t in (*part.parameters(), *part.buffers())]
        resident = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return resident + sum(ring_bytes(blocks, _RING_SIZE) for blocks in self._rings)

    @torch.no_grad()
    def encode(self, sequences: Sequence[QwenInput], *, batch_size: int | None = None) -> list[Tensor]:
        """Return (L, D) features of each sequence, without padding.

        They are on the device, unless a streamed encoder was given so much that the hidden states had to wait
        in the computer's memory (more than `states_on_device` bytes): then they stay there.

        Args:
            batch_size: how many sequences are computed together; None: all. They are put together by length,
                so that little is padded. A streamed encoder is the faster, the more sequences a call has.

        Raises:
            ConfigError: a token that is not in the vocabulary, or image tokens that are not the picture's.
        """
        for sequence in sequences:
            self._check(sequence)
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place].token_ids))
        step = batch_size or max(1, len(order))
        groups = [order[start : start + step] for start in range(0, len(order), step)]
        features: dict[int, Tensor] = {}
        for together in [groups] if self.streamed else [[group] for group in groups]:
            texts = [[sequences[place] for place in group] for group in together]
            for group, found in zip(together, self._encode(texts), strict=True):
                features |= zip(group, found, strict=True)
        return [features[place] for place in range(len(sequences))]

    def _encode(self, groups: Sequence[Sequence[QwenInput]]) -> list[list[Tensor]]:
        """Take groups of sequences through the whole network, all of them through a layer before the next."""
        seen = iter(self.see([sequence for group in groups for sequence in group]))
        tokens = sum(len(sequence.token_ids) for group in groups for sequence in group)
        waiting = self.waiting_place(tokens * self.params.hidden)
        batches = [self._embed(group, [next(seen) for _ in group], waiting) for group in groups]
        self._run(self.language_model.layers, batches)
        return [self._features(group, batch) for group, batch in zip(groups, batches, strict=True)]

    def _features(self, group: Sequence[QwenInput], batch: State) -> list[Tensor]:
        normed_BLD = self.language_model.norm(batch.hidden.to(self.device)).to(batch.waiting)
        return [
            normed_LD[: len(sequence.token_ids)].clone()
            for sequence, normed_LD in zip(group, normed_BLD, strict=True)
        ]

    @torch.no_grad()
    def see(self, sequences: Sequence[QwenInput]) -> list[Tensor | None]:
        """Return features (U, D) of the sequences' pictures: what the vision tower makes of them."""
        pictures = {place: s for place, s in enumerate(sequences) if s.patches_NP is not None}
        if not pictures:
            return [None] * len(sequences)
        assert self.visual is not None and self.params.vision is not None
        v, visual = self.params.vision, self.visual
        grids = {
            grid: _Grid.of(v, *grid[1:], self.device) for grid in {s.grid_thw for s in pictures.values()}
        }
        waiting = self.waiting_place(sum(len(s.patches_NP) for s in pictures.values()) * v.hidden)
        kernel_DP = visual.patch_embed.proj.weight.flatten(1)  # a convolution of one place is a product
        states: dict[int, State] = {}
        for place, sequence in pictures.items():
            grid = grids[sequence.grid_thw]
            patches_NP = sent(sequence.patches_NP.to(self.dtype), self.device)
            hidden_ND = grid.in_windows(F.linear(patches_NP, kernel_DP))
            states[place] = State(hidden_ND.to(waiting), self.device, waiting, grid.arguments(v))
        self._run(visual.blocks, list(states.values()))
        return [
            grids[sequence.grid_thw].in_rows(visual.merger(states[place].hidden.to(self.device))).to(waiting)
            if place in states
            else None
            for place, sequence in enumerate(sequences)
        ]

    def _embed(
        self, group: Sequence[QwenInput], seen: Sequence[Tensor | None], waiting: torch.device
    ) -> State:
        """Return a batch before the first layer, with the pictures' features in place of image tokens."""
        longest = max(len(sequence.token_ids) for sequence in group)
        ids_BL = torch.full((len(group), longest), _PAD_ID)
        positions_3BL = torch.arange(longest).repeat(3, len(group), 1)
        for row, sequence in enumerate(group):
            length = len(sequence.token_ids)
            ids_BL[row, :length] = torch.tensor(sequence.token_ids, dtype=torch.long)
            positions_3BL[:, row, :length] = rope_positions(sequence, self.params)
        table = self.language_model.embed_tokens.weight
        hidden_BLD = sent(F.embedding(ids_BL, table).to(self.dtype), self.device)
        for row, (sequence, picture_UD) in enumerate(zip(group, seen, strict=True)):
            if picture_UD is not None:
                start = sequence.token_ids.index(self.params.image_token_id)
                hidden_BLD[row, start : start + len(picture_UD)] = picture_UD
        turns = self.language_model.rotary_emb(hidden_BLD, sent(positions_3BL, self.device))
        arguments = {"attention_mask": None, "position_embeddings": turns}
        return State(hidden_BLD.to(waiting), self.device, waiting, lambda number: arguments)

    def _run(self, blocks: nn.ModuleList, states: Sequence[State]) -> None:
        """Take all states through one block before the next."""
        ring = self._rings.get(blocks) if self._moves else None
        for number, block in enumerate(blocks):
            if ring is not None:
                ring.hold(block)
            for state in states:
                state.advance(block, number)

    def waiting_place(self, numbers: int) -> torch.device:
        """Return where hidden states of so many numbers are while others are computed."""
        large = self._moves and numbers * self.dtype.itemsize > self.states_on_device
        return _CPU if large else self.device

    def _check(self, sequence: QwenInput) -> None:
        """Raise ConfigError for tokens that the network does not know, or that are not the picture's."""
        ids, p = sequence.token_ids, self.params
        if max(ids, default=0) >= p.vocab:
            raise ConfigError(
                f"The tokenizer gave token {max(ids)}, but Qwen2.5-VL's weights have {p.vocab}: name the "
                f"tokenizer that belongs to them."
            )
        if sequence.patches_NP is None:
            return
        assert p.vision is not None, "loaded without its vision tower"
        _, height, width = sequence.grid_thw or (0, 0, 0)
        assert (
            sequence.grid_thw == (1, height, width) and height % p.vision.merge == width % p.vision.merge == 0
        )
        assert sequence.patches_NP.shape == (height * width, p.vision.patch_width)
        places = [place for place, token in enumerate(ids) if token == p.image_token_id]
        wanted = height * width // p.vision.merge**2
        if len(places) != wanted or places[-1] - places[0] != wanted - 1:
            raise ConfigError(
                f"The text has {len(places)} image tokens, but the picture stands for {wanted} in a row: "
                f"take <|image_pad|> out of the prompt, or shorten it so that none are cut off."
            )

    def _stacks(self) -> list[nn.ModuleList]:
        """Return the layers, and the vision blocks."""
        return [self.language_model.layers, *([] if self.visual is None else [self.visual.blocks])]

    def _resident(self) -> list[nn.Module]:
        """Return what lies on the device for good."""
        seeing = [] if self.visual is None else [self.visual.patch_embed, self.visual.merger]
        parts = [self.language_model.norm, self.language_model.rotary_emb, *seeing]
        return parts if self.streamed else [*parts, *self._stacks()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Qwen2_5_VLEncoder:
        """Move what lies on the device: `to` leaves the embeddings and streamed layers where they wait."""
        for ring in self._rings.values():
            ring.release()
        for part in self._resident():
            part._apply(fn, recurse)
        return self


@dataclass
class State:
    """What goes through layers: texts (B, L, D), or the patches of a picture (N, D).

    waiting: where it is between layers. arguments: what the block of a number is told besides.
    """

    hidden: Tensor
    device: torch.device
    waiting: torch.device
    arguments: Callable[[int], Mapping[str, object]]

    def advance(self, block: nn.Module, number: int) -> None:
        """Go through a block."""
        self.hidden = block(self.hidden.to(self.device), **self.arguments(number)).to(self.waiting)


@dataclass(frozen=True)
class _Grid:
    """How patches of a picture are put in order for attention within windows, and where they are.

    Patches come square by square of those that become one token, the squares row by row. In most blocks a
    patch sees only its window, so the squares of a window are put side by side.
    """

    order_U: Tensor
    back_U: Tensor
    window_ends: Tensor  # on the CPU, as the next
    picture_ends: Tensor
    turns: tuple[Tensor, Tensor]  # cosine and sine (N, F)

    @classmethod
    def of(cls, v: VisionParams, height: int, width: int, device: torch.device) -> _Grid:
        """Return the order for a picture of height x width patches."""
        side = v.window // v.patch // v.merge
        rows, columns = torch.arange(height // v.merge) // side, torch.arange(width // v.merge) // side
        window_U = (rows[:, None] * (columns[-1] + 1) + columns).flatten()
        order_U = window_U.argsort(stable=True)
        place_hw2 = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
        place_UM2 = rearrange(place_hw2, "(h p) (w q) a -> (h w) (p q) a", p=v.merge, q=v.merge)[order_U]
        axis = v.hidden // v.heads // 2  # half of a head turns with the row, half with the column
        speed_F = 1e4 ** -(torch.arange(0, axis, 2) / axis)
        angle_NF = rearrange(place_UM2[..., None] * speed_F, "u m a f -> (u m) (a f)").repeat(1, 2)
        return cls(
            order_U.to(device),
            order_U.argsort().to(device),
            F.pad(window_U.bincount().cumsum(0), (1, 0)) * v.merge**2,
            torch.tensor([0, height * width]),
            (angle_NF.cos().to(device), angle_NF.sin().to(device)),
        )

    def in_windows(self, x_ND: Tensor) -> Tensor:
        """Put patches in the order of the windows."""
        return x_ND.unflatten(0, (len(self.order_U), -1))[self.order_U].flatten(0, 1)

    def in_rows(self, x_UD: Tensor) -> Tensor:
        """Put tokens in the order of the rows again."""
        return x_UD[self.back_U]

    def arguments(self, v: VisionParams) -> Callable[[int], Mapping[str, object]]:
        """Return what each block is told: between which ends patches see each other, and where they are."""

        def of_block(number: int) -> Mapping[str, object]:
            ends = self.picture_ends if number in v.full_attention_blocks else self.window_ends
            return {"cu_seqlens": ends, "position_embeddings": self.turns}

        return of_block


def rope_positions(sequence: QwenInput, params: Qwen2_5_VLParams) -> Tensor:
    """Return the positions (3, L) of tokens in time, height and width.

    They count up together, but within a picture: there time stands still, and height and width count its
    rows and columns. The text behind goes on after the longer side. (`get_rope_index` of transformers.)
    """
    length = len(sequence.token_ids)
    if sequence.grid_thw is None or params.vision is None:
        return torch.arange(length).expand(3, -1)
    height, width = (size // params.vision.merge for size in sequence.grid_thw[1:])
    start = sequence.token_ids.index(params.image_token_id)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = torch.stack([torch.zeros(height, width, dtype=torch.long), rows, columns]).flatten(1)
    behind = torch.arange(length - start - height * width) + max(height, width)
    return torch.cat([torch.arange(-start, 0).expand(3, -1), inside, behind.expand(3, -1)], dim=1) + start


def _text_config(p: Qwen2_5_VLParams) -> Qwen2_5_VLTextConfig:
    rope = {"rope_type": "default", "rope_theta": p.rope_theta, "mrope_section": list(p.mrope_section)}
    return Qwen2_5_VLTextConfig(
        vocab_size=p.vocab,
        hidden_size=p.hidden,
        num_hidden_layers=p.layers,
        num_attention_heads=p.heads,
        num_key_value_heads=p.kv_heads,
        intermediate_size=p.ffn_dim,
        rms_norm_eps=p.rms_norm_eps,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )


def _vision_config(p: Qwen2_5_VLParams, v: VisionParams) -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(
        depth=v.depth,
        hidden_size=v.hidden,
        num_heads=v.heads,
        intermediate_size=v.ffn_dim,
        in_channels=v.channels,
        patch_size=v.patch,
        temporal_patch_size=v.temporal_patch,
        spatial_merge_size=v.merge,
        window_size=v.window,
        out_hidden_size=p.hidden,
        fullatt_block_indexes=list(v.full_attention_blocks),
        attn_implementation="sdpa",
    )


def load_qwen2_5_vl(
    source: Path | Qwen2_5_VLCheckpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vision: bool,
    quant: TextQuantOptions = _WHOLE,
    streamed: bool = False,
) -> Qwen2_5_VLEncoder:
    """Load a text encoder of any layout, frozen.

    What is to be on the CPU, in the file's dtype, is memory-mapped: streamed, a file of the wanted dtype
    takes no memory to speak of.

    Args:
        vision: with the vision tower, for pictures.
        quant: in how many bits the linear layers of the language model are kept; the vision tower,
            embeddings and norms stay as they are.
        streamed: keep layers and vision blocks on the CPU, and bring them to the device one by one.

    Raises:
        CheckpointError: as `inspect_qwen2_5_vl` does.
        ConfigError: the scheme cannot quantise these layers.
    """
    found = source if isinstance(source, Qwen2_5_VLCheckpoint) else inspect_qwen2_5_vl(source, vision=vision)
    assert found.params.vision is not None or not vision, "inspected without its vision tower"
    params = found.params if vision else replace(found.params, vision=None)
    with torch.device("meta"):
        encoder = Qwen2_5_VLEncoder(params)
    if quant.text_encoder_quant is not None:
        use_quant_layers(encoder, quantisable_layers(params), quant.text_encoder_quant)
    table = "language_model.embed_tokens.weight"
    waits = streamed and device.type != "meta"
    on_cpu = (table, "language_model.layers.", "visual.blocks.") if waits else (table,)
    load_module(
        encoder,
        found.checkpoint,
        {name: Source((name,)) for name in found.checkpoint.tensors},
        device=lambda name: _CPU if name.startswith(on_cpu) else device,
        dtype=lambda name: None if name == table else dtype,
        quantise_on=quant.quantise_on or device,
    )
    # The turns are computed, not stored: they were left on meta.
    encoder.language_model.rotary_emb = Qwen2_5_VLRotaryEmbedding(encoder.language_model.config).to(device)
    if streamed:
        encoder.stream_to(device)
    return encoder.eval()
