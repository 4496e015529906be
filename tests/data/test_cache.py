"""Cache entries come back bit for bit, and a change of any one byte of their files is noticed."""

import os
import random
import stat
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.core.errors import DataError, StorageError
from library.core.hashing import sha256_text
from library.data.cache import CacheStore

KEY = sha256_text("an entry")


def some_tensors():
    torch.manual_seed(0)
    return {"latents": torch.randn(4, 6, 5).bfloat16(), "mask": torch.rand(6, 5), "empty": torch.zeros(0, 3)}


def written(directory, tensors=None, about="cat.jpg"):
    store = CacheStore(directory)
    store.write(KEY, tensors or some_tensors(), about)
    return store


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_an_entry_comes_back_bit_for_bit(tmp_path):
    store = written(tmp_path)
    assert_same(store.read(KEY), some_tensors())
    assert_same(CacheStore(tmp_path).read(KEY), some_tensors())


def test_views_and_transposed_tensors_come_back_too(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"row": base[1], "turned": base.transpose(0, 2)}
    assert_same(written(tmp_path, tensors).read(KEY), tensors)


def test_a_read_tensor_owns_its_memory(tmp_path):
    store = written(tmp_path)
    store.read(KEY)["latents"].zero_()
    assert_same(store.read(KEY), some_tensors())


@settings(max_examples=40, deadline=None)
@given(about=st.text(st.characters(exclude_categories=())))
def test_any_description_can_be_kept(tmp_path_factory, about):
    store = written(tmp_path_factory.mktemp("cache"), about=about)
    assert store.check(KEY)
    assert_same(store.read(KEY), some_tensors())


def test_a_description_that_looks_like_a_digest_confuses_nobody(tmp_path):
    store = written(tmp_path, about='"sha256":"' + "0" * 64 + '"')
    assert CacheStore(tmp_path).check(KEY)
    assert_same(store.read(KEY), some_tensors())


def test_what_is_not_there_is_not_found(tmp_path):
    store = CacheStore(tmp_path / "nowhere")
    assert not store.check(KEY)
    assert store.find(KEY) is None
    with pytest.raises(DataError, match="has gone"):
        store.read(KEY)


def test_every_flipped_byte_is_noticed(tmp_path):
    path = written(tmp_path).path(KEY)
    good = path.read_bytes()
    draw = random.Random(0)
    positions = set(range(300)) | {draw.randrange(len(good)) for _ in range(700)}
    for position in positions:
        damaged = bytearray(good)
        damaged[position] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        assert CacheStore(tmp_path).find(KEY) is None, position
    path.write_bytes(good)
    assert_same(CacheStore(tmp_path).find(KEY), some_tensors())


def test_a_truncated_or_lengthened_entry_is_noticed(tmp_path):
    path = written(tmp_path).path(KEY)
    good = path.read_bytes()
    for size in [*range(0, 80), *range(80, len(good), 37), len(good) - 1]:
        path.write_bytes(good[:size])
        assert not CacheStore(tmp_path).check(KEY), size
    path.write_bytes(good + b"\0")
    assert not CacheStore(tmp_path).check(KEY)


def test_a_verified_entry_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    written(tmp_path).remember()
    store = CacheStore(tmp_path)
    reads = []
    monkeypatch.setattr("library.data.cache._read_file", lambda path: reads.append(path) or b"")
    assert store.check(KEY)
    assert reads == []
    time.sleep(0.01)
    store.path(KEY).write_bytes(store.path(KEY).read_bytes())
    assert not store.check(KEY)
    assert reads == [store.path(KEY)]


def test_damage_in_the_middle_of_a_run_names_the_file_and_removes_it(tmp_path):
    store = written(tmp_path)
    path = store.path(KEY)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=path.name):
        store.read(KEY)
    assert not path.exists()
    assert not CacheStore(tmp_path).check(KEY)


def test_a_damaged_list_of_verified_entries_just_means_reading_them(tmp_path):
    written(tmp_path).remember()
    for content in ("", "[1]", "{", "\0\xff"):
        (tmp_path / "verified.json").write_text(content, encoding="latin-1")
        assert CacheStore(tmp_path).check(KEY)


def test_two_stores_add_to_the_same_list(tmp_path):
    first, second = CacheStore(tmp_path), CacheStore(tmp_path)
    keys = [sha256_text("first"), sha256_text("second")]
    for store, key in zip((first, second), keys, strict=True):
        store.write(key, some_tensors(), "")
    for store in (first, second):
        store.remember()
    content = (tmp_path / "verified.json").read_text()
    assert all(key in content for key in keys)


def test_files_lie_in_subfolders_with_the_modes_of_the_umask(tmp_path):
    path = written(tmp_path).path(KEY)
    assert path == tmp_path / KEY[:2] / f"{KEY}.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask_of(tmp_path)


def _umask_of(directory):
    probe = directory / "probe"
    probe.touch()
    return 0o666 & ~stat.S_IMODE(probe.stat().st_mode)


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path):
    store = written(tmp_path)
    old, young = store.path(KEY).parent / ".tmp-old", store.path(KEY).parent / ".tmp-young"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    store.remember()
    assert not old.exists()
    assert young.exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    store = CacheStore(blocked)
    assert not store.check(KEY)
    with pytest.raises(StorageError, match="blocked"):
        store.write(KEY, some_tensors(), "")
