"""Triton kernels where there is no GPU: they compute what they should, compile for GPUs, and are refused."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError, MissingPackageError
from library.nn import kernels
from library.nn.kernels import fused, use_fused_kernels
from library.nn.packing import Packing

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@with_triton
def test_they_agree_with_the_plain_functions():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("triton_in_interpreter.py"))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout


@pytest.fixture
def launches(monkeypatch):
    """What the functions launch: kernel, inputs and constants. Nothing is run."""
    from library.nn import triton_layers, triton_modulated

    found = []

    def launch(kernel, grid, *inputs, **constants):
        assert min(grid) > 0 and all(size < 2**16 for size in grid[1:])
        found.append((kernel, inputs, constants))

    monkeypatch.setattr(triton_layers, "launch", launch)
    monkeypatch.setattr(triton_modulated, "launch", launch)
    return found


def run_all(dtype, width, head_dim, device="meta"):
    """Call every function, forward and backward; return each result with its inputs and their gradients."""
    from library.nn import triton_layers, triton_modulated

    def leaf(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=True)

    packing = Packing.of((300, 212), torch.device(device))
    x, stream = (leaf(512, width, dtype=dtype) for _ in range(2))
    gain, shift = (leaf(2, width) for _ in range(2))
    heads, head_gain, table = (
        leaf(512, 30, head_dim, dtype=dtype),
        leaf(24, head_dim),
        leaf(512, head_dim // 2, 2),
    )
    calls = [
        (triton_layers.scaled_rms_norm, (x, gain), (packing, 1e-5)),
        (triton_layers.normed_residual, (stream, x, gain), (packing, 1e-5)),
        (triton_layers.swiglu, (x, stream), ()),
        (lambda h, *rest: triton_layers.norm_and_rotate(h[:, :24], *rest), (heads, head_gain), (table, 1e-6)),
        (triton_modulated.modulated_layer_norm, (x, gain, shift), (packing, 1e-5)),
        (triton_modulated.gated_residual, (stream, x, gain), (packing,)),
    ]
    for function, inputs, others in calls:
        output = function(*inputs, *others)
        yield output, inputs, torch.autograd.grad(output, inputs, torch.empty_like(output))


@with_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_the_meta_device(dtype):
    """Where a GPU's memory is planned: nothing is launched, and all shapes and dtypes are right."""
    for output, inputs, grads in run_all(dtype, 48, 12):
        assert output.is_meta and output.dtype == dtype
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in inputs]


@with_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "head_dim"),
    [(80, torch.bfloat16, 2304, 96), (89, torch.float32, 192, 48), (90, torch.bfloat16, 2560, 128)],
)
def test_they_compile_for_gpus(launches, monkeypatch, tmp_path, capability, dtype, width, head_dim):
    """Down to machine code, without a GPU, as they are launched for the models' widths."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    list(run_all(dtype, width, head_dim))
    compiled = {}
    for kernel, inputs, constants in launches:
        if kernel.__name__ not in compiled:
            options = {"num_warps": constants.get("num_warps", 4), "enable_fp_fusion": True}
            source, target = as_source(kernel, inputs, constants), GPUTarget("cuda", capability, 32)
            compiled[kernel.__name__] = triton.compile(source, target=target, options=options)
    assert len(compiled) == 10
    for name, binary in compiled.items():
        assert f".target sm_{capability}" in binary.asm["ptx"] and binary.asm["cubin"], name
        assert "ld.global.v" in binary.asm["ptx"] or ".v4.b32" in binary.asm["ptx"], (
            f"{name} reads one by one"
        )
        assert binary.metadata.shared <= 48 * 1024, name


def as_source(kernel, inputs, constants):
    """A kernel with its inputs' types, as Triton would find them out when it is launched."""
    from triton.compiler import ASTSource

    signature, values, attributes = {}, {}, {}
    for number, (name, value) in enumerate(zip(kernel.arg_names, inputs, strict=False)):
        if value is None:
            signature[name], values[name] = "constexpr", None
            continue
        by_16 = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if by_16:
            attributes[(number,)] = [["tt.divisibility", 16]]
        signature[name] = (
            POINTERS[value.dtype]
            if isinstance(value, torch.Tensor)
            else {int: "i32", float: "fp32"}[type(value)]
        )
    for name in kernel.arg_names[len(inputs) :]:
        signature[name], values[name] = "constexpr", constants[name]
    return ASTSource(kernel, signature, values, attributes)


# ---- the choice ----


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have a GPU of the Ampere generation, Triton and a compiler. No choice stays."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    yield monkeypatch
    use_fused_kernels("torch", CPU)


@with_triton
def test_the_choice_is_for_all_parts_and_can_be_taken_back(gpu):
    parts = ("scaled_rms_norm", "normed_residual", "swiglu", "norm_and_rotate")
    parts += ("modulated_layer_norm", "gated_residual")
    use_fused_kernels("triton", CUDA)
    assert all(fused(name, min).__module__.startswith("library.nn.triton_") for name in parts)
    assert fused("gelu", min) is min
    use_fused_kernels("torch", CPU)
    assert all(fused(name, min) is min for name in parts)


@with_triton
def test_a_part_that_is_compiled_stays_as_it_is(gpu):
    use_fused_kernels("triton", CUDA)
    part = torch.compile(lambda x: fused("swiglu", torch.neg)(x), backend="eager", fullgraph=True)
    assert torch.equal(part(torch.ones(3)), -torch.ones(3))


def test_refused_on_a_cpu():
    with pytest.raises(
        ConfigError, match="--fused_kernels triton needs an NVIDIA GPU, and this run is on cpu"
    ):
        use_fused_kernels("triton", CPU)


def test_refused_where_something_is_missing(gpu):
    gpu.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match="--fused_kernels triton needs the package 'triton'"):
        use_fused_kernels("triton", CUDA)
    gpu.setattr(importlib.util, "find_spec", lambda name: name)
    gpu.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="needs a C compiler"):
        use_fused_kernels("triton", CUDA)
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ConfigError, match="Pretended GPU is older"):
        use_fused_kernels("triton", CUDA)
    assert not kernels._replaced


def test_triton_is_not_imported_unless_it_is_chosen():
    code = (
        "import sys, library.models.nextdit, library.models.kandinsky5_dit\n"
        "from library.nn.kernels import use_fused_kernels\nimport torch\n"
        "use_fused_kernels('torch', torch.device('cpu'))\n"
        "sys.exit('library.nn.triton_launch' in sys.modules or 'triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
