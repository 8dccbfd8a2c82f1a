"""Tab completion: names of commands for the first word, Hydra's completion of that command's options after it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from upcycle.options.arguments import CONF, MULTIRUN

if TYPE_CHECKING:
    from collections.abc import Collection

FLAGS = ("--help", "--cfg", "--multirun")
LINE = "COMP_LINE"


def complete(commands: Collection[str]) -> None:
    """Answer `upcycle -sc install=bash`, and the shell's `-sc query=bash` with the line so far in COMP_LINE."""
    line = os.environ.get(LINE, "")
    words = line.split()
    if not any(argument.startswith("query") for argument in sys.argv):
        _ask_hydra("convert", line)
    elif len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(commands))
    elif words[-1].startswith("-") and not line.endswith(" "):
        print(" ".join(FLAGS))
    elif words[1] in commands:
        # Hydra's parser of flags would print its usage into the user's line; of them only -m changes what may follow.
        kept = [words[0], *(word for word in words[2:] if word in MULTIRUN or not word.startswith("-"))]
        try:
            _ask_hydra(words[1], " ".join(kept) + (" " if line.endswith(" ") else ""))
        except (HydraException, OmegaConfBaseException):
            return  # a line that cannot be read yet has no completions


def _ask_hydra(command: str, line: str) -> None:
    os.environ[LINE] = line
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)(lambda _composed: None)()
