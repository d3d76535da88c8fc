import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from .._checks import check_integer
from .._parameters import matrix_flops
from .._types import checked
from ..attention import AttentionFunction, causal_attention
from ._init import fan_in_normal
from ._kernels import cast_matrices, multiply, outputs_first
from ._latent_cache import LatentCache
from ._linear import Linear
from ._norm import RMSNorm
from ._parts import AbstractAttention, mean_keys
from ._rotary import Rotary


class _LatentUp(eqx.Module):
    """The up-projections of keys and values, laid out for decoding: each head reads a part."""

    key: Float[Array, "heads head_dim kv_rank"]
    value: Float[Array, "heads v_head_dim kv_rank"]


class MultiHeadLatentAttention(AbstractAttention):
    r"""Causal self-attention over a compressed latent of keys and values.

    With the hidden state h of a position, its latents `c = norm(h · down)`, and rotation R:

        query_i = [ c_q · up_q_i , R(c_q · up_r_i) ]
        key_i   = [ c · up_k_i , R(h · down_r) ]        value_i = c · up_v_i

    The rotated part of the keys is one for all heads i. `c` and that part are all that decoding
    keeps of a position, and attends to: `up_k_i` multiplies the query, and `up_v_i` what is
    attended. DeepSeek-V2 (arXiv 2405.04434, §2.1) and DeepSeek-V3 (arXiv 2412.19437, §2.1.1). Runs
    in the dtype of its input.

    Logits are multiplied by `1 / sqrt(qk_nope_head_dim + qk_rope_head_dim)`, and by the
    `softmax_factor` of the rotary scaling, as in DeepSeek's code.

    >>> attention = emtp.nn.MultiHeadLatentAttention(
    ...     embed_size=16,
    ...     num_heads=2,
    ...     q_lora_rank=12,
    ...     kv_lora_rank=6,
    ...     qk_nope_head_dim=8,
    ...     qk_rope_head_dim=4,
    ...     v_head_dim=8,
    ...     key=jax.random.key(0),
    ... )
    >>> attention(jnp.ones((1, 3, 16)), position_ids=jnp.asarray([[0, 1, 2]])).shape
    (1, 3, 16)
    >>> cache = attention.init_cache(batch_size=1, max_length=5, dtype=jnp.float32)
    >>> cache.latent.shape, cache.rotary_key.shape  # for all heads
    ((1, 5, 6), (1, 5, 4))

    **Fields:**

    - `query_kernel`: from hidden states to the features of a head that are not rotated, and those
        that are; `None` with `q_lora_rank`.
    - `query_down`, `query_norm`, `query_up_kernel`: the same by way of a latent; `None` without it.
    - `latent_down`: to the latent, and the rotated part of the keys.
    - `up_kernel`: from the latent to the keys of a head, but for the rotated part, and its values.
        After `for_decoding` a module that holds them apart.
    """

    # What `outputs_first` lays out; each of these fields holds an `OutputsFirst` then.
    _kernels: ClassVar = ("query_kernel", "query_up_kernel", "out_kernel")

    query_kernel: Float[Array, "embed heads head_dim"] | None
    query_down: Linear | None
    query_norm: RMSNorm | None
    query_up_kernel: Float[Array, "query_rank heads head_dim"] | None
    latent_down: Linear
    latent_norm: RMSNorm
    up_kernel: Float[Array, "kv_rank heads kv_head_dim"] | _LatentUp
    out_kernel: Float[Array, "heads v_head_dim embed"]
    attention: AttentionFunction = eqx.field(static=True)
    rotary: Rotary = eqx.field(static=True)

    def __init__(
        self,
        embed_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rotary: Rotary = Rotary(interleaved=True),  # noqa: B008
        norm_epsilon: float = 1e-6,
        out_scale: float = 1.0,
        attention: AttentionFunction = causal_attention,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `embed_size`, `num_heads`: sizes.
        - `q_lora_rank`: features of the queries' latent; `None` for queries from hidden states.
        - `kv_lora_rank`: features of the latent of keys and values.
        - `qk_nope_head_dim`, `qk_rope_head_dim`: features of queries and keys in each head that are
            not rotated, and those that are.
        - `v_head_dim`: features of values in each head.
        - `rotary`: the positional encoding, of `qk_rope_head_dim` features.
        - `norm_epsilon`: the epsilon of the latents' norms.
        - `out_scale`: multiplies the initial output kernel.
        - `attention`: the attention function, with the arguments of `causal_attention`.
        - `key`: for the initial values.

        **Raises:** `ValueError` for a size that is missing or below 1, an odd `qk_rope_head_dim`,
        or a `rotary` of another size.
        """
        sizes = {
            "embed_size": embed_size,
            "num_heads": num_heads,
            "kv_lora_rank": kv_lora_rank,
            "qk_nope_head_dim": qk_nope_head_dim,
            "qk_rope_head_dim": qk_rope_head_dim,
            "v_head_dim": v_head_dim,
        }
        for name, size in sizes.items():
            check_integer(name, size, at_least=1)
        if q_lora_rank is not None:
            check_integer("q_lora_rank", q_lora_rank, at_least=1)
        _check_rotary(rotary, qk_rope_head_dim)
        keys = jax.random.split(key, 5)
        query_size = embed_size if q_lora_rank is None else q_lora_rank
        query_shape = (query_size, num_heads, qk_nope_head_dim + qk_rope_head_dim)
        query_kernel = fan_in_normal(keys[1], query_shape, query_size)
        self.query_kernel, self.query_up_kernel = query_kernel, None
        self.query_down, self.query_norm = None, None
        if q_lora_rank is not None:
            self.query_kernel, self.query_up_kernel = None, query_kernel
            self.query_down = Linear(embed_size, q_lora_rank, key=keys[0])
            self.query_norm = RMSNorm(q_lora_rank, epsilon=norm_epsilon)
        self.latent_down = Linear(embed_size, kv_lora_rank + qk_rope_head_dim, key=keys[2])
        self.latent_norm = RMSNorm(kv_lora_rank, epsilon=norm_epsilon)
        up_shape = (kv_lora_rank, num_heads, qk_nope_head_dim + v_head_dim)
        self.up_kernel = fan_in_normal(keys[3], up_shape, kv_lora_rank)
        out_shape = (num_heads, v_head_dim, embed_size)
        self.out_kernel = fan_in_normal(keys[4], out_shape, num_heads * v_head_dim, out_scale)
        self.attention = attention
        self.rotary = rotary

    @checked
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Attends; see `AbstractDecoderLayer` for the arguments."""
        query, rotary_query = self._query(hidden_states, position_ids)
        latent, rotary_key = self._latent(hidden_states, position_ids)
        return self._attend((query, rotary_query), (latent, rotary_key), position_ids, segment_ids)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> LatentCache:
        """An empty cache; see `AbstractCachedDecoderLayer`."""
        rank, both = self.latent_norm.scale.shape[0], self.latent_down.kernel.shape[1]
        return LatentCache(
            jnp.zeros((batch_size, max_length, rank), dtype),
            jnp.zeros((batch_size, max_length, both - rank), dtype),
        )

    def for_decoding(self, dtype: Any) -> "MultiHeadLatentAttention":
        """With matrices of `dtype`, and up-projections as decoding multiplies by them."""
        with_parts = eqx.tree_at(lambda attention: attention.up_kernel, self, self._up())
        return outputs_first(cast_matrices(with_parts, dtype))

    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: LatentCache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], LatentCache]:
        """Attends to what is cached up to each position; see `AbstractCachedDecoderLayer`.

        In the latents themselves: no key or value of a cached position is computed.
        """
        query, rotary_query = self._query(hidden_states, position_ids)
        latent, rotary_key = self._latent(hidden_states, position_ids)
        up, dtype = self._up(), hidden_states.dtype
        latent_query = jnp.einsum("bshd,hdr->bshr", query, up.key.astype(dtype))
        attended = cache.attend(
            latent_query, rotary_query, latent, rotary_key, position_ids, self._scale
        )
        # Adds nothing, but has the cache written after it is read: XLA would copy it otherwise.
        nothing = 0 * attended[:, :, 0, :1]
        cache = cache.write(latent + nothing, rotary_key + nothing, position_ids)
        values = jnp.einsum("bshr,hdr->bshd", attended, up.value.astype(dtype))
        return self._project_out(values), cache

    def prefill(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: LatentCache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], LatentCache]:
        """Attends among the first positions of rows; see `AbstractCachedDecoderLayer`."""
        queries = self._query(hidden_states, position_ids)
        latents = self._latent(hidden_states, position_ids)
        return self._attend(queries, latents, position_ids, None), cache.write_first(*latents)

    def flops_per_token(self, seq_len: int) -> float:
        """As trained, with keys and values of each head; see `AbstractDecoderLayer`."""
        num_heads, value_dim, _ = self.out_kernel.shape
        pairs = num_heads * mean_keys(seq_len)
        return matrix_flops(self) + 2 * pairs * (self._head_dim + value_dim)

    @property
    def _head_dim(self) -> int:
        """Features of a query and a key."""
        kernel = self.query_up_kernel if self.query_kernel is None else self.query_kernel
        assert kernel is not None
        return kernel.shape[-1]

    @property
    def _scale(self) -> float:
        scaling = self.rotary.scaling
        factor = 1.0 if scaling is None else scaling.softmax_factor
        return factor / math.sqrt(self._head_dim)

    def _up(self) -> _LatentUp:
        """The up-projections of keys and of values."""
        if isinstance(self.up_kernel, _LatentUp):
            return self.up_kernel
        kernel = self.up_kernel.transpose(1, 2, 0)
        num_values = self.out_kernel.shape[-2]
        return _LatentUp(kernel[:, :-num_values], kernel[:, -num_values:])

    def _query(self, hidden_states: Array, position_ids: Array) -> tuple[Array, Array]:
        """Queries of all heads: what is not rotated of them, and what is."""
        latent, kernel = hidden_states, self.query_kernel
        if self.query_down is not None and self.query_norm is not None:
            latent, kernel = self.query_norm(self.query_down(latent)), self.query_up_kernel
        assert kernel is not None
        query = multiply(latent, kernel)
        rotated = self.latent_down.kernel.shape[1] - self.latent_norm.scale.shape[0]
        return query[..., :-rotated], self.rotary(query[..., -rotated:], position_ids)

    def _latent(self, hidden_states: Array, position_ids: Array) -> tuple[Array, Array]:
        """What a cache keeps: normed latents, and the rotated part of the keys."""
        both, rank = self.latent_down(hidden_states), self.latent_norm.scale.shape[0]
        rotary_key = self.rotary(both[:, :, None, rank:], position_ids)
        return self.latent_norm(both[..., :rank]), rotary_key[:, :, 0]

    def _attend(
        self,
        queries: tuple[Array, Array],
        latents: tuple[Array, Array],
        position_ids: Array,
        segment_ids: Array | None,
    ) -> Array:
        """Among the positions themselves, whose keys and values are computed."""
        (latent, rotary_key), up, dtype = latents, self._up(), latents[0].dtype
        key, value = (
            jnp.einsum("bsr,hdr->bshd", latent, kernel.astype(dtype))
            for kernel in (up.key, up.value)
        )
        shared = jnp.broadcast_to(rotary_key[:, :, None], queries[1].shape)
        attended = self.attention(
            jnp.concatenate(queries, axis=-1),
            jnp.concatenate([key, shared], axis=-1),
            value,
            position_ids=position_ids,
            segment_ids=segment_ids,
            scale=self._scale,
        )
        return self._project_out(attended)

    def _project_out(self, attended: Array) -> Array:
        return multiply(attended, self.out_kernel, num_inputs=2)


def _check_rotary(rotary: Rotary, rotary_size: int) -> None:
    """**Raises:** `ValueError` if it does not rotate all of these features, in pairs."""
    if rotary_size % 2:
        raise ValueError(
            f"`qk_rope_head_dim` must be even, as features are rotated in pairs; got {rotary_size}."
        )
    if rotary.size not in (None, rotary_size):
        raise ValueError(
            f"`rotary` must rotate the {rotary_size} features of `qk_rope_head_dim`; got one of "
            f"size {rotary.size}. Leave its `size` out."
        )
