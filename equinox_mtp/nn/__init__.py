"""The reference decoder and its parts."""

from ._attention import (
    AttentionFunction as AttentionFunction,
    GroupedQueryAttention as GroupedQueryAttention,
    KeyValueCache as KeyValueCache,
    causal_attention as causal_attention,
    causal_attention_by_position as causal_attention_by_position,
)
from ._embedding import embed_tokens as embed_tokens
from ._feed_forward import SwiGLU as SwiGLU
from ._linear import (
    Linear as Linear,
    cast_matrices as cast_matrices,
)
from ._norm import RMSNorm as RMSNorm
from ._rotary import rotary_embedding as rotary_embedding
from ._transformer import TransformerDecoder as TransformerDecoder
from ._transformer_layer import (
    TransformerConfig as TransformerConfig,
    TransformerDecoderLayer as TransformerDecoderLayer,
)
