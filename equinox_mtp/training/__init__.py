"""The training command's parts; needs the extra `train`."""

from ._checkpoint import (
    CheckpointInfo as CheckpointInfo,
)
from ._checkpoint import (
    checkpoints as checkpoints,
)
from ._checkpoint import (
    last_checkpoint as last_checkpoint,
)
from ._checkpoint import (
    load_info as load_info,
)
from ._checkpoint import (
    load_state as load_state,
)
from ._checkpoint import (
    save_checkpoint as save_checkpoint,
)
from ._config import TrainConfig as TrainConfig
from ._data import (
    Batch as Batch,
)
from ._data import (
    Corpus as Corpus,
)
from ._data import (
    PackedRows as PackedRows,
)
from ._data import (
    load_corpus as load_corpus,
)
from ._step import (
    TrainState as TrainState,
)
from ._step import (
    evaluate as evaluate,
)
from ._step import (
    make_model as make_model,
)
from ._step import (
    make_optimizer as make_optimizer,
)
from ._step import (
    make_state as make_state,
)
from ._step import (
    train_step as train_step,
)
from ._train import (
    newest_run_folder as newest_run_folder,
)
from ._train import (
    train as train,
)
