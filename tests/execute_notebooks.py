"""Executes notebooks: `python tests/execute_notebooks.py [NAME ...]` writes them with outputs."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
VARIES = "varies"
"""The tag of cells whose output is another one with each version of Python, or on each machine."""
_ENVIRONMENT = {
    # Progress bars are for those who wait.
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


class Text(NamedTuple):
    """The text of one output of a cell, and what kind of text it is."""

    kind: str
    text: str


def read(path: Path) -> Any:
    """A notebook, as committed."""
    return nbformat.read(path, as_version=4)


def execute(path: Path, timeout: int = 300) -> Any:
    """The notebook with fresh outputs; raises as soon as a cell does."""
    notebook = read(path)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
    )
    client.execute(env={**os.environ, **_ENVIRONMENT})
    for cell in code_cells(notebook):
        cell.outputs = list(_joined(cell.outputs))
    # Without the version of Python, which no reader needs.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _joined(outputs: list[Any]) -> Iterator[Any]:
    """The outputs, with what is printed in one go as one: a kernel sends it in pieces, by time."""
    last = None
    for output in outputs:
        is_stream = output.output_type == "stream"
        if last is not None and is_stream and output.name == last.name:
            last.text += output.text
        else:
            yield output
            last = output if is_stream else None


def code_cells(notebook: Any) -> list[Any]:
    """The cells that can have outputs."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def varies(cell: Any) -> bool:
    """Whether a cell is marked as one whose output may differ."""
    return VARIES in cell.metadata.get("tags", [])


def texts(cell: Any) -> Iterator[Text]:
    """Everything that is text in the outputs of a cell."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield Text(output.name, output.text)
        elif output.output_type == "error":
            yield Text("error", "\n".join(output.traceback))
        else:
            for kind, text in sorted(output.data.items()):
                yield Text(kind, text if kind.startswith("text/") else "")


_FLOAT = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")


def split_floats(text: str) -> tuple[str, list[float]]:
    """The words of a text, whole numbers among them, and its other numbers."""
    return _FLOAT.sub("#", text), [float(number) for number in _FLOAT.findall(text)]


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for path in (FOLDER / f"{name}.ipynb" for name in names):
        nbformat.write(execute(path), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
