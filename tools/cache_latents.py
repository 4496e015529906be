"""Encode the pictures of a dataset ahead of training.

    python tools/cache_latents.py --ae ae.safetensors --dataset_config my_dataset.toml --mixed_precision bf16
    python tools/cache_latents.py --family kandinsky5 --vae ae.safetensors --task t2i \\
        --dataset_config my_dataset.toml --mixed_precision bf16

It takes all flags of the family's training script, and its --config_file: put the tool's name in place of the
script's, and training with --cache_latents or --cache_latents_to_disk finds every entry. Obligatory are the
dataset and --ae (of Kandinsky: --vae, and --task or --dit, which tell whether pictures have sources). Besides
them --mixed_precision, --no_half_vae, --cache_dtype and --cache_directory decide what is found;
--vae_batch_size is how many pictures are encoded together.

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
    fill_caches(read_command(__doc__, "cache_latents_to_disk"), latents=True)


if __name__ == "__main__":
    run_script(main)
