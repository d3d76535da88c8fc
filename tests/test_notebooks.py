"""The notebooks run from top to bottom, and are committed with the outputs of the present code.

Each is executed once. Whole numbers and words must be the committed ones; other numbers may differ
by rounding, as compilers differ. Cells tagged `varies` are executed, but their outputs are not
compared: they depend on what comes with Python, or on time.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from execute_notebooks import FOLDER, code_cells, execute, read, split_floats, texts, varies

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
MAX_BYTES = 300_000
MAX_CELL_LINES = 45


def test_all_notebooks_are_found() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        *("draft_heads", "linen_migration", "quickstart", "released_models", "sharding"),
        "speculative_decoding",
    ]


def explain(path: Path, index: int) -> str:
    return (
        f"{path.name}, code cell {index + 1}: the committed output is not that of the present "
        f"code. Write it again: python tests/execute_notebooks.py {path.stem}"
    )


def assert_same_texts(committed: Any, executed: Any, message: str) -> None:
    """The same kinds of outputs; the same words; numbers within rounding."""
    ours, theirs = list(texts(executed)), list(texts(committed))
    assert [text.kind for text in ours] == [text.kind for text in theirs], message
    if varies(committed):
        return
    for our, their in zip(ours, theirs, strict=True):
        our_words, our_numbers = split_floats(our.text)
        their_words, their_numbers = split_floats(their.text)
        assert our_words == their_words, message
        np.testing.assert_allclose(our_numbers, their_numbers, rtol=2e-3, err_msg=message)


@pytest.mark.slow
@BY_NAME
def test_notebook_shows_what_the_code_does(path: Path) -> None:
    committed = code_cells(read(path))
    executed = code_cells(execute(path))
    for index, (before, now) in enumerate(zip(committed, executed, strict=True)):
        assert_same_texts(before, now, explain(path, index))


@BY_NAME
def test_notebook_is_committed_as_a_page_to_read(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [text.kind for cell in cells for text in texts(cell)]
    assert "image/png" in kinds
    # Warnings and progress bars are red; errors stop a reader.
    assert not {"stderr", "error"} & set(kinds)
    for cell in cells:
        if re.search(r"^(print|display|plt\.show)\(", cell.source, flags=re.MULTILINE):
            assert cell.outputs, cell.source
        # A page to read: what is longer belongs into the library.
        assert len(cell.source.splitlines()) <= MAX_CELL_LINES, cell.source


@pytest.mark.parametrize(
    ("text", "words", "numbers"),
    [
        ("loss 2.50, 3 tokens", "loss #, 3 tokens", [2.5]),
        ("off by 1e-06 in 1,234", "off by # in 1,234", [1e-6]),
        ("[5.65 6.17]", "[# #]", [5.65, 6.17]),
        ("none", "none", []),
    ],
)
def test_numbers_that_may_be_rounded(text: str, words: str, numbers: list[float]) -> None:
    assert split_floats(text) == (words, numbers)


def cell(text: str, *, tags: tuple[str, ...] = ()) -> Any:
    output = nbformat.v4.new_output("stream", name="stdout", text=text)
    return nbformat.v4.new_code_cell(outputs=[output], metadata={"tags": list(tags)})


def test_a_stale_output_is_found() -> None:
    assert_same_texts(cell("loss 2.500"), cell("loss 2.501"), "")
    for stale in ("loss 2.600", "Loss 2.500", "loss 2"):
        with pytest.raises(AssertionError, match="stale"):
            assert_same_texts(cell(stale), cell("loss 2.500"), "stale")
        assert_same_texts(cell(stale, tags=("varies",)), cell("loss 2.500"), "")
