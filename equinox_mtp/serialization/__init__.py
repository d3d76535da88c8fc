"""A model, or any tree of arrays, in one safetensors file."""

from ._save_load import (
    load as load,
    save as save,
)
