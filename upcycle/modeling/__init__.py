"""The generic `upcycled_moe` model and the paths of its two code files, which travel inside converted checkpoints."""

from pathlib import Path

REMOTE_CODE_FILES: tuple[Path, ...] = tuple(
    Path(__file__).with_name(name) for name in ("configuration_upcycled_moe.py", "modeling_upcycled_moe.py")
)
