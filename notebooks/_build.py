"""Build the .ipynb beside every notebook's source: run it, and keep what its cells show.

``python notebooks/_build.py [name ...]``, or ``make notebooks`` for all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
LIMIT = 400_000


def sources() -> list[Path]:
    """The jupytext sources: every script here that is no helper."""
    return sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))


def build(source: Path) -> Path:
    """Run a notebook from its first cell to its last and write it with its outputs.

    Raises:
        RuntimeError: when a cell writes to stderr or the file is too large to keep.
        nbclient.exceptions.CellExecutionError: when a cell fails.
    """
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    # Without Jupyter's widgets, tqdm warns that its progress bars are plain.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    _settle(notebook, source.name)
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > LIMIT:
        raise RuntimeError(f"{source.name} shows {len(text.encode())} bytes, more than {LIMIT}: show less")
    target = source.with_suffix(".ipynb")
    target.write_text(text, encoding="utf-8")
    return target


def _settle(notebook: NotebookNode, name: str) -> None:
    """Take out what differs from run to run without meaning: cell ids, times, the interpreter's version."""
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{name} writes to stderr: {output['text']}")


if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    unknown = wanted - {path.stem for path in sources()}
    if unknown:
        sys.exit(f"no notebook {sorted(unknown)[0]!r}: choose from {', '.join(path.stem for path in sources())}")
    for path in sources():
        if not wanted or path.stem in wanted:
            built = build(path)
            print(f"{built.name}: {built.stat().st_size / 1000:.0f} kB", flush=True)
