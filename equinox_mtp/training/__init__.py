"""The training command's parts; needs the extra `train`."""

from ._checkpoint import (
    CheckpointInfo as CheckpointInfo,
    Checkpoints as Checkpoints,
    info_of_run as info_of_run,
    load_info as load_info,
    load_state as load_state,
    save_checkpoint as save_checkpoint,
)
from ._checkpoint_files import (
    checkpoints as checkpoints,
    last_checkpoint as last_checkpoint,
    last_undamaged_checkpoint as last_undamaged_checkpoint,
)
from ._compare import (
    Comparison as Comparison,
    compare as compare,
    held_out_prompts as held_out_prompts,
)
from ._config import TrainConfig as TrainConfig
from ._corpus import (
    Corpus as Corpus,
    load_corpus as load_corpus,
)
from ._generate import (
    GenerateConfig as GenerateConfig,
    generate_text as generate_text,
    load_model as load_model,
)
from ._interrupt import Interrupted as Interrupted
from ._packing import (
    PackedRows as PackedRows,
    Rows as Rows,
)
from ._placement import (
    ONE_DEVICE as ONE_DEVICE,
    Placement as Placement,
)
from ._quiet import quiet_failed_saves as quiet_failed_saves
from ._sources import (
    TEXT_END as TEXT_END,
    TEXT_VOCAB as TEXT_VOCAB,
)
from ._step import (
    TrainState as TrainState,
    evaluate as evaluate,
    make_model as make_model,
    make_optimizer as make_optimizer,
    make_state as make_state,
    train_step as train_step,
)
from ._train import (
    newest_run_folder as newest_run_folder,
    train as train,
)
