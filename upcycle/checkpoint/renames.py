"""Whether a file system renames a directory in one step, as a complete-or-absent output needs. Knows paths only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from upcycle.errors import OutputError
from upcycle.files import output_errors


def check_renames(output: Path) -> None:
    """Check by trying it, with an empty file in an empty directory, beside the output that is to be made.

    A file system that copies and deletes instead gives the copy another inode. Object stores mounted as directories do
    that, or cannot rename directories at all.

    Raises:
        OutputError: it does not, or nothing can be written there.
    """
    with output_errors(output):
        place = next(parent for parent in output.parents if parent.exists())
        probe = tempfile.TemporaryDirectory(prefix=".upcycle-probe-", dir=place)
    with probe:
        before, after = Path(probe.name) / "before", Path(probe.name) / "after"
        with output_errors(output):
            before.mkdir()
            (before / "file").touch()
            made = [each.stat() for each in (before, before / "file")]
        try:
            before.rename(after)
            renamed = [each.stat() for each in (after, after / "file")]
        except OSError as error:
            raise _not_in_one_step(place, error.strerror or str(error)) from error
        if before.exists() or not all(map(os.path.samestat, made, renamed)):
            raise _not_in_one_step(place, "a copy")


def _not_in_one_step(place: Path, found: str) -> OutputError:
    return OutputError(
        f"the file system of {place} cannot rename a directory in one step",
        found=found,
        expected="a rename, so that the output is there complete or not at all",
        remedy="choose an output on a local disk or a POSIX file system, and copy it from there",
    )
