"""The room knows no models: importing it brings in neither transformers nor another room."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys, upcycle.checkpoint
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("upcycle.")}
print(sorted(rooms - {"checkpoint", "errors", "files", "options"}))
print([name for name in ("transformers", "gguf") if name in sys.modules])
"""


def test_import_directions():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
