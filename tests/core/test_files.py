"""Files are complete or not there."""

import errno
import os
import stat

import pytest

from library.core import files
from library.core.errors import ConfigError, StorageError


def test_atomic_write_replaces_content_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "name with spaces é.safetensors"
    target.write_bytes(b"old")
    files.write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_a_failure_while_writing_keeps_the_old_file(tmp_path):
    target = tmp_path / "state.json"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic_write(target) as handle:
        handle.write(b"half")
        raise RuntimeError("interrupted")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_a_sentence_and_keeps_the_old_file(tmp_path, monkeypatch, call):
    target = tmp_path / "state.json"
    target.write_bytes(b"old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=r"state\.json: the disk is full"):
        files.write_bytes(target, b"new")
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_written_files_have_the_modes_that_the_umask_gives(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    files.write_text(tmp_path / "written", "x")
    assert stat.S_IMODE((tmp_path / "written").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "caption.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"caption.txt is not UTF-8 \(byte 3 is 0xe9\)"):
        files.read_text(tmp_path / "caption.txt", "The caption file")


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert files.read_text(tmp_path / "a.txt", "The caption file") == "hello"


def test_an_unwritable_output_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="--output_dir .*file is not a folder that can be written to"):
        files.require_writable_directory(tmp_path / "file", "--output_dir")
