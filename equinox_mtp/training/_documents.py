"""The documents of files, and their tokens; none of it is in memory as a whole.

A text file is a document. A JSONL file has one a line, and a Parquet file one a row.
"""

import gzip
import importlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ._processes import is_first
from ._text import AbstractText

_BATCH = 1 << 21
"""Characters that are tokenized at a time; a document counts as 100 more."""
_BUFFER = 1 << 20
_ROWS = 256
"""Rows of a Parquet file that are decoded at a time."""
_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    bytes: "bytes",
    list: "an array",
    dict: "an object",
}


class Document(NamedTuple):
    """A text, and how many bytes of its file are read once it is, about."""

    text: str
    file: Path
    position: int


def documents_of(file: Path, field: str) -> Iterator[Document]:
    """The texts in a file, in its order and without the empty ones.

    **Arguments:**

    - `field`: of each line of a JSONL file, or the column of a Parquet file.

    **Raises:** `ValueError` for a damaged file, or a line without a text; `ModuleNotFoundError` for
    Parquet without the extra `data`.
    """
    if file.suffix == ".parquet":
        found = _parquet_documents(file, field)
    elif file.name.endswith((".jsonl", ".jsonl.gz")):
        found = _json_documents(file, field)
    else:
        # Bytes that are no text become U+FFFD: source trees have a few such files.
        text = file.read_bytes().decode("utf8", "replace")
        found = iter([Document(text, file, file.stat().st_size)])
    return (document for document in found if document.text)


# Their tokens


def tokenized(
    files: Sequence[Path], field: str, text: AbstractText, end: int
) -> Iterator[list[np.ndarray]]:
    """The tokens of the documents in files, a batch of them at a time, each with its end.

    **Raises:** as `documents_of` does; `ValueError` if an id is not in the vocabulary.
    """
    sizes = [file.stat().st_size for file in files]
    starts = dict(zip(files, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    documents = itertools.chain.from_iterable(documents_of(file, field) for file in files)
    with progress_bar("tokenizing", files) as bar:
        for batch in _batches(documents):
            encoded = text.encode_all([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                if ids.max(initial=0) >= text.vocab_size:
                    raise ValueError(
                        f"`tokenizer` must give ids in [0, {text.vocab_size}), its vocabulary; got "
                        f"{ids.max()} for text of {document.file}. Mend its post_processor."
                    )
            yield [np.append(ids, end) for ids in encoded]
            bar.update(starts[batch[-1].file] + batch[-1].position - bar.n)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = list[Document](), 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 100
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def progress_bar(description: str, files: Sequence[Path]) -> tqdm:
    """Of the bytes in files, for what takes longer than two seconds."""
    size = sum(file.stat().st_size for file in files)
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "delay": 2}
    if not is_first():
        options["disable"] = True  # what is not passed comes from the environment
    return tqdm(total=size, desc=description, **options)


# JSONL


def _json_documents(file: Path, field: str) -> Iterator[Document]:
    for number, (line, position) in enumerate(_lines(file), start=1):
        where = f"line {number} of {file}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # as editors on Windows begin UTF-8
        if line.isspace() or not line:
            continue
        record = _parsed(line, where)
        if not isinstance(record, dict):
            raise ValueError(
                f"`data`: {where} must be a JSON object with the field {field!r}; got "
                f"{_kind(record)}. Write one object a line."
            )
        if field not in record:
            raise ValueError(
                f"`text_field`: {where} has no field {field!r}; it has {_names(record)}. Name the "
                "field of the text with --text-field, or mend the line."
            )
        yield Document(_checked_text(record[field], field, where), file, position)


def _lines(file: Path) -> Iterator[tuple[bytes, int]]:
    """Each line, and the position in the file after it."""
    if file.suffix != ".gz":
        position = 0
        with file.open("rb", _BUFFER) as stream:
            for line in stream:
                position += len(line)
                yield line, position
        return
    number = 0
    with file.open("rb") as compressed, gzip.open(compressed) as stream:
        try:
            for number, line in enumerate(stream, start=1):  # noqa: B007
                yield line, compressed.tell()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"`data`: {file} is a damaged gzip file, after line {number}: {error}. Get it "
                "again."
            ) from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`data`: {where} must be UTF-8; byte {error.start + 1} of the line is "
            f"0x{line[error.start]:02x}. Convert the file to UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`data`: {where} is not JSON: {error.msg} at column {error.colno}. Mend the line, or "
            "take it out."
        ) from None
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or brackets as deep.
        raise ValueError(
            f"`data`: {where} cannot be read: {error!s:.80}. Mend the line, or take it out."
        ) from None


# Parquet


def _parquet_documents(file: Path, field: str) -> Iterator[Document]:
    """A row group after the other, and of the one column a few rows at a time."""
    arrow, parquet = _pyarrow(file)
    size, row = file.stat().st_size, 0
    try:
        # With a buffer the pages of a column are read one by one, and not all at once.
        with parquet.ParquetFile(file, buffer_size=_BUFFER) as opened:
            names, rows = opened.schema_arrow.names, opened.metadata.num_rows
            if field not in names:
                raise ValueError(
                    f"`text_field`: {file} has no column {field!r}; it has {_names(names)}. Name "
                    "the column of the text with --text-field."
                )
            for group in range(opened.num_row_groups):
                batches = opened.iter_batches(_ROWS, row_groups=[group], columns=[field])
                for value in (value for batch in batches for value in batch.column(0)):
                    row += 1
                    where = f"row {row} of {file}"
                    text = _checked_text(_value(value, where), field, where)
                    yield Document(text, file, size * row // rows)
    except (arrow.ArrowException, OSError) as error:
        first_line = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"`data`: {file} is not a readable Parquet file: {first_line:.120}. Get it again."
        ) from None


def _value(scalar: Any, where: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`data`: {where} must be UTF-8; byte {error.start + 1} of the text is "
            f"0x{error.object[error.start]:02x}. Write the file again, with texts as UTF-8."
        ) from None


def _pyarrow(file: Path) -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`data`: {file} needs the package pyarrow. Install the extra `data`, in the "
            "repository by: pip install -e '.[data]'.",
            name=error.name,
        ) from None


# Both


def _checked_text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"`text_field`: the field {field!r} must be a string; in {where} it is "
            f"{_kind(value)}. Name another with --text-field, or mend the data."
        )
    try:
        value.encode("utf8")
    except UnicodeEncodeError:
        raise ValueError(
            f"`data`: the text in {where} holds half of a surrogate pair. Mend the data."
        ) from None
    return value


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _names(names: Any) -> str:
    shown = [repr(name) for name in names]
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    return ", ".join(shown[:10]) + more if shown else "none"
