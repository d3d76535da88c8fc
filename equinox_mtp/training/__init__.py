"""The training command's parts; needs the extra `train`."""

from ._checkpoint import (
    CheckpointInfo,
    Checkpoints,
    info_of_run,
    load_info,
    load_state,
    save_checkpoint,
)
from ._checkpoint_files import checkpoints, last_checkpoint, last_undamaged_checkpoint
from ._command_line import parse_train_options
from ._compare import Comparison, compare, held_out_prompts
from ._config import TrainConfig
from ._corpus import Corpus, load_corpus
from ._generate import GenerateConfig, generate_text, load_model
from ._interrupt import Interrupted
from ._packing import PackedRows, Rows
from ._placement import ONE_DEVICE, Placement
from ._quiet import quiet_failed_saves
from ._sources import TEXT_END, TEXT_VOCAB
from ._step import TrainState, evaluate, make_model, make_optimizer, make_state, train_step
from ._stored_options import read_options
from ._train import newest_run_folder, train

__all__ = [
    "ONE_DEVICE",
    "TEXT_END",
    "TEXT_VOCAB",
    "CheckpointInfo",
    "Checkpoints",
    "Comparison",
    "Corpus",
    "GenerateConfig",
    "Interrupted",
    "PackedRows",
    "Placement",
    "Rows",
    "TrainConfig",
    "TrainState",
    "checkpoints",
    "compare",
    "evaluate",
    "generate_text",
    "held_out_prompts",
    "info_of_run",
    "last_checkpoint",
    "last_undamaged_checkpoint",
    "load_corpus",
    "load_info",
    "load_model",
    "load_state",
    "make_model",
    "make_optimizer",
    "make_state",
    "newest_run_folder",
    "parse_train_options",
    "quiet_failed_saves",
    "read_options",
    "save_checkpoint",
    "train",
    "train_step",
]
