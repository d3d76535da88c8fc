"""Multi-Token Prediction for language models in JAX, in the functional style of Equinox.

    tokens ─ make_batch ─► Batch ─ align_targets ─► MTPTargets           (integers only)
             decoder.embed ─► layer 1 … layer D                          (hidden states)
                 summed_linear_cross_entropy                             (sums; no logits)
                     ─► ModelOutput(main, mtp)                           (losses, acceptance)

`_model.py` is the page to read first: all of it, one call a step. Modules are immutable, and a call
returns everything that it computed. The rooms, where imports run downward only:

| floor | room | holds |
|---|---|---|
| 9 | `__main__`, `training` | `python -m equinox_mtp …`; uses only the public names |
| 8 | `__init__` | the public names |
| 7 | `speculative`, `linen`, `plot` | draft, verify, commit; MaxText's constructors and names; pictures |
| 6 | `_model` | `MTPModel(decoder, block)` |
| 5 | `_batch`, `_block` | what a model reads; all depths, over a decoder that is passed in |
| 4 | `_layer` | one depth |
| 3 | `cross_entropy`, `nn`, `stacking` | the loss of an output head; the reference decoder; layers of all depths as one |
| 2 | `_shift`, `_losses`, `_acceptance`, `_decoder`, `sharding`, `serialization` | alignment; reductions; interfaces; rules and placement; files |
| 1 | `_config`, `_checks`, `_types` | conventions; checks of arguments; the axis words |
"""  # noqa: E501

from . import linen as linen, nn as nn, sharding as sharding, speculative as speculative
from ._acceptance import (
    MTPAcceptance as MTPAcceptance,
    MTPAcceptanceRate as MTPAcceptanceRate,
    calculate_mtp_acceptance_rate as calculate_mtp_acceptance_rate,
)
from ._batch import (
    Batch as Batch,
    make_batch as make_batch,
)
from ._block import (
    MTPOutput as MTPOutput,
    MultiTokenPredictionBlock as MultiTokenPredictionBlock,
)
from ._config import (
    MTPConfig as MTPConfig,
    Preset as Preset,
)
from ._decoder import (
    AbstractCachedDecoder as AbstractCachedDecoder,
    AbstractCachedDecoderLayer as AbstractCachedDecoderLayer,
    AbstractDecoder as AbstractDecoder,
    AbstractDecoderLayer as AbstractDecoderLayer,
)
from ._layer import MultiTokenPredictionLayer as MultiTokenPredictionLayer
from ._losses import (
    MTPLosses as MTPLosses,
    TokenLoss as TokenLoss,
    calculate_mtp_loss as calculate_mtp_loss,
    exponential_depth_weights as exponential_depth_weights,
    sum_token_losses as sum_token_losses,
)
from ._model import (
    ModelOutput as ModelOutput,
    MTPModel as MTPModel,
)
from ._shift import (
    MTPTargets as MTPTargets,
    align_targets as align_targets,
    inputs_and_targets as inputs_and_targets,
    roll_and_mask as roll_and_mask,
    roll_and_mask_by_segment as roll_and_mask_by_segment,
    scored_targets as scored_targets,
)
from .cross_entropy import (
    CrossEntropy as CrossEntropy,
    LinearHead as LinearHead,
    SummedCrossEntropy as SummedCrossEntropy,
    linear_cross_entropy as linear_cross_entropy,
    summed_linear_cross_entropy as summed_linear_cross_entropy,
)
from .linen import (
    mtp_acceptance as mtp_acceptance,
    mtp_losses as mtp_losses,
    multi_token_prediction_block_as_linen as multi_token_prediction_block_as_linen,
)
from .serialization import (
    load as load,
    save as save,
)
from .sharding import HeadSharding as HeadSharding
