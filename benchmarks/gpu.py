"""Everything that waits for a GPU, one step after the other, in nine minutes at most: `make gpu`.

    python benchmarks/gpu.py [--only STEP ...] [--output FILE]

Each step is a script of `on_gpu/` in a process of its own with a limit of its own, so that one that hangs or dies takes
no other with it. A step that needs what is not there says what, and is skipped. The status is 0 if no step failed, 1
if one failed or ran out of time, and 2 if all of them were skipped: nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environment import environment
from rich.console import Console
from rich.table import Table

SCRIPTS = Path(__file__).parent / "on_gpu"
# Step -> seconds that it may take: 9 minutes in all.
STEPS = {
    "machine": 20,
    "ceilings": 40,
    "parity": 100,
    "experts": 160,
    "low_precision": 60,
    "fp8_linear": 40,
    "training": 110,
}
SKIPPED, NOTHING = 3, 2  # statuses, of a step and of all
LAST = 400  # characters of what a failed step printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(STEPS), choices=STEPS, metavar="STEP")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    found = {}
    for name in options.only:
        found[name] = run(name)
        print(f"{name}: {found[name]['status']}, {found[name]['seconds']:.0f} s", flush=True)
    Console().print(table(found))
    if options.output:
        options.output.write_text(json.dumps({"environment": environment(), "steps": found}, indent=2) + "\n")
    statuses = {each["status"] for each in found.values()}
    if statuses == {"skipped"}:
        return NOTHING
    return int(bool(statuses & {"failed", "out of time"}))


def run(name: str) -> dict[str, Any]:
    """What a step found: its last line, which is JSON."""
    started = time.perf_counter()
    line = [sys.executable, str(SCRIPTS / f"{name}.py")]
    try:
        ended = subprocess.run(line, capture_output=True, text=True, check=False, timeout=STEPS[name])
    except subprocess.TimeoutExpired:
        return {"status": "out of time", "why": f"{STEPS[name]} s", "seconds": time.perf_counter() - started}
    seconds = time.perf_counter() - started
    if ended.returncode == SKIPPED:
        return {"status": "skipped", "why": ended.stdout.strip(), "seconds": seconds}
    if ended.returncode:
        return {"status": "failed", "why": (ended.stderr or ended.stdout).strip()[-LAST:], "seconds": seconds}
    return {"status": "done", "found": json.loads(ended.stdout.splitlines()[-1]), "seconds": seconds}


def table(found: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="on a GPU")
    for column in ("step", "status", "what"):
        shown.add_column(column)
    for name, each in found.items():
        lines = [f"{key}: {value}" for key, value in each.get("found", {}).items()]
        shown.add_row(name, each["status"], "\n".join(lines) or each.get("why", ""))
    return shown


if __name__ == "__main__":
    sys.exit(main())
