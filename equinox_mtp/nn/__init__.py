"""The reference decoder and its parts."""

from ..attention import AttentionFunction, causal_attention, causal_attention_by_position
from ._attention import GroupedQueryAttention
from ._embedding import embed_tokens
from ._feed_forward import SwiGLU
from ._kernels import cast_matrices, outputs_first
from ._key_value_cache import KeyValueCache
from ._latent_attention import MultiHeadLatentAttention
from ._latent_cache import LatentCache
from ._layer_runs import LayerRun
from ._linear import Linear
from ._norm import RMSNorm
from ._parts import AbstractAttention, AbstractFeedForward
from ._rotary import (
    AbstractRotaryScaling,
    LinearScaling,
    Llama3Scaling,
    Rotary,
    YarnScaling,
    rotary_embedding,
)
from ._transformer import TransformerDecoder
from ._transformer_layer import TransformerConfig, TransformerDecoderLayer
from .experts import (
    Experts,
    MixtureOfExperts,
    Router,
    RouterStatistics,
    Routing,
    router_statistics,
    router_statistics_in,
    update_router_bias,
    update_router_biases,
)
from .gated_delta import GatedDeltaCache, GatedDeltaInputs, GatedDeltaNet, gated_delta_rule

__all__ = [
    "AbstractAttention",
    "AbstractFeedForward",
    "AbstractRotaryScaling",
    "AttentionFunction",
    "Experts",
    "GatedDeltaCache",
    "GatedDeltaInputs",
    "GatedDeltaNet",
    "GroupedQueryAttention",
    "KeyValueCache",
    "LatentCache",
    "LayerRun",
    "Linear",
    "LinearScaling",
    "Llama3Scaling",
    "MixtureOfExperts",
    "MultiHeadLatentAttention",
    "RMSNorm",
    "Rotary",
    "Router",
    "RouterStatistics",
    "Routing",
    "SwiGLU",
    "TransformerConfig",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "YarnScaling",
    "cast_matrices",
    "causal_attention",
    "causal_attention_by_position",
    "embed_tokens",
    "gated_delta_rule",
    "outputs_first",
    "rotary_embedding",
    "router_statistics",
    "router_statistics_in",
    "update_router_bias",
    "update_router_biases",
]
