"""Loading the transformer, ours against diffusers, from the same file of random weights.

    python benchmarks/load.py                       # 2.6 B parameters, bf16 file to bf16: a file of 5.2 GB
    python benchmarks/load.py --stored fp32         # fp32 file to bf16: 10.4 GB
    python benchmarks/load.py --size mid --directory /somewhere/else

The file is written to a temporary folder and deleted. Each load is a process of its own, so that its peak
of memory is its own; they take turns, and the first round, after which the system has the file in memory if
there is room for it, is not counted. "load" is wall time until the model is there; "all" adds touching every
page of the weights, which is when a memory-mapped file is really read. Imports are not counted.

Peak: the resident memory's, above what it was before the load, file pages included. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.report import (  # noqa: E402
    add_arguments,
    matmul_gflops,
    missing_packages,
    show,
    summarise,
    write,
)
from benchmarks.step_lumina import SIZES  # noqa: E402
from library.models.lumina2 import load_nextdit  # noqa: E402
from library.models.lumina2_format import NextDiTParams, parameter_shapes  # noqa: E402

DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}
CONTESTANTS = ("flow-scripts", "flow-scripts, not mapped", "diffusers")


def write_checkpoint(path: Path, params: NextDiTParams, stored: str) -> int:
    """Write random weights under their original names, a tensor at a time; return the bytes of the file."""
    name_in_file, dtype = DTYPES[stored]
    header: dict[str, object] = {}
    end = 0
    shapes = list(parameter_shapes(params))
    for name, shape in shapes:
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_in_file, "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    draw = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for _, shape in shapes:
            weight = (torch.randn(prod(shape), generator=draw) * 0.02).to(dtype)
            file.write(weight.view(torch.uint8).numpy().data)
    return path.stat().st_size


def load(contestant: str, file: Path) -> nn.Module:
    """Load the model in bf16."""
    if contestant == "diffusers":
        from diffusers import Lumina2Transformer2DModel

        return Lumina2Transformer2DModel.from_single_file(
            file, config=str(file.parent), torch_dtype=torch.bfloat16
        )
    mapped = contestant == "flow-scripts"
    return load_nextdit(file, device=torch.device("cpu"), dtype=torch.bfloat16, mmap=mapped)


def measure(contestant: str, file: Path) -> dict[str, float]:
    """Load once, in this process; return seconds, and MB of memory."""
    if contestant == "diffusers":
        from diffusers import Lumina2Transformer2DModel  # noqa: F401  (imported before the clock starts)
    Path("/proc/self/clear_refs").write_text("5")  # lowers the recorded peak to the present size
    before = _status_mb("VmRSS")
    begin = time.perf_counter()
    model = load(contestant, file)
    loaded = time.perf_counter() - begin
    for weight in model.parameters():
        weight.view(-1).view(torch.uint8)[::4096].sum()
    return {
        "load": loaded,
        "all": time.perf_counter() - begin,
        "peak": _status_mb("VmHWM") - before,
    }


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def measure_all(file: Path, contestants: tuple[str, ...], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Let processes take turns; return the figures of each contestant by kind, one a round."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds + 1):
        for name in contestants:
            command = [sys.executable, __file__, "--measure", name, "--file", str(file)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            if number:
                for kind, value in json.loads(output.splitlines()[-1]).items():
                    found[kind][name].append(value)
    return found


def write_config(folder: Path, params: NextDiTParams) -> None:
    """Write the configuration without which diffusers would ask the network for one."""
    from diffusers import Lumina2Transformer2DModel

    with torch.device("meta"):
        model = Lumina2Transformer2DModel(
            sample_size=128, patch_size=params.patch_size, in_channels=params.in_channels,
            hidden_size=params.dim, num_layers=params.n_layers, num_refiner_layers=params.n_noise_refiners,
            num_attention_heads=params.n_heads, num_kv_heads=params.n_kv_heads,
            axes_dim_rope=params.axes_dims, cap_feat_dim=params.cap_feat_dim,
        )  # fmt: skip
    model.save_config(folder)


def main() -> None:
    """Write the file, let them take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("mid", "full"), default="full", help="diffusers reads only full")
    parser.add_argument("--stored", choices=tuple(DTYPES), default="bf16", help="dtype of the file")
    parser.add_argument("--directory", help="where the temporary folder is made")
    parser.add_argument("--measure", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    add_arguments(parser, rounds=3)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.file)))
        return
    params = SIZES[args.size].params
    missing = missing_packages("diffusers")
    if missing:
        print(f"diffusers does not take part: {missing} not installed.", file=sys.stderr)
    contestants = CONTESTANTS if args.size == "full" and not missing else CONTESTANTS[:2]
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        file = Path(folder) / "lumina.safetensors"
        size = write_checkpoint(file, params, args.stored)
        if "diffusers" in contestants:
            write_config(Path(folder), params)
        found = measure_all(file, contestants, args.rounds)
    rate, results = matmul_gflops(), []
    for kind in ("load", "all"):
        title = f"{kind}, {args.size}, {args.stored} file to bf16"
        results.append(summarise(title, found[kind], contestants[-1], rate, "s"))
        show(results[-1], "load")
    title = f"peak of memory, {args.size}, {args.stored} file of {size / 2**20:.0f} MB to bf16"
    results.append(summarise(title, found["peak"], contestants[-1], rate, "MB"))
    show(results[-1], "load")
    write(results, args.json)


if __name__ == "__main__":
    main()
