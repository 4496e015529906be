"""Triton kernels where there is no GPU: they compute what they should, compile for GPUs, and are refused."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError, MissingPackageError
from library.nn.kernels import fused, replace_parts, uses_triton
from library.nn.packing import Packing
from library.nn.triton_kernels import choice as kernel_choice
from library.nn.triton_kernels.choice import use_fused_kernels

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"
}  # fmt: skip
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
    from library.nn.triton_kernels import layers as triton_layers
    from library.nn.triton_kernels import modulated as triton_modulated

    found = []

    def launch(kernel, grid, *inputs, **constants):
        assert min(grid) > 0 and all(size < 2**16 for size in grid[1:])
        found.append((kernel, inputs, constants))

    monkeypatch.setattr(triton_layers, "launch", launch)
    monkeypatch.setattr(triton_modulated, "launch", launch)
    return found


def run_all(dtype, width, head_dim, device="meta", learnt=True):
    """Call every function, forward and backward; return each result with its inputs and their gradients.

    Gains get gradients if they are `learnt`.
    """
    from library.nn.triton_kernels import layers as triton_layers
    from library.nn.triton_kernels import modulated as triton_modulated

    def leaf(*shape, dtype=torch.float32, wanted=True):
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=wanted)

    packing = Packing.of((300, 212), torch.device(device))
    x, stream = (leaf(512, width, dtype=dtype) for _ in range(2))
    gain, shift = (leaf(2, width, wanted=learnt) for _ in range(2))
    heads, table = leaf(512, 30, head_dim, dtype=dtype), leaf(512, head_dim // 2, 2)
    head_gain = leaf(24, head_dim, wanted=learnt)
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
        wanted = [x for x in inputs if x.requires_grad]
        yield output, wanted, torch.autograd.grad(output, wanted, torch.empty_like(output))
    values = []
    grads = triton_layers.swiglu_back((x, stream), torch.empty_like(x), lambda y, _: values.append(y))
    yield values[0], [x, stream], grads


@with_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_the_meta_device(dtype):
    """Where a GPU's memory is planned: nothing is launched, and all shapes and dtypes are right."""
    for output, inputs, grads in run_all(dtype, 48, 12):
        assert output.is_meta and output.dtype == dtype
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in inputs]


@with_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "head_dim", "learnt"),
    [
        (80, torch.bfloat16, 2304, 96, True),
        (89, torch.float32, 192, 48, False),
        (90, torch.bfloat16, 2560, 128, True),
        (120, torch.float16, 4096, 128, False),
    ],
)
def test_they_compile_for_gpus(launches, monkeypatch, tmp_path, capability, dtype, width, head_dim, learnt):
    """Down to machine code, without a GPU, as they are launched for the models' widths."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    list(run_all(dtype, width, head_dim, learnt=learnt))
    compiled = {}
    for kernel, inputs, constants in launches:
        what = (kernel.__name__, *(x is None for x in inputs))
        if what not in compiled:
            options = {"num_warps": constants.get("num_warps", 4), "enable_fp_fusion": True}
            source, target = as_source(kernel, inputs, constants), GPUTarget("cuda", capability, 32)
            compiled[what] = triton.compile(source, target=target, options=options)
    assert (
        len({name for name, *_ in compiled}) == 10 and len(compiled) == 12
    )  # a stream or none, a value or none
    for what, binary in compiled.items():
        assert f".target sm_{capability}" in binary.asm["ptx"] and binary.asm["cubin"], what
        assert "ld.global.v" in binary.asm["ptx"] or ".v4.b32" in binary.asm["ptx"], (
            f"{what} reads one by one"
        )
        assert binary.metadata.shared <= 48 * 1024, what
        assert spilled(binary.asm["cubin"], tmp_path) == 0, what


def spilled(machine_code, folder):
    """How many bytes a thread keeps in memory for want of registers."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(machine_code)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


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


@with_triton
def test_a_launch_is_on_the_device_of_its_first_input(monkeypatch):
    """Triton launches on the current one, which need not be that of the tensors."""
    from library.nn.triton_kernels import launch as triton_launch

    launched, current = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *inputs, **constants: launched.append((grid, list(current)))

    @contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.clear()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.ones(2)
    triton_launch.launch(Kernel(), (3, 1), x, 5, WIDTH=2)
    triton_launch.launch(Kernel(), (0, 1), x)  # nothing to do
    triton_launch.launch(Kernel(), (3, 1), x.to("meta"))
    assert len(launched) == 1 and launched[0][0] == (3, 1) and launched[0][1][0] is x


# ---- the choice ----


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have a compiler and a GPU of the Ampere generation that runs kernels. No choice stays."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(kernel_choice, "_differing_parts", lambda *_: [])
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield monkeypatch
    replace_parts("torch")


@with_triton
@pytest.mark.parametrize("wanted", ["triton", "auto"])
def test_the_choice_is_for_all_parts_and_can_be_taken_back(gpu, wanted):
    parts = ("scaled_rms_norm", "normed_residual", "swiglu", "swiglu_back", "norm_and_rotate")
    parts += ("modulated_layer_norm", "gated_residual")
    assert use_fused_kernels(wanted, CUDA, BF16) is None and uses_triton()
    assert all(fused(name, min).__module__.startswith("library.nn.triton_") for name in parts)
    assert fused("gelu", min) is min
    assert use_fused_kernels("torch", CUDA, BF16) is None and not uses_triton()
    assert all(fused(name, min) is min for name in parts)


@with_triton
def test_a_part_that_is_compiled_stays_as_it_is(gpu):
    use_fused_kernels("triton", CUDA, BF16)
    part = torch.compile(lambda x: fused("swiglu", torch.neg)(x), backend="eager", fullgraph=True)
    assert torch.equal(part(torch.ones(3)), -torch.ones(3))


def test_a_cpu_has_none_and_need_not_say_so():
    assert use_fused_kernels("auto", CPU, BF16) is None and not uses_triton()
    with pytest.raises(ConfigError, match="its kernels need an NVIDIA GPU, and this run is on cpu"):
        use_fused_kernels("triton", CPU, BF16)


def refused(part_of_sentence):
    """Asked for, they are refused; otherwise torch's are chosen, and the reason is told."""
    with pytest.raises(
        ConfigError, match=f"--fused_kernels triton cannot be used: .*{part_of_sentence}"
    ) as told:
        use_fused_kernels("triton", CUDA, BF16)
    assert "\n" not in str(told.value) and not uses_triton()
    assert re.search(part_of_sentence, use_fused_kernels("auto", CUDA, BF16)) and not uses_triton()


def test_refused_where_something_is_missing(gpu):
    gpu.setattr(importlib.util, "find_spec", lambda name: name)
    gpu.setattr(shutil, "which", lambda _: None)
    refused("C compiler")
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    refused("Pretended GPU is older")
    gpu.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match="--fused_kernels triton needs the package 'triton'"):
        use_fused_kernels("triton", CUDA, BF16)
    assert "pip install triton" in use_fused_kernels("auto", CUDA, BF16) and not uses_triton()


@with_triton
def test_a_compiler_may_be_named(gpu):
    gpu.setattr(shutil, "which", lambda _: None)
    gpu.setenv("CC", "/opt/bin/cc")
    assert use_fused_kernels("auto", CUDA, BF16) is None and uses_triton()


@with_triton
@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, "gcc"),
        AssertionError("libcuda.so cannot found!\nPossible files are located at"),
        PermissionError(13, "Permission denied", "/root/.triton"),
        ImportError(),
        KeyError("Keyword argument enable_fp_fusion was specified but unrecognised"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_refused_where_a_kernel_cannot_be_built(gpu, error):
    """At the start, in one sentence, and not from the middle of the first step."""

    def fail(*_):
        raise error

    gpu.setattr(kernel_choice, "_differing_parts", fail)
    refused("cannot build or run its kernels on Pretended GPU .*python3-dev")


def test_refused_where_the_package_cannot_be_imported(gpu):
    """As on Windows, where a library of its may be missing."""
    gpu.setattr(importlib.util, "find_spec", lambda name: name)
    gpu.setenv("CC", "/opt/bin/cc")
    gpu.setitem(sys.modules, "triton", types.ModuleType("triton"))
    refused("package triton is installed and cannot be imported .*TritonError")


@with_triton
def test_a_gpu_that_a_kernel_has_broken_is_not_used_for_torch_s(gpu):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu.setattr(kernel_choice, "_differing_parts", broken)
    gpu.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        use_fused_kernels("auto", CUDA, BF16)


@with_triton
def test_refused_where_kernels_do_not_compute_what_torch_does(gpu):
    gpu.setattr(kernel_choice, "_differing_parts", lambda *_: ["swiglu", "gated_residual"])
    refused(r"on Pretended GPU its kernels differ from torch's \(swiglu, gated_residual\)")


@with_triton
def test_its_interpreter_has_to_be_asked_for(gpu):
    gpu.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in use_fused_kernels("auto", CUDA, BF16) and not uses_triton()
    assert use_fused_kernels("triton", CUDA, BF16) is None and uses_triton()


def test_triton_is_not_imported_unless_it_is_chosen():
    code = (
        "import sys, library.models.nextdit, library.models.kandinsky5_dit\n"
        "from library.nn.triton_kernels.choice import use_fused_kernels\nimport torch\n"
        "use_fused_kernels('auto', torch.device('cpu'), torch.bfloat16)\n"
        "sys.exit('library.nn.triton_kernels.launch' in sys.modules or 'triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
