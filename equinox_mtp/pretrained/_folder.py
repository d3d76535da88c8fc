"""A checkpoint folder: its configuration, and its tensors in one file or many."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ._tensor_file import TensorFile, TensorInfo, shown

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
_SCALES = "_scale_inv"
_NARROW = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


class CheckpointFolder:
    """`config.json` and `*.safetensors`, with an index or without.

    **Raises:** `FileNotFoundError` if there is no such folder; `ValueError` for one that is not
    right, in one line that names the file and the tensor.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise FileNotFoundError(
                f"`folder`: there is no folder {path}. Name a folder with config.json and "
                "*.safetensors in it."
            )
        self.path = path
        self.config = read_json(path / CONFIG_FILE)
        index = path / INDEX_FILE
        self._file_of = self._read_index(index) if index.is_file() else self._read_all()

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor without reading it.

        **Raises:** `ValueError` if there is none of this name.
        """
        return self._find(name).tensors[name]

    def view(self, name: str) -> np.ndarray:
        """A tensor, read from its file where it is indexed; with its scales, if it has some."""
        stored = self._find(name).view(name)
        scales = f"{name}{_SCALES}"
        if stored.dtype not in _NARROW or scales not in self:
            return stored
        return self._dequantized(name, stored, np.asarray(self._find(scales).view(scales)))

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored in 8 bits, with scales."""
        return self.info(name).dtype in _NARROW and f"{name}{_SCALES}" in self

    def is_scale(self, name: str) -> bool:
        """Whether a tensor holds the scales of another."""
        return name.endswith(_SCALES) and name.removesuffix(_SCALES) in self

    def forget(self, name: str) -> None:
        """Lets the memory go that was read of a tensor's file."""
        self._find(name).forget()

    def where(self, name: str) -> str:
        """A tensor and its file, for messages."""
        return f"{self._find(name).path}: tensor `{shown(name)}`"

    def where_file(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self._find(name).path.name

    def _find(self, name: str) -> TensorFile:
        file = self._file_of.get(name)
        if file is None:
            raise ValueError(
                f"{self.path}: tensor `{shown(name)}` is missing, which {CONFIG_FILE} implies. "
                "Copy the checkpoint again."
            )
        return file

    def _dequantized(self, name: str, stored: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """`stored · scale` of each block, in float32; the blocks at the edges are cut."""
        quantization = self.config.get("quantization_config")
        sizes: Any = (
            quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        )
        is_pair = isinstance(sizes, list) and [type(x) for x in sizes] == [int, int]
        if not is_pair or min(sizes) < 1 or stored.ndim != 2:
            raise ValueError(
                f"{self.where(name)}: it has scales of blocks, and `quantization_config` in "
                f"{CONFIG_FILE} has no `weight_block_size` of two numbers."
            )
        rows, columns = sizes
        blocks = (-(-stored.shape[0] // rows), -(-stored.shape[1] // columns))
        if scales.shape != blocks:
            raise ValueError(
                f"{self.where(name)}: blocks of {rows} by {columns} need scales {blocks}; got "
                f"{scales.shape}."
            )
        values = stored.astype(np.float32)
        for row, start in enumerate(range(0, stored.shape[0], rows)):
            scale = np.repeat(scales[row].astype(np.float32), columns)[: stored.shape[1]]
            values[start : start + rows] *= scale
        return values

    def _read_index(self, index: Path) -> dict[str, TensorFile]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ValueError(f"{index}: it has no `weight_map`. Copy the checkpoint again.")
        for name, file in files.items():
            is_name = isinstance(file, str) and 0 < len(file) < 200 and Path(file).name == file
            if not is_name or file == "..":
                raise ValueError(
                    f"{index}: tensor `{shown(name)}` would be in {str(file)[:80]!r}, which is no "
                    "file of this folder."
                )
        found = {file: TensorFile(self.path / file) for file in sorted(set(files.values()))}
        for name, file in files.items():
            if name not in found[file].tensors:
                raise ValueError(
                    f"{index}: tensor `{shown(name)}` is not in {file}. Copy the checkpoint again."
                )
        for file, tensor_file in found.items():
            for name in tensor_file.tensors:
                if files.get(name) != file:
                    raise ValueError(
                        f"{index}: tensor `{shown(name)}` of {file} is not listed. Copy the "
                        "checkpoint again."
                    )
        return {name: found[file] for name, file in files.items()}

    def _read_all(self) -> dict[str, TensorFile]:
        files = [TensorFile(path) for path in sorted(self.path.glob("*.safetensors"))]
        if not files:
            pickled = sorted(path.name for path in self.path.glob("*.bin"))
            raise ValueError(
                f"{self.path}: there are no *.safetensors"
                + (
                    f", only {pickled[0]}: such files run code when they are read, and are never "
                    "loaded. Convert them with the library that wrote them."
                    if pickled
                    else ". Name the folder that holds the weights."
                )
            )
        found: dict[str, TensorFile] = {}
        for file in files:
            for name in file.tensors:
                if name in found:
                    raise ValueError(
                        f"{file.path}: tensor `{shown(name)}` is in {found[name].path.name}, too, "
                        f"and there is no {INDEX_FILE}."
                    )
                found[name] = file
        return found


def read_json(path: Path) -> dict[str, Any]:
    """**Raises:** `ValueError` if it is no file with a JSON object."""
    try:
        if path.exists() and not path.is_file():
            raise OSError
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = "missing" if isinstance(error, FileNotFoundError) else "not JSON"
        raise ValueError(f"{path}: it is {why}. Copy the checkpoint again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it is no JSON object. Copy the checkpoint again.")
    return found
