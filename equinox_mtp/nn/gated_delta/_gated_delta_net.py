import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from ..._checks import check_integer
from ..._parameters import matrix_flops
from ..._types import checked
from ...sharding import current_spec
from .._init import fan_in_normal
from .._kernels import multiply
from .._norm import RMSNorm
from .._parts import AbstractAttention
from ._cache import GatedDeltaCache, GatedDeltaInputs, window_of
from ._rule import gated_delta_rule, rule_flops, runs_of

_UNIT_EPSILON = 1e-6


class GatedDeltaNet(AbstractAttention):
    """Linear attention by a state that decays and is corrected: Gated DeltaNet (arXiv 2412.06464).

    Queries, keys and values pass a short causal convolution and silu; queries and keys are
    normalised to length 1, and `gated_delta_rule` reads the state with

        g = -exp(a_log) · softplus(x·W_decay + dt_bias),  β = sigmoid(x·W_beta)

    What is read is normalised in each head, multiplied with `silu(x·W_gate)`, and projected. There
    is no positional encoding. The state, decays and norms are float32. Every row is run from its
    beginning: its positions may not be split over devices, nor be reordered.

    >>> layer = emtp.nn.GatedDeltaNet(16, 1, 2, 4, 8, key=jax.random.key(0))
    >>> layer(jnp.ones((1, 3, 16)), position_ids=jnp.asarray([[0, 1, 2]])).shape
    (1, 3, 16)
    """

    takes_rollback: ClassVar[bool] = True
    # What `outputs_first` lays out; each of these fields holds an `OutputsFirst` then.
    _kernels: ClassVar = ("query_kernel", "key_kernel", "value_kernel", "gate_kernel", "out_kernel")

    query_kernel: Float[Array, "embed kv_heads head_dim"]
    key_kernel: Float[Array, "embed kv_heads head_dim"]
    value_kernel: Float[Array, "embed heads v_head_dim"]
    gate_kernel: Float[Array, "embed heads v_head_dim"]
    decay_kernel: Float[Array, "embed heads"]
    beta_kernel: Float[Array, "embed heads"]
    query_convolution: Float[Array, "width kv_heads head_dim"]
    key_convolution: Float[Array, "width kv_heads head_dim"]
    value_convolution: Float[Array, "width heads v_head_dim"]
    a_log: Float[Array, "heads"]
    dt_bias: Float[Array, "heads"]
    output_norm: RMSNorm
    out_kernel: Float[Array, "heads v_head_dim embed"]

    def __init__(
        self,
        embed_size: int,
        num_key_heads: int,
        num_value_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        width: int = 4,
        norm_epsilon: float = 1e-6,
        out_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `embed_size`: features of the hidden states.
        - `num_key_heads`, `num_value_heads`: heads of queries and keys, and of values; the first
            divides the second, and each head of keys serves neighbouring heads of values.
        - `key_dim`, `value_dim`: features of each head of queries and keys, and of values.
        - `width`: how many positions the convolution sees, the position itself included.
        - `norm_epsilon`: the epsilon of the output's norm.
        - `out_scale`: multiplies the initial output kernel.
        - `key`: for the initial values. Decays begin as in Mamba-2 (arXiv 2405.21060).
        """
        for name, size in (
            ("embed_size", embed_size),
            ("num_key_heads", num_key_heads),
            ("num_value_heads", num_value_heads),
            ("key_dim", key_dim),
            ("value_dim", value_dim),
            ("width", width),
        ):
            check_integer(name, size, at_least=1)
        if num_value_heads % num_key_heads:
            raise ValueError(
                "`num_key_heads` must divide `num_value_heads`; got "
                f"{num_key_heads} and {num_value_heads}."
            )
        keys = jax.random.split(key, 12)
        of_keys, of_values = (num_key_heads, key_dim), (num_value_heads, value_dim)

        def kernel(key: PRNGKeyArray, *shape: int) -> Array:
            return fan_in_normal(key, (embed_size, *shape), embed_size)

        def convolution(key: PRNGKeyArray, *shape: int) -> Array:
            return fan_in_normal(key, (width, *shape), width)

        self.query_kernel = kernel(keys[0], *of_keys)
        self.key_kernel = kernel(keys[1], *of_keys)
        self.value_kernel = kernel(keys[2], *of_values)
        self.gate_kernel = kernel(keys[3], *of_values)
        self.decay_kernel = kernel(keys[4], num_value_heads)
        self.beta_kernel = kernel(keys[5], num_value_heads)
        self.query_convolution = convolution(keys[6], *of_keys)
        self.key_convolution = convolution(keys[7], *of_keys)
        self.value_convolution = convolution(keys[8], *of_values)
        self.a_log = jnp.log(jax.random.uniform(keys[9], (num_value_heads,), minval=1, maxval=16))
        low, high = math.log(0.001), math.log(0.1)
        steps = jax.random.uniform(keys[10], (num_value_heads,), minval=low, maxval=high)
        steps = jnp.exp(steps)
        self.dt_bias = jnp.log(jnp.expm1(steps))  # the softplus of which is `steps`
        self.output_norm = RMSNorm(value_dim, epsilon=norm_epsilon)
        fan_in = num_value_heads * value_dim
        self.out_kernel = fan_in_normal(keys[11], (*of_values, embed_size), fan_in, out_scale)

    @checked
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Runs rows from their beginning; see `AbstractDecoderLayer` for the arguments.

        Documents do not see one another. `position_ids` do not matter.

        **Raises:** `ValueError` if the rules in force split positions over devices.
        """
        _check_whole_rows()
        read, _ = self._read(self.project(hidden_states), segment_ids=segment_ids)
        return self._project_out(hidden_states, read)

    def project(self, hidden_states: Float[Array, "batch seq embed"]) -> GatedDeltaInputs:
        """What the convolution and the rule take of each position by itself."""
        return GatedDeltaInputs(
            query=multiply(hidden_states, self.query_kernel),
            key=multiply(hidden_states, self.key_kernel),
            value=multiply(hidden_states, self.value_kernel),
            decay=multiply(hidden_states, self.decay_kernel),
            beta=multiply(hidden_states, self.beta_kernel),
        )

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any, *, rollback: int = 0
    ) -> GatedDeltaCache:
        """An empty cache, of the same size for any length; see `AbstractCachedDecoderLayer`."""
        del max_length
        heads, value_dim, embed_size = self.out_kernel.shape
        key_dim = self.key_kernel.shape[-1]
        kept = self._history + check_integer("rollback", rollback, at_least=0)
        shapes = jax.eval_shape(
            self.project, jax.ShapeDtypeStruct((batch_size, kept, embed_size), dtype)
        )
        return GatedDeltaCache(
            jnp.zeros((batch_size, heads, key_dim, value_dim), jnp.float32),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            jnp.zeros(batch_size, jnp.int32),
        )

    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: GatedDeltaCache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], GatedDeltaCache]:
        """Goes on from the state before the first position; see `AbstractCachedDecoderLayer`.

        The result is NaN for a row that goes further back than `rollback` of `init_cache` allows.
        """
        if position_ids.shape[1] == 0:
            return hidden_states, cache
        inputs = cache.continued(self.project(hidden_states), position_ids, self._history)
        count = position_ids[:, -1] + 1 - cache.start
        places = position_ids - cache.start[:, None]
        is_lost = jnp.any((position_ids >= 0) & (places < 0), axis=1)
        read, cache = self._advance(cache, inputs, count)
        places = jnp.clip(places, 0, read.shape[1] - 1)
        read = read[jnp.arange(read.shape[0])[:, None], places]
        read = jnp.where(is_lost[:, None, None, None], jnp.nan, read)
        return self._project_out(hidden_states, read), cache

    def prefill(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: GatedDeltaCache,
        *,
        position_ids: Integer[Array, "batch seq"],
        lengths: Integer[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], GatedDeltaCache]:
        """Runs the first positions of rows; see `AbstractCachedDecoderLayer`."""
        batch, seq = position_ids.shape
        lengths = jnp.full(batch, seq, jnp.int32) if lengths is None else lengths
        # The cache is empty: 0 is what the convolution sees before the first position.
        inputs = jax.tree.map(
            lambda kept, new: jnp.concatenate(
                [kept[:, : self._history], new, kept[:, self._history :]], axis=1
            ),
            cache.inputs,
            self.project(hidden_states),
        )
        read, cache = self._advance(cache, inputs, lengths)
        return self._project_out(hidden_states, read[:, :seq]), cache

    def flops_per_token(self, seq_len: int) -> float:
        """Matrices, convolutions, and the rule by chunks; see `AbstractDecoderLayer`."""
        return matrix_flops(self) + rule_flops(
            seq_len, self.key_kernel.shape[1:], self.value_kernel.shape[1:]
        )

    @property
    def _history(self) -> int:
        """How many positions before its own the convolution sees."""
        return self.key_convolution.shape[0] - 1

    def _advance(
        self, cache: GatedDeltaCache, inputs: GatedDeltaInputs, count: Integer[Array, "batch"]
    ) -> tuple[Array, GatedDeltaCache]:
        """What positions from the cache's first one on read, and the cache after `count` of them.

        `inputs` begin with the history of that position.
        """
        num_kept = cache.inputs.key.shape[1]
        rollback = num_kept - self._history
        passed = jnp.clip(count - rollback, 0, inputs.key.shape[1] - num_kept)
        read, state = self._read(inputs, state=cache.state, num_kept=passed, history=self._history)
        kept = window_of(inputs, passed, num_kept)
        return read, GatedDeltaCache(state, kept, cache.start + passed)

    def _read(
        self,
        inputs: GatedDeltaInputs,
        *,
        segment_ids: Array | None = None,
        state: Array | None = None,
        num_kept: Array | None = None,
        history: int = 0,
    ) -> tuple[Array, Array]:
        """What the rule reads; the first `history` inputs are for the convolution alone."""
        runs = None if segment_ids is None else runs_of(segment_ids)

        def convolve(x: Array, kernel: Array) -> Array:
            return jax.nn.silu(_causal_convolution(x, kernel.astype(x.dtype), runs))[:, history:]

        decay, beta = (x[:, history:].astype(jnp.float32) for x in (inputs.decay, inputs.beta))
        key = _of_length_one(convolve(inputs.key, self.key_convolution))
        query = _of_length_one(convolve(inputs.query, self.query_convolution))
        return gated_delta_rule(
            query / math.sqrt(query.shape[-1]),
            key,
            convolve(inputs.value, self.value_convolution),
            -jnp.exp(self.a_log.astype(jnp.float32)) * jax.nn.softplus(decay + self.dt_bias),
            jax.nn.sigmoid(beta),
            segment_ids=runs,
            state=state,
            num_kept=num_kept,
        )

    def _project_out(self, hidden_states: Array, read: Array) -> Array:
        dtype = hidden_states.dtype
        gate = multiply(hidden_states, self.gate_kernel)
        gated = self.output_norm(read) * jax.nn.silu(gate.astype(jnp.float32))
        return multiply(gated.astype(dtype), self.out_kernel, num_inputs=2)


def _causal_convolution(
    x: Float[Array, "batch seq heads head_dim"],
    kernel: Float[Array, "width heads head_dim"],
    runs: Integer[Array, "batch seq"] | None,
) -> Array:
    """Each feature by itself, over its last `width` positions of one document; in float32."""
    width, out = kernel.shape[0], jnp.zeros(x.shape, jnp.float32)
    for distance in range(width):
        weighted = x.astype(jnp.float32) * kernel[width - 1 - distance].astype(jnp.float32)
        shifted = _shifted(weighted, distance)
        if runs is not None:
            is_same = runs == _shifted(runs, distance)
            shifted = jnp.where(is_same[:, :, None, None], shifted, 0)
        out += shifted
    return out


def _shifted(x: Array, distance: int) -> Array:
    """To the right; 0 from the left."""
    distance = min(distance, x.shape[1])
    padding = [(0, 0, 0)] * x.ndim
    padding[1] = (distance, -distance, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), padding)


def _of_length_one(x: Array) -> Array:
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _UNIT_EPSILON)


def _check_whole_rows() -> None:
    spec, mesh = current_spec("batch seq"), jax.sharding.get_abstract_mesh()
    axes = () if spec is None or spec[1] is None else spec[1]
    axes = (axes,) if isinstance(axes, str) else axes
    if math.prod(mesh.shape[name] for name in axes) > 1:
        raise ValueError(
            "`rules` must not split positions over devices for a `GatedDeltaNet`, which runs rows "
            f"from their beginning; got `seq` over {axes}. Take a mesh without such an axis, or "
            "`rules.replace(seq=None)`."
        )
