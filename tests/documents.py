"""What the tests of documents share: code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from upcycle.cli import main


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of its bash blocks, without comments."""
    lines = [line.split("  #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def between(text: str, marker: str) -> str:
    """The text between `<!-- marker -->` and `<!-- end of marker -->`."""
    return text.split(f"<!-- {marker} -->\n")[1].split(f"<!-- end of {marker} -->")[0]


def printed_by_commands(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run the commands of a text in this process, all of which have to end well; what each printed."""
    printed = []
    for line in commands(text):
        program, *words = shlex.split(line)
        assert program == "upcycle", line
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["upcycle", *words])
            with pytest.raises(SystemExit) as ended:
                main()
        shown = capsys.readouterr()
        assert not ended.value.code, f"{line}\n{shown.out}\n{shown.err}"
        printed.append(shown.out)
    return printed
