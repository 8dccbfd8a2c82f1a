"""The generic `upcycled_moe` model and the paths of its code files, which travel inside converted checkpoints."""

from pathlib import Path

REMOTE_CODE_FILES: tuple[Path, ...] = tuple(
    Path(__file__).with_name(f"{part}_upcycled_moe.py") for part in ("configuration", "modeling", "selection")
)
