"""Hashes of source files."""

from __future__ import annotations

import hashlib

import pytest

from upcycle.checkpoint import hash_files, sha256_file


def test_hashes(tmp_path):
    (tmp_path / "sub").mkdir()
    files = [tmp_path / "a", tmp_path / "sub" / "a"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 1000)
    expected = {"a": hashlib.sha256(bytes(1000)).hexdigest(), "sub/a": hashlib.sha256(b"\x01" * 1000).hexdigest()}
    assert hash_files(files).result(timeout=30) == expected
    assert hash_files(files[1:]).result(timeout=30) == {"a": expected["sub/a"]}
    assert sha256_file(files[0]) == expected["a"]
    assert hash_files([]).result(timeout=30) == {}


def test_a_missing_file_reaches_who_waits(tmp_path):
    with pytest.raises(FileNotFoundError):
        hash_files([tmp_path / "nothing"]).result(timeout=30)
