"""The front door: the command `upcycle`. Nobody imports it."""

from upcycle.cli.app import main

__all__ = ["main"]
