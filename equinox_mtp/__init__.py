"""Multi-Token Prediction for language models in JAX, in the functional style of Equinox."""

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
