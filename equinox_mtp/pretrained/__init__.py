"""Released models in and out: folders of `config.json`, `*.safetensors` and `tokenizer.json`.

    from equinox_mtp import pretrained
    model, tokenizer = pretrained.load("Qwen3-0.6B", num_depths=3, preset="fast_mtp", key=key)
    pretrained.save("out", model, layout="mimo", source="Qwen3-0.6B")
    model = pretrained.from_config("config.json", num_depths=1, key=key)  # to train from scratch

The families are data: `Family` says which tensor is which array of the tree. `load` and `save` read
and write all of them by the same walk over the tree:

    config.json ─ _settings ─► _shapes, _depths ─► modules with shapes in place of arrays
                                   _places ─► which tensor each array is
                                       _load, _read ─► arrays of the tensors
                                       _save, _contents, _write ─► tensors of the arrays

The examples of this package begin with a small folder of their own:

>>> from equinox_mtp import pretrained
>>> import tempfile
>>> from pathlib import Path
>>> folder = Path(tempfile.mkdtemp()) / "llama"
>>> main_model = emtp.MTPModel(decoder, emtp.MultiTokenPredictionBlock.from_layers(
...     emtp.MTPConfig(num_depths=0), []
... ))
>>> pretrained.save(folder, main_model, layout="llama")
"""

from ._fresh import from_config
from ._load import load
from ._registry import FAMILIES
from ._save import save
from ._speculators import model_folder
from ._steps import AbstractStep, Convolution, Flat, Kernel, Part, Same
from ._tables import Family, MTPTable, Tensor
from ._tokenizer import load_tokenizer

__all__ = [
    "FAMILIES",
    "AbstractStep",
    "Convolution",
    "Family",
    "Flat",
    "Kernel",
    "MTPTable",
    "Part",
    "Same",
    "Tensor",
    "from_config",
    "load",
    "load_tokenizer",
    "model_folder",
    "save",
]
