"""SHA-256 of files, in the background. Knows the standard library only."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(files: Sequence[Path]) -> Future[dict[str, str]]:
    """Hash files in a background thread, which ends with the process rather than holding it open.

    Args:
        files: the files to hash.

    Returns:
        A future of the hashes by path relative to the files' common directory (the name, within one directory);
        its `result()` raises what reading raised (OSError).
    """
    future: Future[dict[str, str]] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
            future.set_result({file.relative_to(root).as_posix(): sha256_file(file) for file in files})
        except Exception as error:  # whatever it was belongs to who waits: a future must always end
            future.set_exception(error)

    threading.Thread(target=work, name="upcycle-sha256", daemon=True).start()
    return future
