"""Losses at the edges of floating point: large offsets, narrow dtypes, float64, NaN, no tokens."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HeadOracle, as_float64, assert_close, assert_equal
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from equinox_mtp import (
    HeadSharding,
    LinearHead,
    linear_cross_entropy,
    summed_linear_cross_entropy,
)
from equinox_mtp._platform import operations_per_byte
from equinox_mtp.cross_entropy import _tile_sizes

BATCH, SEQ, EMBED, VOCAB = 2, 6, 4, 11
TILES: dict[str, Any] = {"token_tile": 4, "vocab_tile": 3}

# Every way to compute Σ weight · nll of hidden states, head matrix and ids.
Loss = Callable[..., jax.Array]


def by_token(hidden: Any, head: Any, ids: Any, weights: Any) -> jax.Array:
    return jnp.sum(weights * linear_cross_entropy(hidden, head, ids).negative_log_likelihood)


def summed(hidden: Any, head: Any, ids: Any, weights: Any) -> jax.Array:
    return summed_linear_cross_entropy(hidden, head, ids, weights).loss


_LOSSES: dict[str, Loss] = {
    "by_token": lambda h, w, *rest: by_token(h, LinearHead(w, **TILES), *rest),
    "summed": lambda h, w, *rest: summed(h, LinearHead(w, **TILES), *rest),
    "recomputed": lambda h, w, *rest: summed(
        h, LinearHead(w, recompute_logits=True, **TILES), *rest
    ),
    "callable": lambda h, w, *rest: summed(
        h, lambda x: jnp.einsum("bse,ve->bsv", x, w.astype(x.dtype)), *rest
    ),
}
# Of the same shapes and dtypes each is compiled once.
LOSSES = {name: jax.jit(loss) for name, loss in _LOSSES.items()}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def make_case(dtype: Any = jnp.float32) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.standard_normal((BATCH, SEQ, EMBED)), dtype),
        jnp.asarray(rng.standard_normal((VOCAB, EMBED)), dtype),
        jnp.asarray(rng.integers(0, VOCAB, (BATCH, SEQ)), jnp.int32),
        jnp.asarray(rng.random((BATCH, SEQ)), jnp.float32),
    )


def exact(hidden: Any, head: Any, ids: Any, weights: Any) -> tuple[float, list[np.ndarray]]:
    oracle = HeadOracle(as_float64(hidden), as_float64(head), None, np.asarray(ids))
    value, gradients = oracle.summed(as_float64(weights), 0.0)
    return value, gradients[:2]


# An offset that all logits share


@each_loss
@pytest.mark.parametrize("offset", [1e4, 1e6, 1e8, 1e30, -1e30])
def test_a_common_offset_changes_nothing(loss: Loss, offset: float) -> None:
    one, ids, weights = jnp.ones((1, 1, 1)), jnp.zeros((1, 1), int), jnp.ones((1, 1))
    value_and_grad = jax.value_and_grad(lambda head: loss(one, head, ids, weights))
    value, gradient = value_and_grad(jnp.full((3, 1), offset))
    assert_close(value, np.log(3.0), rtol=2e-7, atol=0)
    assert_close(gradient, np.array([[-2 / 3], [1 / 3], [1 / 3]]), rtol=2e-7, atol=0)


@each_loss
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_large_logits_are_as_exact_as_log_softmax(loss: Loss, offset: float) -> None:
    # The last feature adds the offset; logits are exact in float32, as the rest are quarters.
    rng = np.random.default_rng(1)
    hidden = np.concatenate([np.eye(4)[:3], np.ones((3, 1))], axis=1)[None]
    head = np.concatenate([rng.integers(-8, 8, (VOCAB, 4)) / 4, np.full((VOCAB, 1), offset)], 1)
    ids, weights = np.array([[0, 3, 10]]), np.array([[1.0, 0.5, 2.0]])
    arrays = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    value, gradients = jax.value_and_grad(
        lambda arrays: loss(*arrays, jnp.asarray(ids), jnp.asarray(weights, jnp.float32))
    )(arrays)
    exact_value, exact_gradients = exact(hidden, head, ids, weights)
    assert_close(value, exact_value, rtol=1e-6)
    # Of the feature that holds the offset, Σ (softmax - onehot) · offset is all rounding error.
    assert_close(gradients[0][..., :-1], exact_gradients[0][..., :-1], rtol=1e-5)
    assert_close(gradients[1], exact_gradients[1], rtol=1e-5)


def test_an_offset_under_a_soft_cap_and_over_a_split_vocabulary() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    ids, weights = jnp.asarray([[0], [5]]), jnp.ones((2, 1))
    hidden = jnp.ones((2, 1, 1))
    for cap, offset in ((None, 1e8), (3e7, 1e9)):
        head = jnp.full((8, 1), offset).at[2:4].add(0.0)
        placed = jax.device_put(head, NamedSharding(mesh, P("tensor")))
        sharding = HeadSharding(mesh, batch="data", vocab="tensor")

        def loss(matrix: jax.Array, sharding: Any = sharding, cap: Any = cap) -> jax.Array:
            return summed(hidden, LinearHead(matrix, soft_cap=cap, sharding=sharding), ids, weights)

        value, gradient = jax.jit(jax.value_and_grad(loss))(placed)
        assert_close(value, 2 * np.log(8.0), rtol=2e-7)
        if cap is None:
            expected = np.full((8, 1), 0.25)
            expected[[0, 5]] -= 1
            assert_close(gradient, expected, rtol=1e-6)


def test_predictions_are_none_of_the_ids_where_logits_are_not_finite() -> None:
    hidden, head, ids, _ = make_case()
    hidden = hidden.at[0, 1, 0].set(jnp.nan).at[1, 2, 0].set(jnp.inf)
    finite = np.argmax(as_float64(hidden) @ as_float64(head).T, axis=-1)
    finite[0, 1] = finite[1, 2] = -1
    for output_head in (head, LinearHead(head, **TILES), lambda x: x @ head.T):
        out = linear_cross_entropy(hidden, output_head, ids)
        assert_equal(out.predictions, finite.astype(np.int32))


# Narrow dtypes


@pytest.mark.parametrize("loss", ["summed", "recomputed"])
def test_the_float16_gradient_of_a_mean_over_many_tokens(loss: str) -> None:
    tokens = 2**17
    hidden = jnp.ones((1, tokens, 1), jnp.float16)
    head = LinearHead(jnp.zeros((2, 1), jnp.float16), recompute_logits=loss == "recomputed")
    ids, weights = jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens))

    def mean(head: LinearHead) -> jax.Array:
        return summed(hidden, head, ids, weights) / tokens

    assert_close(jax.grad(mean)(head).weight, np.array([[-0.5], [0.5]]), rtol=1e-3)


@pytest.mark.parametrize("name", ["by_token", "summed", "recomputed"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_small_weights_are_not_lost_in_narrow_dtypes(name: str, dtype: Any) -> None:
    # Unlikely ids: weight · softmax is about 4e-9, below what float16 holds.
    rng = np.random.default_rng(2)
    hidden = jnp.asarray(rng.standard_normal((1, 8, 16)), dtype)
    head = jnp.asarray(rng.standard_normal((4096, 16)) / 16, dtype)
    ids = jnp.asarray(rng.integers(0, 4096, (1, 8)), jnp.int32)
    weights = jnp.full((1, 8), 1 / 8192, jnp.float32)
    scale = 2.0**14

    def scaled(arrays: tuple[Any, Any]) -> jax.Array:
        return scale * LOSSES[name](*arrays, ids, weights)

    gradients = jax.grad(scaled)((hidden, head))
    _, expected = exact(hidden, head, ids, weights)
    for actual, gradient in zip(gradients, expected, strict=True):
        actual = as_float64(actual) / scale
        error = np.linalg.norm(actual - gradient) / np.linalg.norm(gradient)
        assert error < (2e-3 if dtype == jnp.float16 else 1e-2)
    # The rows of ids that are no target, by themselves: they were zero.
    others = np.setdiff1d(np.arange(4096), np.asarray(ids))
    actual, gradient = as_float64(gradients[1])[others] / scale, expected[1][others]
    assert np.linalg.norm(actual - gradient) / np.linalg.norm(gradient) < 2e-2


def test_a_float8_head_has_a_gradient_of_its_own_dtype() -> None:
    hidden, head, ids, weights = make_case()
    head8 = head.astype(jnp.float8_e4m3fn)
    n = 2.0**12

    def loss(matrix: jax.Array) -> jax.Array:
        return summed(n * hidden, LinearHead(matrix, **TILES), ids, weights) / n

    gradient = jax.grad(loss)(head8)
    _, (_, expected) = exact(n * hidden, head8.astype(jnp.float32), ids, weights)
    assert gradient.dtype == head8.dtype
    # Before the division by n it is beyond 448, the largest number of this dtype.
    assert np.abs(expected).max() > 448
    assert_close(gradient.astype(jnp.float32), expected / n, rtol=0.07, atol=2e-3)


# Second derivatives


@each_loss
def test_hessian_products(loss: Loss) -> None:
    hidden, head, ids, weights = make_case()
    tangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), (hidden, head))

    def plain(arrays: tuple[Any, Any]) -> jax.Array:
        logits = jax.nn.log_softmax(arrays[0] @ arrays[1].T)
        return -jnp.sum(weights * jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0])

    def ours(arrays: tuple[Any, Any]) -> jax.Array:
        return loss(*arrays, ids, weights)

    actual, expected = (
        jax.jvp(jax.grad(function), ((hidden, head),), (tangents,)) for function in (ours, plain)
    )
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


# Tokens that weigh nothing, and no tokens


@pytest.mark.parametrize("name", ["summed", "recomputed", "callable"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_of_weight_0_adds_nothing_even_if_it_is_not_finite(name: str, value: float) -> None:
    loss = LOSSES[name]
    hidden, head, ids, weights = make_case()
    weights = weights.at[0, 2].set(0).at[1, 5].set(0)
    broken = hidden.at[0, 2].set(value).at[1, 5, 0].set(value)
    value_and_grad = jax.value_and_grad(lambda h, w: loss(h, w, ids, weights), (0, 1))
    expected_value, expected = value_and_grad(hidden, head)
    actual_value, actual = value_and_grad(broken, head)
    assert_close(actual_value, expected_value)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["summed", "recomputed"])
def test_a_token_of_weight_0_adds_nothing_even_if_its_logits_overflow(name: str) -> None:
    hidden, head, ids, weights = make_case()
    weights = weights.at[0, 2].set(0)
    head = head.at[3].set(1e25)
    # Of the others this row's logits are far below the rest.
    hidden = jnp.concatenate([-jnp.abs(hidden[..., :1]), hidden[..., 1:] * 0], axis=-1)
    broken = hidden.at[0, 2].set(1e25)
    ids = jnp.where(ids == 3, 4, ids)
    value_and_grad = jax.value_and_grad(lambda h, w: LOSSES[name](h, w, ids, weights), (0, 1))
    expected_value, expected = value_and_grad(hidden, head)
    actual_value, actual = value_and_grad(broken, head)
    assert_close(actual_value, expected_value)
    for one, other in zip(actual, expected, strict=True):
        assert bool(jnp.all(jnp.isfinite(other)))
        assert_close(one, other)


@each_loss
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_no_tokens_have_loss_0_and_gradient_0(loss: Loss, shape: tuple[int, int]) -> None:
    _, head, _, _ = make_case()
    hidden, ids = jnp.zeros((*shape, EMBED)), jnp.zeros(shape, jnp.int32)
    value, gradients = jax.value_and_grad(lambda h, w: loss(h, w, ids, jnp.ones(shape)), (0, 1))(
        hidden, head
    )
    assert_equal(value, np.float32(0))
    assert_equal(gradients[0], np.zeros((*shape, EMBED), np.float32))
    assert_equal(gradients[1], np.zeros((VOCAB, EMBED), np.float32))


def test_a_callable_of_a_wrong_shape_is_an_error() -> None:
    hidden, head, ids, weights = make_case()
    for callable_head, came in (
        (lambda x: x.reshape(-1, EMBED) @ head.T, r"an array \(1, 11\)"),
        (lambda x: (x @ head.T, None), "tuple"),
    ):
        with pytest.raises(ValueError, match=f"`head` must make logits .* made {came}"):
            summed(hidden, callable_head, ids, weights)


# Tiles by platform


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "TPU v6 lite", "new"])
def test_tokens_keep_the_traffic_of_the_gradient_small(kind: str) -> None:
    operations_a_second = 5e14
    bytes_a_second = operations_a_second / operations_per_byte(kind)

    def share(tokens: int, vocab: int = 1000, embed: int = 300) -> float:
        """The time to read and write the float32 gradient, of that of a tile's three products."""
        traffic = 2 * 4 * vocab * embed / bytes_a_second
        return traffic / (3 * 2 * tokens * vocab * embed / operations_a_second)

    tokens = _tile_sizes.tokens_for_traffic(operations_per_byte(kind))
    assert share(tokens) <= 0.1 < share(tokens // 2)


def test_ratios_of_accelerators() -> None:
    assert round(operations_per_byte("NVIDIA H100 PCIe")) == 263
    assert operations_per_byte("TPU v5 lite") > operations_per_byte("TPU v5")
    assert operations_per_byte() == operations_per_byte("unknown") == 300


def test_tiles_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, ids, weights = make_case()
    on_cpu = LinearHead(head)
    assert (on_cpu.tokens_at_a_time, on_cpu.ids_at_a_time) == (256, 1024)
    monkeypatch.setattr(_tile_sizes, "default_platform", lambda: "gpu")
    monkeypatch.setattr(_tile_sizes, "operations_per_byte", lambda: 263.0)
    # The logits of a tile take at most 2 GiB in float32, and a tile at least 1024 tokens.
    for vocab_size, tokens in ((32_000, 4096), (129_280, 4096), (262_144, 2048), (10**7, 1024)):
        assert _tile_sizes.default_token_tile(vocab_size) == tokens
        assert tokens == 1024 or 4 * tokens * vocab_size <= 2**31
    assert (on_cpu.tokens_at_a_time, on_cpu.ids_at_a_time) == (4096, VOCAB)
    assert LinearHead(head, recompute_logits=True).ids_at_a_time == 32_768
    assert LinearHead(head, token_tile=8, vocab_tile=5).ids_at_a_time == 5
    value, gradients = exact(hidden, head, ids, weights)
    actual, actual_gradients = jax.value_and_grad(summed, (0, 1))(hidden, head, ids, weights)
    assert_close(actual, value)
    for one, other in zip(actual_gradients, gradients, strict=True):
        assert_close(one, other)


# 64 bits


def test_under_x64_losses_and_gradients_are_those_of_float64() -> None:
    code = """
        import jax, jax.numpy as jnp, numpy as np
        import test_loss_edges as edges
        for dtype, tolerance in ((jnp.float64, 1e-13), (jnp.float32, 1e-5)):
            hidden, head, ids, weights = edges.make_case(dtype)
            value, gradients = edges.exact(hidden, head, ids, weights)
            for name, loss in edges.LOSSES.items():
                for ids_dtype in (jnp.int32, jnp.int64):
                    actual, actual_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(
                        hidden, head, ids.astype(ids_dtype), weights
                    )
                    assert actual.dtype == dtype, (name, actual.dtype)
                    np.testing.assert_allclose(actual, value, rtol=tolerance)
                    for one, other in zip(actual_gradients, gradients, strict=True):
                        assert one.dtype == dtype
                        np.testing.assert_allclose(one, other, rtol=0, atol=20 * tolerance)
    """
    run_under_x64(code)


def run_under_x64(code: str) -> None:
    """Runs code in a process of its own: the switch is for a whole process."""
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, Path(__file__).parents[:3]))
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


def test_weights_that_are_tiny_do_not_overflow_the_scale() -> None:
    hidden, head = jnp.ones((1, 4, 2), jnp.float16), jnp.zeros((3, 2), jnp.float16)
    ids, weight = jnp.zeros((1, 4), jnp.int32), 1e-36

    def loss(head: Any) -> jax.Array:
        return summed(hidden, head, ids, jnp.full((1, 4), weight)) / weight

    gradient = jax.grad(loss)(head)
    np.testing.assert_allclose(gradient[:, 0], 4 * np.array([-2 / 3, 1 / 3, 1 / 3]), rtol=2e-3)
