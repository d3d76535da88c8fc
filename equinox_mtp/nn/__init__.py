"""The reference decoder and its parts."""

from ._attention import (
    AttentionFunction as AttentionFunction,
    GroupedQueryAttention as GroupedQueryAttention,
    KeyValueCache as KeyValueCache,
    causal_attention as causal_attention,
)
from ._feed_forward import SwiGLU as SwiGLU
from ._linear import Linear as Linear
from ._norm import RMSNorm as RMSNorm
from ._rotary import rotary_embedding as rotary_embedding
from ._transformer import (
    TransformerConfig as TransformerConfig,
    TransformerDecoder as TransformerDecoder,
    TransformerDecoderLayer as TransformerDecoderLayer,
    UnrolledDecoder as UnrolledDecoder,
)
