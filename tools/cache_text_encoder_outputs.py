"""Encode the captions of a dataset ahead of training.

    python tools/cache_text_encoder_outputs.py --gemma2 gemma2.safetensors --dataset_config my_dataset.toml \\
        --system_prompt "You are an assistant ..." --mixed_precision bf16
    python tools/cache_text_encoder_outputs.py --family kandinsky5 --task t2i \\
        --text_encoder_qwen qwen2_5_vl --text_encoder_clip clip_l --dataset_config my_dataset.toml \\
        --mixed_precision bf16

It takes all flags of the family's training script, and its --config_file: put the tool's name in place of the
script's, and training with --cache_text_encoder_outputs or --cache_text_encoder_outputs_to_disk finds every
entry. Obligatory are the dataset and --gemma2 (of Kandinsky: --text_encoder_qwen, --text_encoder_clip, and
--task or --dit, which tell whether captions go with pictures). Besides them the other options of the text
encoder, --text_encoder_quant, --base_weights, --source_dropout_rate, --mixed_precision,
--max_caption_variants, --cache_dtype and --cache_directory decide what is found; --text_encoder_batch_size is
how many captions are encoded together.

With several GPUs, start it with `accelerate launch`: the processes share the work out.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.entry import run_script  # noqa: E402
from library.training.fill_caches import fill_caches  # noqa: E402
from tools.cache_command import read_command  # noqa: E402


def main() -> None:
    """Check everything that can be checked cheaply, then encode what is missing."""
    fill_caches(read_command(__doc__, "cache_text_encoder_outputs_to_disk"), texts=True)


if __name__ == "__main__":
    run_script(main)
