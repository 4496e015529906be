"""Filling the caches, ours against diffusers and transformers as trainers use them, on the same weights.

    python benchmarks/cache.py                      # both passes, bf16, one CPU thread
    python benchmarks/cache.py --only texts --batch 4

Texts: a random Gemma2 of 768 features and 10 layers; 24 captions of 25 to 110 tokens. Theirs is what
sd-scripts does, built from its description: every caption padded to 256 tokens, a mask, all hidden states
kept, the last but one taken. Latents: a random autoencoder of FLUX's size; 3 pictures of about 192 pixels a
side, read from PNG files. Theirs decodes, encodes and saves one after the other with diffusers'
`AutoencoderKL`.

Ours are the passes that training runs (`library/training/caching.py`), files and all; after the table stands
where the time of our last round went. Process time counts the work of all threads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from benchmarks.report import Result, add_arguments, missing_packages, show, take_turns, write  # noqa: E402
from library.core.hashing import HashLedger  # noqa: E402
from library.data.batch import Condition  # noqa: E402
from library.data.cached import CachePlace, LatentCache, TextCache  # noqa: E402
from library.data.items import BucketOptions, CaptionOptions, Dataset, ImageOptions, Subset  # noqa: E402
from library.data.prompt import Prompt  # noqa: E402
from library.data.scan import scan  # noqa: E402
from library.models.flux_vae import FluxVAE  # noqa: E402
from library.models.flux_vae_format import FluxVAEParams, diffusers_name  # noqa: E402
from library.models.gemma2 import Gemma2Encoder  # noqa: E402
from library.models.gemma2_format import Gemma2Params  # noqa: E402
from library.training.caching import Counts, PassRun, cache_latents, cache_texts  # noqa: E402

GEMMA = Gemma2Params(vocab=4000, hidden=768, layers=10, heads=8, kv_heads=4, head_dim=96, ffn_dim=3072)
PADDED = 256
LENGTHS = (25, 31, 38, 44, 47, 52, 55, 58, 60, 62, 64, 66, 68, 70, 72, 74, 76, 79, 82, 86, 90, 96, 103, 110)
PICTURES = ((192, 192), (224, 160), (192, 192))
SHIFT, SCALE = 0.1159, 0.3611


def make_pictures(folder: Path) -> None:
    """Write pictures and captions. A caption of n words has n tokens."""
    draw = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, length in enumerate(LENGTHS):
        size = PICTURES[number] if number < len(PICTURES) else (64, 64)
        pixels = draw.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(pictures / f"{number:02}.png")
        words = (f"word{draw.integers(3000)}" for _ in range(length - 1))
        (pictures / f"{number:02}.txt").write_text(" ".join(words))


def token_ids(text: str) -> list[int]:
    """Stand in for the tokenizer, the same for both: a beginning, and a number a word."""
    return [2, *(5 + int(word.removeprefix("word")) for word in text.split())]


class TextPasses:
    """The text pass of both."""

    def __init__(self, folder: Path, batch: int) -> None:
        from transformers import Gemma2Model

        from library.models.gemma2 import _config

        torch.manual_seed(0)
        self.theirs = Gemma2Model(_config(_one_more_layer(GEMMA))).to(torch.bfloat16).eval()
        self.ours = Gemma2Encoder(GEMMA).to(torch.bfloat16).eval()
        same = {f"model.{name}": weight for name, weight in self.theirs.state_dict().items()}
        wanted = self.ours.state_dict()
        self.ours.load_state_dict({name: same[name] for name in wanted})
        self.items = _items(folder)
        self.folder, self.batch = folder, batch
        self.counts: Counts | None = None

    def our_pass(self) -> None:
        """Fill a cache on disk."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        source = TextCache(CachePlace(True, self.folder / "cache"), "gemma", max_variants=1)
        run = PassRun(self.batch, threads=2)
        self.counts = cache_texts(
            source, self.items, lambda: self._encode, run, length=lambda text: len(token_ids(text))
        )

    def their_pass(self) -> None:
        """Padded to the limit, masked, all hidden states; one file a caption."""
        captions = [item.text for item in self.items]
        for start in range(0, len(captions), self.batch):
            ids = [token_ids(caption) for caption in captions[start : start + self.batch]]
            padded = torch.tensor([row + [0] * (PADDED - len(row)) for row in ids])
            mask = torch.tensor([[1] * len(row) + [0] * (PADDED - len(row)) for row in ids])
            with torch.no_grad():
                states = self.theirs(
                    input_ids=padded, attention_mask=mask, output_hidden_states=True
                ).hidden_states[-2]
            for offset, state in enumerate(states):
                np.savez(self.folder / f"theirs{start + offset}.npz", hidden=state.float().numpy())

    def check(self) -> None:
        """Both must give the same features but for rounding."""
        ids = token_ids(self.items[-1].text)
        mine = self.ours.encode([ids])[0].float()
        hers = self.theirs(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]
        error = (mine - hers.float()).norm() / hers.float().norm()
        print(f"features differ by {error:.1e} of their norm (both in bf16)")

    def _encode(self, prompts: list[Prompt]) -> list[Condition]:
        ids = [token_ids(prompt.text) for prompt in prompts]
        return [Condition(tokens_LD) for tokens_LD in self.ours.encode(ids)]


class LatentPasses:
    """The picture pass of both."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKL

        params = FluxVAEParams()
        torch.manual_seed(0)
        self.ours = FluxVAE(params).to(dtype).requires_grad_(False).to(memory_format=torch.channels_last)
        self.theirs = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=params.channels,
            layers_per_block=params.blocks,
            latent_channels=params.latent_channels,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).to(dtype)
        shapes = {name: weight.shape for name, weight in self.theirs.state_dict().items()}
        renamed = {diffusers_name(name, params.levels): w for name, w in self.ours.state_dict().items()}
        self.theirs.load_state_dict({name: w.reshape(shapes[name]) for name, w in renamed.items()})
        self.items = _items(folder)[: len(PICTURES)]
        self.folder, self.dtype = folder, dtype
        self.counts: Counts | None = None

    def our_pass(self) -> None:
        """Fill a cache on disk."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        source = LatentCache(CachePlace(True, self.folder / "cache"), "ae")
        self.counts = cache_latents(source, self.items, lambda: self.ours.encode_mean, PassRun(1, threads=2))

    def their_pass(self) -> None:
        """Decode, encode, save, one after the other."""
        for number, item in enumerate(self.items):
            with Image.open(item.path) as picture:
                pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
            with torch.no_grad():
                mean = self.theirs.encode((pixels / 127.5 - 1).to(self.dtype)).latent_dist.mean
            save_file({"latents": (mean - SHIFT) * SCALE}, self.folder / f"theirs{number}.safetensors")


def _one_more_layer(params: Gemma2Params) -> Gemma2Params:
    """Our configuration leaves the last layer out, and theirs must have it."""
    from dataclasses import replace

    return replace(params, layers=params.layers + 1)


def _items(folder: Path) -> list:
    pictures = folder / "pictures"
    subset = Subset("dreambooth", pictures, CaptionOptions(), ImageOptions(), caption_extension=".txt")
    buckets = BucketOptions((192, 192), enable_bucket=True, bucket_reso_steps=32)
    dataset = Dataset((subset,), buckets)
    return list(scan([dataset], skip_bad_images=False, ledger=HashLedger()).items)


def compare(title: str, passes: TextPasses | LatentPasses, rounds: int) -> Result:
    """Let both take turns and show the table and our stages."""
    contestants: dict[str, Callable[[], object]] = {
        "flow-scripts": passes.our_pass,
        "theirs": passes.their_pass,
        "control": passes.our_pass,
    }
    result = take_turns(title, contestants, rival="theirs", rounds=rounds)
    show(result, "cache")
    watch = passes.counts.watch
    stages = (f"{stage} {watch.seconds(stage) / watch.seconds('all'):.1%}" for stage in STAGES)
    things = passes.counts.encoded
    print(f"\nlast round: {things / watch.seconds('all'):.2f} a second (wall); {', '.join(stages)}")
    return result


STAGES = ("encode", "wait", "decode", "write")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("texts", "latents"), help="one pass only")
    parser.add_argument("--batch", type=int, default=8, help="captions a batch, of both")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the autoencoder")
    add_arguments(parser, rounds=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder)
        if args.only != "latents":
            texts = TextPasses(folder, args.batch)
            texts.check()
            results.append(compare(f"texts, bf16, batches of {args.batch}", texts, args.rounds))
        missing = missing_packages("diffusers")
        if missing and args.only != "texts":
            print(f"Latents have no rival here: {missing} not installed.", file=sys.stderr)
        elif args.only != "texts":
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
            pictures = LatentPasses(folder, dtype)
            results.append(compare(f"latents, {args.dtype}", pictures, args.rounds))
    write(results, args.json)


if __name__ == "__main__":
    main()
