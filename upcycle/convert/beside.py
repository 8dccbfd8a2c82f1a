"""Gathers what goes beside config and weights, for converted, training and exported models alike.

It comes from the model that they were made of: byte for byte, but for the class of the tokenizer where the new
model_type would have another one opened.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.checkpoint import gguf_generation, gguf_sampling, is_pointer, not_downloaded, write_gguf_tokenizer
from upcycle.errors import SourceError
from upcycle.modeling import REMOTE_CODE_FILES
from upcycle.models.auxiliary import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    auxiliary_files,
    code_references,
    left_behind,
    other_files,
    tokenizer_files,
)
from upcycle.models.load import load_tokenizer_from
from upcycle.models.tokenizer import behaviour, settle_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedTokenizerBase

    from upcycle.checkpoint import Staging

logger = logging.getLogger("upcycle")
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Files beside config and weights.

    Attributes:
        files: where each of them lies, by its name in the output.
        remarks: what a user of the tokenizer should know, a sentence each.
    """

    files: Mapping[str, Path]
    remarks: tuple[str, ...]

    def stage(self, staging: Staging, model_type: str) -> None:
        """Copy the files, and the code of a type that is this project's own.

        Raises:
            OutputError: a file cannot be written.
        """
        code = {file.name: file for file in REMOTE_CODE_FILES} if model_type == "upcycled_moe" else {}
        for name, file in {**self.files, **code}.items():
            staging.copy_file(file, name)


@contextmanager
def gathered(origin: Path | None, config: str, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Beside]:
    """Yield the files in a place of their own, until the end of the context.

    Args:
        origin: directory or GGUF file that they come from; None where there is none.
        config: text of config.json where they go.
        tokenizer: takes the place of the origin's.

    Raises:
        SourceError: with no class does the tokenizer there do what the origin's does; or a file was not downloaded.
    """
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        if origin:
            _gather(origin, directory, with_tokenizer=tokenizer is None)
        if tokenizer:
            tokenizer.save_pretrained(directory)
        remarks: tuple[str, ...] = ()
        if tokenizer_files(directory):
            (directory / CONFIG).write_text(config, encoding="utf-8")
            remarks = tuple(_settle(directory, tokenizer or origin))
        files = {file.relative_to(directory).as_posix(): file for file in sorted(directory.rglob("*"))}
        kept = {name: file for name, file in files.items() if file.is_file() and name != CONFIG}
        yield Beside(files=kept, remarks=remarks)


def left_out(origin: Path) -> list[str]:
    """What `gathered` does not take along, and nobody would expect to be in the output in another form."""
    return gguf_sampling(origin) if origin.suffix == ".gguf" else left_behind(origin)


def _gather(origin: Path, directory: Path, *, with_tokenizer: bool) -> None:
    if origin.suffix == ".gguf":
        if generation := gguf_generation(origin):
            text = json.dumps(generation, indent=2) + "\n"
            (directory / GENERATION_CONFIG).write_text(text, encoding="utf-8")
        if with_tokenizer:
            write_gguf_tokenizer(origin, directory)
        return
    for file in auxiliary_files(origin) if with_tokenizer else other_files(origin):
        if is_pointer(file):
            raise not_downloaded(file)
        target = directory / file.relative_to(origin)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _settle(directory: Path, of: PreTrainedTokenizerBase | Path | None) -> list[str]:
    """Bring the tokenizer to do what another one does; say what that took, and what nobody can say."""
    remarks = []
    code = code_references(directory)
    if code:
        remarks.append(
            f"the tokenizer has code of its own ({', '.join(code)}), which was not run here: without "
            "trust_remote_code=True transformers refuses it, or opens another one in its place"
        )
    try:
        wanted = load_tokenizer_from(of) if isinstance(of, Path) else of
    except SourceError as error:
        wanted = None
        if not code:
            reason = " ".join(str(error).split())
            remarks.append(f"the tokenizer cannot be opened here, so nothing says that it is the source's: {reason}")
    for remark in remarks:
        logger.warning("%s", remark)
    if wanted is None:
        return remarks
    named = settle_tokenizer(directory, behaviour(wanted), type(wanted).__name__)
    if named:
        remarks.append(f"{TOKENIZER_CONFIG} names {named}: by model_type alone, another tokenizer would be opened")
        logger.info("%s", remarks[-1])
    return remarks
