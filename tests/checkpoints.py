"""Tiny checkpoints of released layouts, copies of them to be changed, and their tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parent / "data" / "checkpoints"


def reference(name: str) -> dict[str, np.ndarray]:
    """The recorded numbers."""
    with np.load(FOLDER / name / "visible.npz") as stored:
        return dict(stored)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by the package safetensors."""
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def changed(
    name: str,
    target: Path,
    *,
    config: Callable[[dict[str, Any]], Any] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> Path:
    """A copy of a checkpoint in which something is changed in place."""
    shutil.copytree(FOLDER / name, target)
    if config is not None:
        written = config_of(target)
        config(written)
        (target / "config.json").write_text(json.dumps(written))
    if tensors is not None:
        path = target / "model.safetensors"
        stored = load_file(path)
        tensors(stored)
        save_file(stored, path, metadata={"format": "pt"})
    return target


def one_bit_changed(target: Path) -> Path:
    """The model `qwen3`, with another last bit in one number of one layer."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].view(np.uint32).flat[-1] ^= 1

    return changed("qwen3", target, tensors=change)
