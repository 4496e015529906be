"""A weight file that is written tensor by tensor: readable by safetensors, whole or not there."""

import errno
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from library.core.checkpoint_files import open_checkpoint
from library.core.checkpoint_writer import CheckpointPlan, PlannedTensor
from library.core.errors import NonFiniteError, StorageError
from library.core.files import sweep_leftovers

ROOT = Path(__file__).resolve().parents[2]
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16"}


def plan_of(tensors, metadata=None):
    planned = [PlannedTensor(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    return CheckpointPlan(planned, metadata or {})


def content_of(tensors):
    return lambda name: memoryview(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())


def write(path, tensors, metadata=None):
    plan_of(tensors, metadata).write(path, content_of(tensors))


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda n: n != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(NAMES))),
        max_size=6,
    ),
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3),
)
def test_safetensors_reads_what_was_written(tmp_path_factory, given_tensors, metadata):
    path = tmp_path_factory.mktemp("file") / "m.safetensors"
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in given_tensors.items()}
    write(path, tensors, metadata)
    assert same(load_file(path), tensors)
    with safe_open(path, "pt") as handle:
        assert (handle.metadata() or {}) == metadata
    assert plan_of(tensors, metadata).size == path.stat().st_size


def test_every_tensor_begins_where_its_numbers_may_be_read_in_place(tmp_path):
    """As in safetensors' own files: odd counts of two bytes go behind what has four."""
    tensors = {
        "b": torch.ones(3, dtype=torch.bfloat16),
        "a": torch.ones(5),
        "d": torch.ones(1, dtype=torch.float16),
        "c": torch.ones(2),
    }
    path = tmp_path / "m.safetensors"
    write(path, tensors, {"x": "y"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert list(header) == ["__metadata__", "a", "c", "b", "d"]
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    theirs = save(tensors, {"x": "y"})
    assert len(theirs) == len(content)
    offsets = json.loads(theirs[8 : 8 + length])
    assert {k: v["data_offsets"] for k, v in offsets.items() if k in "ac"} == {
        k: v["data_offsets"] for k, v in header.items() if k in "ac"
    }


class Bytes(bytearray):
    """Bytes whose end can be heard of."""

    __slots__ = ("__weakref__",)


def test_one_tensor_is_in_memory_at_a_time():
    """The next one is asked for when the last is written and gone."""
    log = []

    def content(name):
        made = Bytes(4 * 1000)
        log.append(f"made {name}")
        weakref.finalize(made, log.append, f"{name} gone")
        return memoryview(made)

    class Handle:
        def write(self, given):
            log.append(f"wrote {len(given)}")

    plan = CheckpointPlan([PlannedTensor(name, "F32", (1000,)) for name in "abc"], {})
    plan.write_to(Handle(), content)
    header, *rest = log
    assert header == f"wrote {plan.size - 12_000}"
    assert rest == [word for n in "abc" for word in (f"made {n}", "wrote 4000", f"{n} gone")]


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    yield path
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_the_content_raises_leaves_the_old_file(old):
    def content(name):
        if name == "b":
            raise NonFiniteError("'b' holds NaN")
        return bytes(8)

    with pytest.raises(NonFiniteError, match="'b' holds NaN"):
        CheckpointPlan([PlannedTensor(n, "F32", (2,)) for n in "abc"], {}).write(old, content)


def test_content_of_another_size_is_a_mistake_of_ours(old):
    with pytest.raises(AssertionError, match="'a' has 4 bytes instead of 8"):
        CheckpointPlan([PlannedTensor("a", "F32", (2,))], {}).write(old, lambda _: bytes(4))


def test_a_name_cannot_be_planned_twice():
    with pytest.raises(AssertionError, match="'a' is planned twice"):
        CheckpointPlan([PlannedTensor("a", "F32", (2,)), PlannedTensor("a", "F32", (2,))], {})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refusal_at_the_end_leaves_the_old_file(old, monkeypatch, call):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=r"m\.safetensors: the disk is full \(.* MiB are free\)"):
        write(old, {"a": torch.ones(3)})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
def test_a_file_that_may_not_grow_leaves_the_old_one(old):
    """The system's own refusal, as of a full disk, in the middle of a tensor."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"m\.safetensors: file too large"):
            write(old, {name: torch.ones(1000) for name in "abcdefgh"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


_DYING = """
import os
from library.core.checkpoint_writer import CheckpointPlan, PlannedTensor

def content(name):
    return bytes(400_000) if name == "a" else os._exit(9)

CheckpointPlan([PlannedTensor(n, "F32", (100_000,)) for n in "ab"], {}).write(%r, content)
"""


def test_a_killed_writer_leaves_what_the_sweep_finds(old):
    dead = subprocess.run([sys.executable, "-c", _DYING % str(old)], cwd=ROOT)
    assert dead.returncode == 9
    left = [path for path in old.parent.iterdir() if path != old]
    assert len(left) == 1 and left[0].stat().st_size >= 400_000
    assert old.read_bytes() == b"old"
    sweep_leftovers(old.parent)


def test_headers_are_read_by_our_own_reader(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, {"a": torch.ones(2, 3, dtype=torch.bfloat16)}, {"axes_dims": "[1]"})
    found = open_checkpoint(path)
    assert found.metadata == {"axes_dims": "[1]"}
    assert (found.tensors["a"].shape, found.tensors["a"].dtype) == ((2, 3), "BF16")
