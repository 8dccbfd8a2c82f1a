"""A process that has ended when its context is left, whatever became of the test: none is left over for the next."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, AnyStr

if TYPE_CHECKING:
    from types import TracebackType


class Ended(subprocess.Popen[AnyStr]):
    """`Popen`, killed and waited for on the way out, its pipes closed."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        super().__exit__(kind, error, traceback)
