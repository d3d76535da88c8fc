"""The reference decoder and its parts."""

from ._attention import (
    AttentionFunction,
    GroupedQueryAttention,
    KeyValueCache,
    causal_attention,
    causal_attention_by_position,
)
from ._embedding import embed_tokens
from ._feed_forward import SwiGLU
from ._linear import Linear, cast_matrices
from ._norm import RMSNorm
from ._rotary import rotary_embedding
from ._transformer import TransformerDecoder
from ._transformer_layer import TransformerConfig, TransformerDecoderLayer

__all__ = [
    "AttentionFunction",
    "GroupedQueryAttention",
    "KeyValueCache",
    "Linear",
    "RMSNorm",
    "SwiGLU",
    "TransformerConfig",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "cast_matrices",
    "causal_attention",
    "causal_attention_by_position",
    "embed_tokens",
    "rotary_embedding",
]
