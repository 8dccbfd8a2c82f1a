"""Writing: the bytes, what may be replaced, what may be resumed, and every failure of the file system."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from upcycle.checkpoint import Staging, TensorSpec, dtype_code, index_json, layout_shards, open_reader
from upcycle.checkpoint import staged as staged_module
from upcycle.errors import OutputError, SourceError


def specs_of(tensors):
    return [TensorSpec(name=n, dtype=dtype_code(t.dtype), shape=tuple(t.shape)) for n, t in tensors.items()]


def start(output, *, fingerprint="f", overwrite=False, resume=False):
    return Staging.open(output, fingerprint=fingerprint, overwrite=overwrite, resume=resume)


def rows(tensors):
    return lambda spec: tensors[spec.name].split(2) if tensors[spec.name].dim() else [tensors[spec.name]]


def write(output, tensors, limit=10**9, **flags):
    with start(output, **flags) as staging:
        shards = layout_shards(specs_of(tensors), limit)
        for shard in shards:
            staging.write_shard(shard, rows(tensors), lambda _: None)
        staging.write_text("model.safetensors.index.json", index_json(shards))
        staging.write_text("config.json", "{}")
        staging.commit()
    return shards


def old_model(path, name="config.json"):
    path.mkdir()
    (path / name).write_text("old")
    return path


@pytest.mark.parametrize("limit", [1, 60, 10**9])
def test_safetensors_reads_what_was_written(tmp_path, tensors, limit):
    output = tmp_path / "deep" / "out"
    shards = write(output, tensors, limit)
    read = {name: value for shard in shards for name, value in load_file(output / shard.file).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())
    with safe_open(output / shards[0].file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert open_reader(output).tensors.keys() == tensors.keys()
    assert sorted(path.name for path in output.parent.iterdir()) == ["out"]
    names = {"config.json", "model.safetensors.index.json", *(shard.file for shard in shards)}
    assert {path.name for path in output.iterdir()} == names


def test_every_tensor_lies_aligned(tensors):
    (shard,) = layout_shards(specs_of(dict(reversed(tensors.items()))), 10**9)
    assert len(shard.header()) % 8 == 0
    begin = 0
    for spec in shard.stored_order():
        assert begin % torch.empty((), dtype=staged_module.torch_dtype(spec.dtype)).element_size() == 0
        begin += spec.nbytes


def test_progress_counts_every_byte_in_small_pieces(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(staged_module, "PIECE_BYTES", 16)
    (shard,) = layout_shards(specs_of(tensors), 10**9)
    seen = []
    with start(tmp_path / "out") as staging:
        staging.write_shard(shard, lambda spec: [tensors[spec.name]], seen.append)
    assert sum(seen) == shard.nbytes
    assert max(seen) == 16


@pytest.mark.parametrize(
    "chunks",
    [[torch.ones(3)], [torch.ones(2), torch.ones(3)], [torch.ones(4).double()], [torch.ones(8)[::2]]],
    ids=["short", "long", "dtype", "strided"],
)
def test_wrong_chunks_are_refused(tmp_path, chunks):
    (shard,) = layout_shards([TensorSpec(name="w", dtype="F32", shape=(4,))], 10**9)
    with start(tmp_path / "out") as staging:
        with pytest.raises(AssertionError, match="^w: "):
            staging.write_shard(shard, lambda _: chunks, lambda _: None)
        assert not staging.has(shard)


def test_a_file_has_its_name_only_when_complete(tmp_path, tensors):
    (shard,) = layout_shards(specs_of(tensors), 10**9)
    with start(tmp_path / "out") as staging:
        path = staging.directory / shard.file
        seen = []
        staging.write_shard(shard, rows(tensors), lambda _: seen.append(path.exists()))
        assert seen
        assert not any(seen)
        assert path.exists()


def test_starting_again_forgets_the_earlier_run(tmp_path, tensors):
    interrupted(tmp_path / "out", tensors, fingerprint="a much longer one")
    shards = interrupted(tmp_path / "out", tensors, overwrite=True)
    with start(tmp_path / "out", resume=True) as staging:
        assert staging.has(shards[0])


def test_nothing_appears_before_commit(tmp_path):
    output = tmp_path / "out"
    with start(output) as staging:
        staging.write_text("config.json", "{}")
        assert not output.exists()


def test_copy_file(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"\0\1" * 1000)
    with start(tmp_path / "out") as staging:
        staging.copy_file(source, "sub/copy")
        with pytest.raises(SourceError, match="cannot read .*nothing"):
            staging.copy_file(tmp_path / "nothing", "x")
        staging.commit()
    assert (tmp_path / "out" / "sub" / "copy").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["../x", "/x"])
def test_names_stay_inside(tmp_path, name):
    with start(tmp_path / "out") as staging, pytest.raises(AssertionError):
        staging.write_text(name, "")


def test_an_existing_output(tmp_path, tensors):
    output = old_model(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already\n  remedy:   replace it with overwrite=true"):
        start(output)
    write(output, tensors, overwrite=True)
    assert (output / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_keeps_the_old_output_until_commit(tmp_path):
    output = old_model(tmp_path / "out")
    with start(output, overwrite=True) as staging:
        staging.write_text("config.json", "new")
        assert (output / "config.json").read_text() == "old"


def test_overwrite_spares_what_is_no_checkpoint(tmp_path):
    with pytest.raises(OutputError, match="something else than a model checkpoint(.|\n)*thesis.tex"):
        start(old_model(tmp_path / "out", "thesis.tex"), overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        start(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"w": torch.ones(1)}, overwrite=True)


def test_an_output_that_appears_meanwhile_is_spared(tmp_path):
    with start(tmp_path / "out") as staging:
        old_model(tmp_path / "out")
        with pytest.raises(OutputError, match="exists already"):
            staging.commit()
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def interrupted(output, tensors, **flags):
    shards = layout_shards(specs_of(tensors), 1)
    with start(output, **flags) as staging:
        staging.write_shard(shards[0], rows(tensors), lambda _: None)
    return shards


def test_an_interrupted_run_must_be_resumed_or_dropped(tmp_path, tensors):
    output = tmp_path / "out"
    shards = interrupted(output, tensors)
    with pytest.raises(OutputError, match="resume=true, or start again with overwrite=true"):
        start(output)
    with pytest.raises(OutputError, match="other settings or another source\n  found:    fingerprint f\n.*print g"):
        start(output, fingerprint="g", resume=True)
    with start(output, resume=True) as staging:
        assert [staging.has(shard) for shard in shards] == [True, *[False] * (len(shards) - 1)]
    with start(output, fingerprint="g", overwrite=True) as staging:
        assert not staging.has(shards[0])
    with start(output, fingerprint="g", overwrite=True, resume=True) as staging:
        assert not staging.has(shards[0])


def test_resume_drops_incomplete_files(tmp_path, tensors):
    interrupted(tmp_path / "out", tensors)
    draft = tmp_path / ".out.partial" / "model.safetensors.tmp"
    draft.touch()
    start(tmp_path / "out", resume=True).close()
    assert not draft.exists()


def test_a_shard_of_another_size_is_not_taken(tmp_path, tensors):
    shards = interrupted(tmp_path / "out", tensors)
    with (tmp_path / ".out.partial" / shards[0].file).open("ab") as stream:
        stream.write(b"x")
    with start(tmp_path / "out", resume=True) as staging:
        assert not staging.has(shards[0])


@pytest.mark.parametrize("control", [None, "", "[]"])
def test_resume_without_a_record_starts_again(tmp_path, tensors, control, caplog):
    shards = interrupted(tmp_path / "out", tensors)
    record = tmp_path / ".out.partial" / ".upcycle-staging.json"
    record.unlink() if control is None else record.write_text(control)
    with caplog.at_level(logging.INFO, "upcycle"), start(tmp_path / "out", resume=True) as staging:
        assert not staging.has(shards[0])
    assert "starting from the beginning" in caplog.text


def test_resume_without_a_partial(tmp_path, tensors, caplog):
    with caplog.at_level(logging.INFO, "upcycle"):
        write(tmp_path / "out", tensors, resume=True)
    assert "nothing to resume" in caplog.text


def test_one_writer_at_a_time(tmp_path):
    with start(tmp_path / "out"):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match="another process is writing"):
                start(tmp_path / "out", **flags)
    start(tmp_path / "out", resume=True).close()


def test_a_killed_replacement_is_undone_or_finished(tmp_path, caplog):
    output, old = tmp_path / "out", tmp_path / ".out.old"
    old_model(old)
    with caplog.at_level(logging.INFO, "upcycle"), pytest.raises(OutputError, match="exists already"):
        start(output)
    assert "restored" in caplog.text
    assert (output / "config.json").read_text() == "old"
    old_model(old)
    start(output, overwrite=True).close()
    assert not old.exists()
    assert output.exists()


def test_a_failing_rename_restores_the_old_output(tmp_path, monkeypatch):
    output = old_model(tmp_path / "out")
    rename = Path.rename

    def failing(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with start(output, overwrite=True) as staging:
        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OutputError, match="Input/output error"):
            staging.commit()
    assert (output / "config.json").read_text() == "old"


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose an output whose parent is a directory"):
        start(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EACCES, "may write to"), (errno.EROFS, "writable file system"), (errno.ENOSPC, "then resume")],
)
def test_the_file_system_refuses(tmp_path, tensors, monkeypatch, code, remedy):
    def refuse(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OutputError, match=remedy):
            start(tmp_path / "out")
    (shard,) = layout_shards(specs_of(tensors), 10**9)
    with start(tmp_path / "out") as staging, monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(OutputError, match=remedy):
            staging.write_shard(shard, rows(tensors), lambda _: None)
        assert not staging.has(shard)


def test_a_full_disk():
    with pytest.raises(OutputError, match="No space left on device(.|\n)*free space"):
        staged_module.write_all(os.open("/dev/full", os.O_WRONLY), b"x", Path("/dev/full"))


def test_an_error_of_the_source_is_not_the_outputs(tmp_path, tensors):
    def failing(_spec):
        raise OSError("the source's own")

    (shard,) = layout_shards(specs_of(tensors), 10**9)
    with start(tmp_path / "out") as staging, pytest.raises(OSError, match="the source's own"):
        staging.write_shard(shard, failing, lambda _: None)
