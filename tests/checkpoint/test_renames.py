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
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rename", "found"), [(copying, "a copy"), (refusing, "Function not implemented")])
def test_others_are_refused(rename: object, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="cannot rename a directory in one step") as refused:
        check_renames(tmp_path / "output")
    assert f"found:    {found}" in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert list(tmp_path.iterdir()) == []
