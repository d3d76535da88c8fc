"""The gated delta rule, chunk by chunk: one scan for training, prefill and decoding."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Integer

from ..._types import checked

CHUNK_SIZE = 64
"""Positions that are computed at once, by products of matrices; a power of 2.

As measured in `tests/benchmarks/gated_delta.py` for heads of 128 features."""


@checked
def gated_delta_rule(
    query: Float[Array, "batch seq kv_heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq heads v_head_dim"],
    log_decay: Float[Array, "batch seq heads"],
    beta: Float[Array, "batch seq heads"],
    *,
    segment_ids: Integer[Array, "batch seq"] | None = None,
    state: Float32[Array, "batch heads head_dim v_head_dim"] | None = None,
    num_kept: Integer[Array, "batch"] | None = None,
) -> tuple[
    Float32[Array, "batch seq heads v_head_dim"],
    Float32[Array, "batch heads head_dim v_head_dim"],
]:
    """Reads from a state that decays, and that each position corrects at its key.

        S_t = exp(g_t) S_{t-1} + k_t (β_t (v_t - exp(g_t) S_{t-1}ᵀ k_t))ᵀ
        o_t = S_tᵀ q_t

    Gated DeltaNet (arXiv 2412.06464, §3.1) in its chunked form (§3.3): the corrections of a chunk
    of positions solve a triangular system (the UT transform), and a scan over chunks carries the
    state. Time and memory are linear in the number of positions. Computed in float32. A chunk of
    one position is the recurrence itself.

    >>> one = jnp.ones((1, 1, 1, 1))
    >>> read, state = emtp.nn.gated_delta_rule(
    ...     one, one, 2 * one, jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), 0.5)
    ... )
    >>> print(state)  # half of the way from 0 to 2
    [[[[1.]]]]

    **Arguments:**

    - `query`, `key`: of length 1, the query times its scale. Each of their heads serves
        `heads / kv_heads` heads of values that follow one another.
    - `value`: what the state should give at the key.
    - `log_decay`: g, at most 0.
    - `beta`: β, how much of the way the state goes, in 0 … 1.
    - `segment_ids`: which document each position belongs to, a run of equal ids; each begins with a
        state of 0.
    - `state`: S before the first position, 0 if `None`.
    - `num_kept`: after how many positions of a row its state is returned; after all if `None`.

    **Returns:** o, and the state.

    **Raises:** `ValueError` if `kv_heads` does not divide `heads`.
    """
    batch, seq, kv_heads, head_dim = key.shape
    heads, value_dim = value.shape[2:]
    if heads % kv_heads:
        raise ValueError(f"`kv_heads` must divide `heads`; got {kv_heads} and {heads}.")
    if state is None:
        state = jnp.zeros((batch, heads, head_dim, value_dim), jnp.float32)
    if seq == 0:
        return value.astype(jnp.float32), state
    size = _chunk_size(seq)
    split = (kv_heads, heads // kv_heads)
    chunks = _prepare(
        _in_chunks(query, size),
        _in_chunks(key, size),
        _in_chunks(value.reshape(batch, seq, *split, value_dim), size),
        _in_chunks(log_decay.reshape(batch, seq, *split), size),
        _in_chunks(beta.reshape(batch, seq, *split), size),
        None if segment_ids is None else _in_chunks(runs_of(segment_ids), size, mode="edge"),
    )
    starts = size * jnp.arange(chunks.key.shape[0])
    ends = None if num_kept is None else jnp.clip(num_kept - starts[:, None], 0, size)

    def run_chunk(
        states: tuple[Array, Array], inputs: tuple[_Chunk, Array | None]
    ) -> tuple[tuple[Array, Array], Array]:
        state, kept = states
        chunk, end = inputs
        read, corrections = chunk.read(state)
        if end is not None:
            is_here = (end > 0)[:, None, None, None, None]
            kept = jnp.where(is_here, chunk.state_after(end, state, corrections), kept)
        return (chunk.state_after(None, state, corrections), kept), read

    state = state.reshape(batch, *split, head_dim, value_dim)
    (last, kept), read = lax.scan(run_chunk, (state, state), (chunks, ends))
    # [chunks batch kv_heads group size value_dim] to positions and heads.
    read = read.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, value_dim)
    state = last if num_kept is None else kept
    return read[:, :seq], state.reshape(batch, heads, head_dim, value_dim)


class _Chunk(NamedTuple):
    """What each position of a chunk does, whatever the state before it.

    `group` are the heads of values that share a key. Chunks lie on an axis in front of these.

    - `decay`: of what position j wrote, until position i ≥ j; 0 across documents, and for j > i.
    - `entry`: of the state before the chunk, until position i.
    - `scores`: of position i's query with the key of j ≤ i, decayed.
    - `value`, `erased`: solutions of the triangular system: the corrections are `value` less what
        the state before the chunk gives at the keys `erased`.
    """

    query: Float[Array, "batch kv_heads size head_dim"]
    key: Float[Array, "batch kv_heads size head_dim"]
    decay: Float[Array, "batch kv_heads group size size"]
    entry: Float[Array, "batch kv_heads group size"]
    scores: Float[Array, "batch kv_heads group size size"]
    value: Float[Array, "batch kv_heads group size v_head_dim"]
    erased: Float[Array, "batch kv_heads group size head_dim"]

    def read(self, state: Array) -> tuple[Array, Array]:
        """What the positions read, and by what they correct the state at their keys."""
        corrections = self.value - self.erased @ state
        from_state = self.entry[..., None] * jnp.einsum("bksd,bkgdv->bkgsv", self.query, state)
        return from_state + self.scores @ corrections, corrections

    def state_after(self, end: Array | None, state: Array, corrections: Array) -> Array:
        """The state after `end` positions of each row, at least 1; after all if `None`."""
        if end is None:
            decay, entry = self.decay[..., -1, :], self.entry[..., -1]
        else:
            row = jnp.maximum(end - 1, 0)[:, None, None, None]
            decay = jnp.take_along_axis(self.decay, row[..., None], axis=-2)[..., 0, :]
            entry = jnp.take_along_axis(self.entry, row, axis=-1)[..., 0]
        written = decay[..., None] * corrections
        return entry[..., None, None] * state + jnp.einsum("bksd,bkgsv->bkgdv", self.key, written)


def _in_chunks(x: Array, size: int, mode: str = "constant") -> Array:
    """From `[batch seq … features]` to `[chunks batch … size features]`; runs have no features.

    Positions that are added at the end change no state: they decay nothing, and correct nothing.
    """
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % size)
    x = jnp.pad(x, padding, mode=mode)  # pyright: ignore[reportArgumentType]
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _prepare(
    query: Array, key: Array, value: Array, log_decay: Array, beta: Array, runs: Array | None
) -> _Chunk:
    """All chunks at once: what does not depend on the state."""
    query, key, value = (jnp.moveaxis(x.astype(jnp.float32), 2, -2) for x in (query, key, value))
    log_decay, beta = (jnp.moveaxis(x.astype(jnp.float32), 2, -1) for x in (log_decay, beta))
    size = key.shape[-2]
    is_seen = jnp.tril(jnp.ones((size, size), bool))
    total, is_first = jnp.cumsum(log_decay, axis=-1), True
    if runs is not None:
        # A document's run counts from 0 in its row: the state before chunk 0 is that of run 0.
        before = jnp.concatenate([jnp.zeros_like(runs[:1, :, -1]), runs[:-1, :, -1]])
        is_seen = is_seen & (runs[..., None] == runs[..., None, :])[:, :, None, None]
        # Of each document by itself: what others decay is not even in the rounding.
        total = jnp.sum(jnp.where(is_seen, log_decay[..., None, :], 0), axis=-1)
        is_first = (runs == before[..., None])[:, :, None, None]
    entry = jnp.where(is_first, jnp.exp(total), 0)
    # Before the exponential: above the diagonal it could overflow.
    difference = jnp.where(is_seen, total[..., None] - total[..., None, :], -jnp.inf)
    decay = jnp.exp(difference)
    overlaps = (key @ jnp.matrix_transpose(key))[:, :, :, None]
    keys = (beta * entry)[..., None] * key[:, :, :, None]
    inverse = _inverse(beta[..., None] * overlaps * decay)
    value, erased = inverse @ (beta[..., None] * value), inverse @ keys
    scores = (query @ jnp.matrix_transpose(key))[:, :, :, None] * decay
    return _Chunk(query, key, decay, entry, scores, value, erased)


def _inverse(system: Float[Array, "... size size"]) -> Float[Array, "... size size"]:
    """The inverse of 1 + the part of a matrix below its diagonal; `size` is a power of 2.

    By halves, of both at once: products of matrices alone, which XLA's CPU runs several times as
    fast as its triangular solver. A series in powers of the matrix would overflow.
    """
    size = system.shape[-1]
    if size == 1:
        return jnp.ones_like(system)
    half = size // 2
    diagonal = jnp.stack([system[..., :half, :half], system[..., half:, half:]])
    first, last = _inverse(diagonal)
    below = -last @ system[..., half:, :half] @ first
    above = jnp.concatenate([first, jnp.zeros_like(below)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([below, last], axis=-1)], axis=-2)


def _chunk_size(seq: int) -> int:
    return min(1 << (seq - 1).bit_length(), CHUNK_SIZE)  # a power of 2


def rule_flops(seq: int, keys: tuple[int, ...], values: tuple[int, ...]) -> float:
    """The operations of the products of `gated_delta_rule` for a position.

    With C positions in a chunk, K heads of d features of keys, and H of v features of values:

        overlaps, scores                   K · 2 (C d + C d)
        inverse                            H · 2/3 (C² - 1)
        value, erased                      H · 2 (C v + C d)
        corrections, reads, scores, state  H · 2 (d v + d v + C v + d v)

    `_inverse` multiplies four halves of s/2 rows, at s = 2, 4, … C: Σ C/s · 4 (s/2)³ a chunk.
    """
    size, (num_keys, key_dim), (num_values, value_dim) = _chunk_size(seq), keys, values
    inverse = 2 / 3 * (size**2 - 1)
    solved = 2 * size * (value_dim + key_dim)
    read = 2 * (3 * key_dim * value_dim + size * value_dim)
    in_chunks = num_keys * 4 * size * key_dim + num_values * (inverse + solved + read)
    return in_chunks * size * math.ceil(seq / size) / seq


def runs_of(segment_ids: Integer[Array, "batch seq"]) -> Integer[Array, "batch seq"]:
    """The number of each position's document in its row, from 0."""
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(begins, axis=1), ((0, 0), (1, 0)))
