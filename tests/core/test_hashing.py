"""Digests are remembered only while a file is unchanged."""

import hashlib
import os

from library.core.hashing import HashLedger, sha256_text


def test_ledger_reads_an_unchanged_file_once_over_two_starts(tmp_path, monkeypatch):
    image = tmp_path / "a.png"
    image.write_bytes(b"pixels")
    first = HashLedger(tmp_path / "ledger.json")
    assert first.sha256(image) == hashlib.sha256(b"pixels").hexdigest()
    first.save()
    monkeypatch.setattr("library.core.hashing.sha256_file", lambda _: 1 / 0)
    assert HashLedger(tmp_path / "ledger.json").sha256(image) == hashlib.sha256(b"pixels").hexdigest()


def test_ledger_notices_changed_content_of_equal_size(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"pixels")
    ledger = HashLedger(tmp_path / "ledger.json")
    ledger.sha256(image)
    image.write_bytes(b"PIXELS")
    os.utime(image, ns=(1, 1))
    assert ledger.sha256(image) == hashlib.sha256(b"PIXELS").hexdigest()


def test_a_damaged_ledger_means_hashing_again(tmp_path):
    (tmp_path / "ledger.json").write_text("{ not json")
    (tmp_path / "a").write_bytes(b"x")
    assert HashLedger(tmp_path / "ledger.json").sha256(tmp_path / "a") == hashlib.sha256(b"x").hexdigest()


def test_two_ledgers_keep_each_others_entries(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    one, two = HashLedger(tmp_path / "l.json"), HashLedger(tmp_path / "l.json")
    one.sha256(tmp_path / "a")
    two.sha256(tmp_path / "b")
    one.save()
    two.save()
    assert len(HashLedger(tmp_path / "l.json")._known) == 2


def test_text_digest_separates_its_parts():
    assert sha256_text("ab", "c") != sha256_text("a", "bc")
