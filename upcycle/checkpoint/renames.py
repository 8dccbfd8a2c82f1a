"""Whether a file system renames in one step, as a complete-or-absent output needs. Knows paths only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from upcycle.errors import OutputError
from upcycle.files.durable import output_errors


def check_renames(output: Path, *, links: bool = False) -> None:
    """Check by trying it, with an empty file in an empty directory, beside the output that is to be made.

    Args:
        output: what is to be made.
        links: whether links to directories are to be replaced, too, as those to checkpoints are.

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
            raise _not_in_one_step(place, "rename a directory", error.strerror or str(error)) from error
        if before.exists() or not all(map(os.path.samestat, made, renamed)):
            raise _not_in_one_step(place, "rename a directory", "a copy")
        if links:
            _check_links(place, after)


def _check_links(place: Path, directory: Path) -> None:
    """Check that a link, once it names a directory, can be made to name another by renaming a second one to it."""
    link, draft = directory.with_name("link"), directory.with_name("draft")
    try:
        link.symlink_to(directory.name)
        draft.symlink_to(".")
        draft.rename(link)
        found = os.readlink(link)
    except OSError as error:
        raise _not_in_one_step(place, "replace a link", error.strerror or str(error)) from error
    if found != "." or draft.is_symlink():
        raise _not_in_one_step(place, "replace a link", f"a link to {found}")


def _not_in_one_step(place: Path, what: str, found: str) -> OutputError:
    return OutputError(
        f"the file system of {place} cannot {what} in one step",
        found=found,
        expected="a rename, so that the output is there complete or not at all",
        remedy="choose an output on a local disk or a POSIX file system, and copy it from there",
    )
