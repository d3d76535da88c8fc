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
| 7 | `speculative`, `linen`, `pretrained`, `plot` | draft, verify, commit; MaxText's constructors and names; released models in and out; pictures |
| 6 | `distillation`, `_flops` | the depths against the main model: draft heads trained for acceptance; the arithmetic of a step |
| 5 | `_model` | `MTPModel(decoder, block)` |
| 4 | `_batch`, `_depths`, `_block` | what a model reads; all depths, over a decoder that is passed in |
| 3 | `nn`, `_layer` | the reference decoder; one depth |
| 2 | `cross_entropy`, `attention` | the loss of an output head, without logits; attention, without their square |
| 1 | `_shift`, `_alignment`, `_losses`, `_curriculum`, `_acceptance`, `_expected_acceptance`, `_decoder`, `_parameters`, `sharding`, `serialization`, `stacking` | shifts and alignment; reductions; interfaces; what optimizers must know; rules and placement; files; layers that are alike as one |
| 0 | `_config`, `_checks`, `_types`, `_platform`, `_products`, `_annotations`, `_safetensors`, `_whole_file`, `_documentation` | conventions; checks of arguments; the axis words, and where annotations name them; where JAX runs; products of a few rows; the format of files, and how they are written; the API reference |

The examples in all docstrings begin with this model and this batch:

>>> from functools import partial
>>> import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax
>>> import equinox_mtp as emtp
>>> config = emtp.nn.TransformerConfig(vocab_size=32, embed_size=16, num_layers=1, num_heads=2)
>>> decoder = emtp.nn.TransformerDecoder(config, key=jax.random.key(0))
>>> make_layer = partial(emtp.nn.TransformerDecoderLayer, config)
>>> block = emtp.MultiTokenPredictionBlock(
...     emtp.MTPConfig(num_depths=2), make_layer, embed_size=16, key=jax.random.key(1)
... )
>>> model = emtp.MTPModel(decoder, block)
>>> batch = emtp.make_batch(np.arange(18).reshape(2, 9))  # two rows of eight tokens and targets
>>> output = eqx.filter_jit(model)(batch)
"""  # noqa: E501

# `_documentation` comes first: it sets how jaxtyping shows annotations, for pdoc alone.
from . import (
    _documentation,  # noqa: F401
    attention,
    cross_entropy,
    distillation,
    linen,
    nn,
    pretrained,
    serialization,
    sharding,
    speculative,
)
from ._acceptance import MTPAcceptance, MTPAcceptanceRate, calculate_mtp_acceptance_rate
from ._alignment import MTPTargets, align_targets, inputs_and_targets, scored_targets
from ._batch import Batch, make_batch
from ._block import MTPOutput, MultiTokenPredictionBlock
from ._config import MTPConfig, Preset
from ._curriculum import curriculum_depth_weights
from ._decoder import (
    AbstractCachedDecoder,
    AbstractCachedDecoderLayer,
    AbstractDecoder,
    AbstractDecoderLayer,
)
from ._expected_acceptance import ExpectedAcceptance, calculate_expected_acceptance
from ._flops import FlopsPerToken, flops_per_token
from ._layer import MultiTokenPredictionLayer
from ._losses import (
    MTPLosses,
    TokenLoss,
    calculate_mtp_loss,
    exponential_depth_weights,
    sum_token_losses,
)
from ._model import ModelOutput, MTPModel
from ._parameters import count_parameters, muon_dimension_numbers, weight_decay_mask
from ._shift import roll_and_mask, roll_and_mask_by_segment
from .cross_entropy import (
    CrossEntropy,
    LinearDivergence,
    LinearHead,
    SummedCrossEntropy,
    linear_cross_entropy,
    linear_divergence,
    summed_linear_cross_entropy,
)
from .linen import mtp_acceptance, mtp_losses, multi_token_prediction_block_as_linen
from .serialization import load, save
from .sharding import HeadSharding

__all__ = [
    "AbstractCachedDecoder",
    "AbstractCachedDecoderLayer",
    "AbstractDecoder",
    "AbstractDecoderLayer",
    "Batch",
    "CrossEntropy",
    "ExpectedAcceptance",
    "FlopsPerToken",
    "HeadSharding",
    "LinearDivergence",
    "LinearHead",
    "MTPAcceptance",
    "MTPAcceptanceRate",
    "MTPConfig",
    "MTPLosses",
    "MTPModel",
    "MTPOutput",
    "MTPTargets",
    "ModelOutput",
    "MultiTokenPredictionBlock",
    "MultiTokenPredictionLayer",
    "Preset",
    "SummedCrossEntropy",
    "TokenLoss",
    "align_targets",
    "attention",
    "calculate_expected_acceptance",
    "calculate_mtp_acceptance_rate",
    "calculate_mtp_loss",
    "count_parameters",
    "cross_entropy",
    "curriculum_depth_weights",
    "distillation",
    "exponential_depth_weights",
    "flops_per_token",
    "inputs_and_targets",
    "linear_cross_entropy",
    "linear_divergence",
    "linen",
    "load",
    "make_batch",
    "mtp_acceptance",
    "mtp_losses",
    "multi_token_prediction_block_as_linen",
    "muon_dimension_numbers",
    "nn",
    "pretrained",
    "roll_and_mask",
    "roll_and_mask_by_segment",
    "save",
    "scored_targets",
    "serialization",
    "sharding",
    "speculative",
    "sum_token_losses",
    "summed_linear_cross_entropy",
    "weight_decay_mask",
]
