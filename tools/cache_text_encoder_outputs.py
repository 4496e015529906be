"""Encode the captions of a dataset ahead of training.

    python tools/cache_text_encoder_outputs.py --gemma2 gemma2.safetensors --dataset_config my_dataset.toml \\
        --system_prompt "You are an assistant ..." --mixed_precision bf16

Training with --cache_text_encoder_outputs or --cache_text_encoder_outputs_to_disk finds every entry, provided
that it is given the same dataset and the same text encoder options, --mixed_precision,
--max_caption_variants, --cache_dtype and --cache_directory. With several GPUs, start it with `accelerate
launch`: the processes share the work out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.entry import run_script  # noqa: E402
from library.core.hashing import HashLedger  # noqa: E402
from library.core.log import setup_logging  # noqa: E402
from library.data.items import Manifest  # noqa: E402
from library.data.scan import scan  # noqa: E402
from library.data.schema import load_datasets  # noqa: E402
from library.models.gemma2_tokenizer import format_prompt, load_gemma2_tokenizer  # noqa: E402
from library.models.lumina2_identity import text_identity  # noqa: E402
from library.options.caching import TextPassOptions  # noqa: E402
from library.options.dataset import DatasetOptions  # noqa: E402
from library.options.group import parse_options  # noqa: E402
from library.options.model import TextEncoderOptions  # noqa: E402
from library.options.quant import TextQuantOptions  # noqa: E402
from library.options.training import PrecisionOptions  # noqa: E402
from lumina_train_network import LUMINA2  # noqa: E402


@dataclass(frozen=True)
class Options:
    """The options of this tool."""

    model: TextEncoderOptions
    precision: PrecisionOptions
    quant: TextQuantOptions
    dataset: DatasetOptions
    caching: TextPassOptions


def main() -> None:
    """Check everything that can be checked cheaply, then encode what is missing."""
    options = parse_options(Options, description=__doc__.partition("\n")[0])
    setup_logging("INFO")
    ledger = HashLedger()
    identity = text_identity(
        options.model,
        options.precision.mixed_precision,
        ledger,
        quant=options.quant.text_encoder_quant,
    )
    datasets = load_datasets(options.dataset, stride=LUMINA2.pixel_stride)
    manifest = scan(datasets, skip_bad_images=options.dataset.skip_bad_images, ledger=ledger)
    ledger.save()
    fill(options, manifest, identity)


def fill(options: Options, manifest: Manifest, identity: str) -> None:
    """Run the pass; torch is imported here."""
    from library.core.device import dtype_named
    from library.core.dist import Processes
    from library.data.batch import Condition
    from library.data.prompt import Prompt
    from library.data.sources import CachePlace, TextSource
    from library.training.caching import PassRun, cache_texts

    processes, model, caching = Processes.start(), options.model, options.caching
    setup_logging("INFO", is_main=processes.is_main)
    tokenizer = load_gemma2_tokenizer(model.gemma2, model.gemma2_tokenizer, model.tokenizer_cache_dir)

    def load_encoder():
        from library.models.gemma2 import encode_prompts, load_gemma2

        dtype = dtype_named(options.precision.mixed_precision)
        encoder = load_gemma2(
            model.gemma2,
            device=processes.device,
            dtype=dtype,
            quant=options.quant,
        )

        def encode(prompts: list[Prompt]) -> list[Condition]:
            texts = [prompt.text for prompt in prompts]
            return encode_prompts(
                encoder, tokenizer, texts, model.gemma2_max_token_length, batch_size=len(texts)
            )

        return encode

    source = TextSource(
        CachePlace(True, caching.cache_directory, caching.cache_dtype),
        identity,
        max_variants=caching.max_caption_variants,
        prompt_of=partial(format_prompt, model.system_prompt),
    )
    run = PassRun(
        caching.text_encoder_batch_size,
        processes.rank,
        processes.world,
        processes.barrier,
        device=processes.device,
    )
    cache_texts(source, manifest.items, load_encoder, run, length=tokenizer.count)


if __name__ == "__main__":
    run_script(main)
