"""Python runs this first in every process whose path has this directory: each write of data waits a little."""

import os
import time

from upcycle import files

_write_all = files.write_all
_seconds = float(os.environ["SECONDS_BEFORE_WRITE"])


def _slowly(descriptor, data, path):
    time.sleep(_seconds)
    _write_all(descriptor, data, path)


files.write_all = _slowly
