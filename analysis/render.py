"""Executes the notebooks of this directory and keeps them with their outputs, and their tables and figures alone.

    python analysis/render.py [--output DIR] [NAME ...]

DIR/rendered/NAME.ipynb is the whole notebook; DIR/results/NAME.md its text without the code, with DIR/results/figures.
What comes out depends on the records alone: no times, no random ids. Where no run of a sweep has finished, its section
ends with its introduction, which says so: there is nothing to draw or to answer.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

from upcycle.analysis.prose import NOT_RUN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nbformat import NotebookNode

HERE = Path(__file__).parent
NAMES = sorted({file.stem for file in HERE.glob("*.py")} - {Path(__file__).stem})
SECONDS_PER_CELL = 4 * 3600  # a notebook may train
COLOURS = 256  # of a picture
FIGURES = "figures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="directory for rendered/ and results/")
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    options = parser.parse_args()
    rendered, results = options.output / "rendered", options.output / "results"
    for directory in (rendered, results / FIGURES):
        directory.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        file = rendered / f"{name}.ipynb"
        notebook = render(HERE / f"{name}.py")
        nbformat.write(notebook, file)
        write_page(notebook, results, name)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


def render(source: Path) -> NotebookNode:
    """Execute a notebook in its own directory, with this interpreter.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = jupytext.read(source)
    client = NotebookClient(
        notebook,
        kernel_name="python3",  # this interpreter's
        timeout=SECONDS_PER_CELL,
        record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
    )
    client.execute()
    notebook.cells = list(_with_something_to_say(notebook.cells))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _smaller(data["image/png"])
    return notebook


def _with_something_to_say(cells: Iterable[NotebookNode]) -> Iterator[NotebookNode]:
    """Leave out what follows the introduction of a sweep that was not run, up to the next heading of that level."""
    level = silent = 0  # of the heading above, and of the one above such an introduction
    for cell in cells:
        heading = re.match("#+ ", cell["source"]) if cell["cell_type"] == "markdown" else None
        if heading:
            level = len(heading[0])
            silent = 0 if level <= silent else silent
        if not silent:
            yield cell
        if any(NOT_RUN in output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", [])):
            silent = silent or level


def write_page(notebook: NotebookNode, results: Path, name: str) -> None:
    """Write what a rendered notebook says and shows, without its code, as Markdown with pictures beside it."""
    for before in (results / FIGURES).glob(f"{name}-*.png"):
        before.unlink()
    parts, pictures = [], 0
    for cell in notebook.cells:
        if cell["cell_type"] == "markdown":
            parts.append(cell["source"])
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "text/markdown" in data:
                parts.append(data["text/markdown"])
            elif "image/png" in data:
                pictures += 1
                picture = f"{FIGURES}/{name}-{pictures}.png"
                (results / picture).write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![figure {pictures}]({picture})")
            elif "text/html" in data:  # a frame
                parts.append(data["text/html"])
    (results / f"{name}.md").write_text("\n\n".join(parts) + "\n")


def _smaller(png: str) -> str:
    """The same picture with a palette, a third of the size."""
    smaller = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(COLOURS).save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


if __name__ == "__main__":
    main()
