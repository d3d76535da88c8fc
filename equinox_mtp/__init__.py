"""Multi-Token Prediction for language models in JAX, in the functional style of Equinox."""

from . import nn as nn
from ._acceptance import (
    MTPAcceptance as MTPAcceptance,
)
from ._acceptance import (
    MTPAcceptanceRate as MTPAcceptanceRate,
)
from ._acceptance import (
    calculate_mtp_acceptance_rate as calculate_mtp_acceptance_rate,
)
from ._block import (
    MTPOutput as MTPOutput,
)
from ._block import (
    MultiTokenPredictionBlock as MultiTokenPredictionBlock,
)
from ._config import (
    MTPConfig as MTPConfig,
)
from ._config import (
    Preset as Preset,
)
from ._cross_entropy import (
    CrossEntropy as CrossEntropy,
)
from ._cross_entropy import (
    linear_cross_entropy as linear_cross_entropy,
)
from ._decoder import (
    AbstractDecoder as AbstractDecoder,
)
from ._decoder import (
    AbstractDecoderLayer as AbstractDecoderLayer,
)
from ._layer import MultiTokenPredictionLayer as MultiTokenPredictionLayer
from ._losses import (
    MTPLosses as MTPLosses,
)
from ._losses import (
    TokenLoss as TokenLoss,
)
from ._losses import (
    calculate_mtp_loss as calculate_mtp_loss,
)
from ._losses import (
    exponential_depth_weights as exponential_depth_weights,
)
from ._losses import (
    sum_token_losses as sum_token_losses,
)
from ._model import (
    ModelOutput as ModelOutput,
)
from ._model import (
    MTPModel as MTPModel,
)
from ._shift import (
    MTPTargets as MTPTargets,
)
from ._shift import (
    align_targets as align_targets,
)
from ._shift import (
    inputs_and_targets as inputs_and_targets,
)
from ._shift import (
    roll_and_mask as roll_and_mask,
)
from ._shift import (
    roll_and_mask_by_segment as roll_and_mask_by_segment,
)
from ._shift import (
    scored_targets as scored_targets,
)
