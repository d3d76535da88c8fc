"""A model, or any tree of arrays, in one safetensors file."""

from ._save_load import load, save

__all__ = [
    "load",
    "save",
]
