"""The commands of `python -m equinox_mtp` as functions, and the data they read.

`train(TrainConfig(steps=100))` trains, and `load_model` reads what it has saved. `_train.py` is the
loop, from top to bottom: copy what you need. Needs the extra `train`.

The examples of this package begin with these:

>>> from equinox_mtp import training
>>> corpus = training.Corpus.of_documents([np.arange(5), np.arange(8)], vocab_size=32)
"""

from ._checkpoint import CheckpointInfo
from ._commands import export_command, generate_command, train_command
from ._compare import Comparison, compare, held_out_prompts
from ._config import TrainConfig
from ._corpus import Corpus, load_corpus
from ._export import ExportConfig, export_run
from ._generate import GenerateConfig, generate_text
from ._interrupt import Interrupted
from ._load_model import load_model
from ._packing import PackedRows, Rows
from ._sources import TEXT_END
from ._train import train

__all__ = [
    "TEXT_END",
    "CheckpointInfo",
    "Comparison",
    "Corpus",
    "ExportConfig",
    "GenerateConfig",
    "Interrupted",
    "PackedRows",
    "Rows",
    "TrainConfig",
    "compare",
    "export_command",
    "export_run",
    "generate_command",
    "generate_text",
    "held_out_prompts",
    "load_corpus",
    "load_model",
    "train",
    "train_command",
]
