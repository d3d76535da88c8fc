import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from .._checks import check_flag, check_integer, check_number
from .._parameters import matrix_flops
from .._types import checked
from ..attention import AttentionFunction, causal_attention
from ._init import fan_in_normal
from ._kernels import Kernel, multiply
from ._key_value_cache import KeyValueCache
from ._norm import RMSNorm
from ._parts import AbstractAttention, mean_keys
from ._rotary import Rotary


class GroupedQueryAttention(AbstractAttention):
    """Causal self-attention with grouped key/value heads, and rotary positions or none.

    Grouped-query attention is arXiv 2305.13245. Queries, keys, values and the output may have
    biases, queries and keys a norm over the features of each head, before their rotation (arXiv
    2302.05442). With a gate what a head has attended to is multiplied by `sigmoid(x · W_gate)`
    (arXiv 2505.06708). Runs in the dtype of its input.

    >>> attention = emtp.nn.GroupedQueryAttention(16, 2, 2, 8, key=jax.random.key(0))
    >>> attention(jnp.ones((1, 3, 16)), position_ids=jnp.asarray([[0, 1, 2]])).shape
    (1, 3, 16)
    """

    # What `outputs_first` lays out; each of these fields holds an `OutputsFirst` then.
    _kernels: ClassVar = ("query_kernel", "key_kernel", "value_kernel", "gate_kernel", "out_kernel")

    query_kernel: Float[Array, "embed heads head_dim"]
    key_kernel: Float[Array, "embed kv_heads head_dim"]
    value_kernel: Float[Array, "embed kv_heads head_dim"]
    out_kernel: Float[Array, "heads head_dim embed"]
    query_bias: Float[Array, "heads head_dim"] | None
    key_bias: Float[Array, "kv_heads head_dim"] | None
    value_bias: Float[Array, "kv_heads head_dim"] | None
    out_bias: Float[Array, "embed"] | None
    gate_kernel: Float[Array, "embed heads head_dim"] | None
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    attention: AttentionFunction = eqx.field(static=True)
    rotary: Rotary | None = eqx.field(static=True)
    scale: float | None = eqx.field(static=True)
    window: int | None = eqx.field(static=True)

    def __init__(
        self,
        embed_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rotary: Rotary | None = Rotary(),  # noqa: B008
        bias: bool = False,
        out_bias: bool = False,
        gate: bool = False,
        norm_epsilon: float | None = None,
        window: int | None = None,
        scale: float | None = None,
        out_scale: float = 1.0,
        attention: AttentionFunction = causal_attention,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `embed_size`, `num_heads`, `num_kv_heads`, `head_dim`: sizes; `num_kv_heads` divides
            `num_heads`.
        - `rotary`: the positional encoding of queries and keys; `None` for none: positions then
            serve the mask alone.
        - `bias`: whether queries, keys and values have biases, which are 0 at first.
        - `out_bias`: whether the output has one, which is 0 at first.
        - `gate`: whether each head's output has a gate.
        - `norm_epsilon`: the epsilon of norms of queries and keys; `None` for no norms.
        - `window`: how many positions a position sees, itself included; `None` for all before it.
        - `scale`: of the attention logits; `1 / sqrt(head_dim)` if `None`. For another one
            the query's initial values make up, as in MaxText, which has a scale of 1.
        - `out_scale`: multiplies the initial output kernel.
        - `attention`: the attention function, with the arguments of `causal_attention`.
        - `key`: for the initial values.
        """
        for name, size in (
            ("embed_size", embed_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
        ):
            check_integer(name, size, at_least=1)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"`num_kv_heads` must divide `num_heads`; got {num_kv_heads} and {num_heads}."
            )
        if scale is not None:
            scale = check_number("scale", scale, above=0)
        if window is not None:
            window = check_integer("window", window, at_least=1, at_most=2**31 - 1)
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        query_scale = 1.0 if scale is None else 1 / (scale * math.sqrt(head_dim))
        self.query_kernel = fan_in_normal(
            query_key, (embed_size, num_heads, head_dim), embed_size, query_scale
        )
        kv_shape = (embed_size, num_kv_heads, head_dim)
        self.key_kernel = fan_in_normal(key_key, kv_shape, embed_size)
        self.value_kernel = fan_in_normal(value_key, kv_shape, embed_size)
        self.out_kernel = fan_in_normal(
            out_key, (num_heads, head_dim, embed_size), num_heads * head_dim, out_scale
        )
        has_bias = check_flag("bias", bias)
        self.query_bias = jnp.zeros((num_heads, head_dim)) if has_bias else None
        self.key_bias = jnp.zeros((num_kv_heads, head_dim)) if has_bias else None
        self.value_bias = jnp.zeros((num_kv_heads, head_dim)) if has_bias else None
        self.out_bias = jnp.zeros(embed_size) if check_flag("out_bias", out_bias) else None
        gate_shape, gate_key = (embed_size, num_heads, head_dim), jax.random.fold_in(query_key, 1)
        has_gate = check_flag("gate", gate)
        self.gate_kernel = fan_in_normal(gate_key, gate_shape, embed_size) if has_gate else None
        has_norm = norm_epsilon is not None
        self.query_norm = RMSNorm(head_dim, epsilon=norm_epsilon) if has_norm else None
        self.key_norm = RMSNorm(head_dim, epsilon=norm_epsilon) if has_norm else None
        self.attention = attention
        self.rotary = rotary
        self.scale = scale
        self.window = window

    @checked
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Attends; see `AbstractDecoderLayer` for the arguments."""
        query, key, value = self._project(hidden_states, position_ids)
        attended = self._attend(query, key, value, position_ids, segment_ids)
        return self._project_out(hidden_states, attended)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> KeyValueCache:
        """An empty cache; see `AbstractCachedDecoderLayer`."""
        _, num_kv_heads, head_dim = self.key_kernel.shape
        return KeyValueCache(
            jnp.zeros((batch_size, num_kv_heads, head_dim, max_length), dtype),
            jnp.zeros((batch_size, num_kv_heads, max_length, head_dim), dtype),
        )

    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: KeyValueCache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], KeyValueCache]:
        """Attends to what is cached up to each position; see `AbstractCachedDecoderLayer`."""
        query, key, value = self._project(hidden_states, position_ids)
        attended = cache.attend(query, key, value, position_ids, self.scale, self.window)
        # Adds nothing, but has the cache written after it is read: XLA would copy it otherwise.
        nothing = 0 * attended[:, :, : key.shape[2]]
        return self._project_out(hidden_states, attended), cache.write(
            key + nothing, value + nothing, position_ids
        )

    def prefill(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: KeyValueCache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], KeyValueCache]:
        """Attends among the first positions of rows; see `AbstractCachedDecoderLayer`."""
        query, key, value = self._project(hidden_states, position_ids)
        attended = self._attend(query, key, value, position_ids, None)
        return self._project_out(hidden_states, attended), cache.write_first(key, value)

    def flops_per_token(self, seq_len: int) -> float:
        """Matrices, and the keys and values that a position sees; see `AbstractDecoderLayer`."""
        _, num_heads, head_dim = self.query_kernel.shape
        pairs = num_heads * mean_keys(seq_len, self.window)
        return matrix_flops(self) + 2 * pairs * (head_dim + head_dim)

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        position_ids: Array,
        segment_ids: Array | None,
    ) -> Array:
        return self.attention(
            query,
            key,
            value,
            position_ids=position_ids,
            segment_ids=segment_ids,
            scale=self.scale,
            **({} if self.window is None else {"window": self.window}),
        )

    def _project(self, hidden_states: Array, position_ids: Array) -> tuple[Array, Array, Array]:
        """Query, key and value, with their positions."""

        def project(kernel: Kernel, bias: Array | None, norm: RMSNorm | None) -> Array:
            projected = multiply(hidden_states, kernel)
            if bias is not None:
                projected += bias.astype(projected.dtype)
            return projected if norm is None else norm(projected)

        query = project(self.query_kernel, self.query_bias, self.query_norm)
        key = project(self.key_kernel, self.key_bias, self.key_norm)
        value = project(self.value_kernel, self.value_bias, None)
        if self.rotary is None:
            return query, key, value
        return self.rotary(query, position_ids), self.rotary(key, position_ids), value

    def _project_out(self, hidden_states: Array, attended: Array) -> Array:
        if self.gate_kernel is not None:
            attended *= jax.nn.sigmoid(multiply(hidden_states, self.gate_kernel))
        out = multiply(attended, self.out_kernel, num_inputs=2)
        return out if self.out_bias is None else out + self.out_bias.astype(out.dtype)
