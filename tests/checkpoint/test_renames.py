"""File systems that do not rename a directory in one step are refused before anything is written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from upcycle.checkpoint.renames import check_renames
from upcycle.errors import OutputError


def copying(before: Path, after: Path) -> Path:
    """What an object store that is mounted as a directory does."""
    shutil.copytree(before, after)
    shutil.rmtree(before)
    return after


def refusing(before: Path, after: Path) -> Path:
    raise OSError(errno.ENOSYS, "Function not implemented", str(before), None, str(after))


def test_a_posix_file_system_will_do(tmp_path: Path) -> None:
    check_renames(tmp_path / "runs" / "output")
    check_renames(tmp_path / "runs" / "output", links=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rename", "found"), [(copying, "a copy"), (refusing, "Function not implemented")])
def test_others_are_refused(rename: object, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="cannot rename a directory in one step") as refused:
        check_renames(tmp_path / "output")
    assert f"found:    {found}" in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def no_links(self: Path, target: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted", str(target), None, str(self))


def test_so_are_those_without_links_where_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "symlink_to", no_links)
    check_renames(tmp_path / "output")
    with pytest.raises(OutputError, match=r"cannot replace a link in one step\n.*Operation not permitted"):
        check_renames(tmp_path / "output", links=True)


def test_so_are_those_that_rename_what_a_link_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def following(before: Path, after: Path) -> Path:
        """What a file system does that knows names of links, but not their targets."""
        if not after.is_symlink():
            return rename(before, after)
        before.unlink()
        return after

    monkeypatch.setattr(Path, "rename", following)
    with pytest.raises(OutputError, match="found: +a link to after"):
        check_renames(tmp_path / "output", links=True)
