"""What is written by hand for the analysis, and W&B's server of this machine, serve these tests too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent.parent / room) for room in ("analysis", "tracking")]
