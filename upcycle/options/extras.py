"""Packages that one command needs alone: whether they are there, and the line that installs them. Knows `errors`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from upcycle.errors import MissingPackageError

# Module -> the extra of pyproject.toml that brings it.
EXTRAS: Final = {
    "matplotlib": "plots",
    "pandas": "analysis",
    "scipy": "analysis",
    "wandb": "wandb",
    "datasets": "datasets",
    "gguf": "gguf",
    "sentencepiece": "sentencepiece",
    "google.protobuf": "sentencepiece",
    "lm_eval": "eval",
    "textblob": "reward",
    "vaderSentiment": "reward",
    "jinja2": "dashboard",
    "plotly": "dashboard",
    "wandb_workspaces": "dashboard",
}


def has(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def install_line(module: str) -> str:
    """The command that installs what brings a module of EXTRAS."""
    return f"pip install 'upcycle[{EXTRAS[module]}]'"


def need(purpose: str, *modules: str) -> None:
    """Check that modules of EXTRAS can be imported.

    Args:
        purpose: what needs them, for the message.
        modules: their names; the first one that is not there decides which extra is named.

    Raises:
        MissingPackageError: one cannot.
    """
    missing = [module for module in modules if not has(module)]
    if missing:
        raise MissingPackageError(
            f"{purpose} needs a package that is not installed",
            found=f"no {', '.join(missing)}",
            remedy=install_line(missing[0]),
        )
