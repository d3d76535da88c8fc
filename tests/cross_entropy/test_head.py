"""Every kind of output head under both losses, against all logits in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick_jit
from helpers import (
    HeadOracle,
    array_sizes,
    as_float64,
    assert_close,
    assert_equal,
    assert_rejects,
    compiled_text,
    finite_differences,
    num_matrix_products,
)
from jax.sharding import AbstractMesh, PartitionSpec as P
from jaxtyping import Array

from equinox_mtp import (
    HeadSharding,
    LinearHead,
    linear_cross_entropy,
    summed_linear_cross_entropy,
)

EMBED = 8
Z = 0.1

quick_linear_cross_entropy = quick_jit(linear_cross_entropy)

# Leading axes, vocabulary, tiles of tokens and of the vocabulary, bias, soft-cap.
CASES: dict[str, tuple[tuple[int, ...], int, int, int, bool, float | None]] = {
    "divides": ((2, 8), 32, 4, 8, False, None),
    "remainders": ((2, 7), 33, 4, 8, True, None),
    "soft-cap": ((3, 10), 65, 8, 16, False, 5.0),
    "bias-and-soft-cap": ((2, 3, 5), 65, 6, 30, True, 2.0),
    "larger-than-all": ((2, 3), 33, 1000, 1000, True, 2.0),
    "one-at-a-time": ((5,), 6, 1, 1, True, 3.0),
    "one-token": ((), 33, 2, 7, True, None),
    "seq-1": ((4, 1), 33, 2, 7, False, 3.0),
    "one-id": ((5,), 1, 2, 1, True, None),
}


class Case:
    def __init__(self, name: str):
        batch, vocab, token_tile, vocab_tile, bias, self.soft_cap = CASES[name]
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        self.tiles: dict[str, Any] = {"token_tile": token_tile, "vocab_tile": vocab_tile}
        self.hidden_states, self.weight = draw(*batch, EMBED), draw(vocab, EMBED)
        self.bias = draw(vocab) if bias else None
        self.target_ids = rng.integers(0, vocab, batch).astype(np.int32)
        # A token that weighs nothing has a gradient of its weight all the same.
        self.weights = np.asarray(draw(*batch) * (rng.random(batch) < 0.8), np.float32)
        self.cotangents = draw(2, *batch)

    @property
    def oracle(self) -> HeadOracle:
        return HeadOracle(
            self.hidden_states, self.weight, self.bias, self.target_ids, self.soft_cap
        )

    def head(self, kind: str, weight: Any, bias: Any) -> Any:
        tiled = LinearHead(
            weight,
            bias,
            soft_cap=self.soft_cap,
            recompute_logits=kind == "recompute",
            **self.tiles,
        )
        return (lambda hidden_states: tiled(hidden_states)) if kind == "callable" else tiled


def assert_gradients_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    for x, y in zip(actual, expected, strict=True):
        if x is not None:
            assert_close(x, y, tolerance, tolerance)


# The tiles of a `LinearHead` are not a callable's; and the sum that is not kept is of token losses.
kinds_and_cases = pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("linear", name) for name in CASES),
        *(("recompute", name) for name in ("remainders", "soft-cap")),
        *(("callable", name) for name in ("bias-and-soft-cap", "one-token")),
    ],
)


@kinds_and_cases
def test_token_losses(kind: str, name: str) -> None:
    case = Case(name)

    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def total(hidden_states: Array, weight: Array, bias: Array | None) -> tuple[Array, Any]:
        out = linear_cross_entropy(
            hidden_states, case.head(kind, weight, bias), jnp.asarray(case.target_ids)
        )
        losses = jnp.stack([out.negative_log_likelihood, out.log_sum_exp])
        return jnp.sum(case.cotangents * losses), out

    (_, out), gradients = quick_jit(total)(case.hidden_states, case.weight, case.bias)
    nll, log_sum_exp, best = case.oracle.losses
    assert_close(out.negative_log_likelihood, nll)
    assert_close(out.log_sum_exp, log_sum_exp)
    assert_equal(out.predictions, best)
    assert_gradients_close(gradients, case.oracle.gradients(*case.cotangents))


@kinds_and_cases
def test_summed_losses(kind: str, name: str) -> None:
    case = Case(name)

    @partial(jax.value_and_grad, argnums=range(5), has_aux=True)
    def total(
        hidden_states: Array, weight: Array, bias: Array | None, weights: Array, z: Array
    ) -> tuple[Array, Any]:
        out = summed_linear_cross_entropy(
            hidden_states,
            case.head(kind, weight, bias),
            jnp.asarray(case.target_ids),
            weights,
            z_loss_weight=z,
        )
        return -3 * out.loss, out

    arguments = (case.hidden_states, case.weight, case.bias, case.weights, np.float32(Z))
    (_, out), gradients = quick_jit(total)(*arguments)
    loss, expected = case.oracle.summed(case.weights, Z)
    _, log_sum_exp, best = case.oracle.losses
    assert_close(out.loss, loss, 1e-5, 1e-5)
    assert_close(out.z_loss, Z * np.sum(case.weights * log_sum_exp**2), 1e-5, 1e-5)
    assert_equal(out.predictions, best)
    assert_gradients_close(gradients, [-3 * x for x in expected], 5e-5)


def test_the_oracle_has_the_gradients_of_its_losses() -> None:
    case = Case("bias-and-soft-cap")
    oracle, weights = case.oracle, as_float64(case.weights)
    _, gradients = oracle.summed(weights, Z)
    functions: dict[str, Callable[[np.ndarray], float]] = {
        name: lambda x, name=name: oracle._replace(**{name: x}).summed(weights, Z)[0]
        for name in ("hidden_states", "weight", "bias")
    }
    points = [case.hidden_states, case.weight, case.bias, weights, np.float64(Z)]
    for function, x, gradient in zip(
        (
            *functions.values(),
            lambda w: oracle.summed(w, Z)[0],
            lambda z: oracle.summed(weights, float(z))[0],
        ),
        points,
        gradients,
        strict=True,
    ):
        assert_close(gradient, finite_differences(function, np.asarray(x)), 1e-6, 1e-6)


@pytest.mark.parametrize("kind", ["linear", "recompute", "callable"])
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_no_tokens(kind: str, batch: tuple[int, ...]) -> None:
    case = Case("remainders")
    hidden_states, ids = jnp.zeros((*batch, EMBED)), jnp.zeros(batch, jnp.int32)

    def loss(weight: Array) -> tuple[Array, Any]:
        head = case.head(kind, weight, None)
        out = summed_linear_cross_entropy(
            hidden_states, head, ids, jnp.ones(batch), z_loss_weight=Z
        )
        return out.loss, out.predictions

    gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (value, best), gradient = gradient(jnp.asarray(case.weight))
    assert_equal(value, np.float32(0))
    assert_equal(best, np.zeros(batch, np.int32))
    assert_equal(gradient, np.zeros_like(case.weight))


def test_label_smoothing() -> None:
    # The mean loss over all labels: log_sum_exp minus the mean logit.
    case = Case("remainders")
    smoothing, vocab = 0.2, len(case.weight)
    labels = (1 - smoothing) * np.eye(vocab)[case.target_ids] + smoothing / vocab

    def smoothed(hidden_states: Array, weight: Array) -> Array:
        out = linear_cross_entropy(
            hidden_states, LinearHead(weight, **case.tiles), jnp.asarray(case.target_ids)
        )
        uniform = out.log_sum_exp - hidden_states @ jnp.mean(weight, axis=0)
        return jnp.sum((1 - smoothing) * out.negative_log_likelihood + smoothing * uniform)

    oracle = case.oracle._replace(bias=None)
    softmax = np.exp(oracle.logits - oracle.losses[1][..., None])
    cotangent = (softmax - labels).reshape(-1, vocab)
    value, gradients = quick_jit(jax.value_and_grad(smoothed, (0, 1)))(
        case.hidden_states, case.weight
    )
    assert_close(value, -np.sum(labels * np.log(softmax)))
    hidden_states = as_float64(case.hidden_states)
    assert_close(gradients[0], (cotangent @ case.weight).reshape(hidden_states.shape), 1e-5, 1e-5)
    assert_close(gradients[1], cotangent.T @ hidden_states.reshape(-1, EMBED), 1e-5, 1e-5)


def test_a_matrix_is_a_linear_head() -> None:
    case = Case("divides")
    matrix, ids = jnp.asarray(case.weight), jnp.asarray(case.target_ids)
    hidden_states = jnp.asarray(case.hidden_states)
    for loss in (
        linear_cross_entropy,
        partial(summed_linear_cross_entropy, weights=jnp.asarray(case.weights)),
    ):
        quick = quick_jit(loss)
        outs = [quick(hidden_states, head, ids) for head in (matrix, LinearHead(matrix))]
        assert eqx.tree_equal(*outs)


@pytest.mark.parametrize("kind", ["linear", "callable", "matrix"])
@pytest.mark.parametrize("loss", [linear_cross_entropy, summed_linear_cross_entropy])
def test_no_predictions(kind: str, loss: Callable[..., Any]) -> None:
    case = Case("remainders")
    weight, ids = jnp.asarray(case.weight), jnp.asarray(case.target_ids)
    head = weight if kind == "matrix" else case.head(kind, weight, None)
    weights = () if loss is linear_cross_entropy else (jnp.asarray(case.weights),)
    arguments = (jnp.asarray(case.hidden_states), head, ids, *weights)
    with_best, without = (
        quick_jit(partial(loss, predictions=best))(*arguments) for best in (True, False)
    )
    assert without.predictions is None
    assert with_best.predictions.shape == ids.shape
    assert eqx.tree_equal(eqx.tree_at(lambda out: out.predictions, with_best, None), without)


# Predictions


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("vocab_tile", [8, 10, 33])
def test_ties_across_tiles_go_to_the_first_id(dtype: Any, vocab_tile: int) -> None:
    hidden_states, ids = jnp.ones((3, EMBED), dtype), jnp.zeros(3, jnp.int32)
    for best in ((7, 8), (8, 9), (0, 32), (24, 31, 32), (3, 15, 20)):
        head = np.random.default_rng(0).integers(-1, 2, (33, EMBED))
        head[list(best)] = 2
        linear = LinearHead(jnp.asarray(head, dtype), vocab_tile=vocab_tile, token_tile=2)
        out = quick_linear_cross_entropy(hidden_states, linear, ids)
        assert_equal(out.predictions, np.full(3, best[0], np.int32))


# Ids, weights and logits at the border


@pytest.mark.parametrize("kind", ["linear", "callable"])
def test_an_id_outside_has_log_sum_exp_for_a_loss(kind: str) -> None:
    case = Case("remainders")
    head = case.head(kind, jnp.asarray(case.weight), jnp.asarray(case.bias))
    outside = jnp.resize(jnp.array([-100, -1, 33, 40, 2**31 - 1]), case.target_ids.shape)
    out = quick_linear_cross_entropy(jnp.asarray(case.hidden_states), head, outside)
    assert_close(out.negative_log_likelihood, case.oracle.losses[1])


@pytest.mark.parametrize("kind", ["linear", "callable"])
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.uint32])
def test_ids_of_any_integer_type(kind: str, dtype: Any) -> None:
    # More ids than fit into eight bits, as in a vocabulary of bytes and special tokens.
    rng = np.random.default_rng(0)
    hidden_states, weight = rng.standard_normal((5, EMBED)), rng.standard_normal((300, EMBED))
    ids = np.asarray([0, 7, 44, 127, 255])
    linear = LinearHead(jnp.asarray(weight, jnp.float32))
    head = linear if kind == "linear" else lambda hidden_states: linear(hidden_states)
    out = quick_linear_cross_entropy(
        jnp.asarray(hidden_states, jnp.float32), head, jnp.asarray(ids, dtype)
    )
    nll = HeadOracle(hidden_states, weight, None, ids).losses[0]
    assert_close(out.negative_log_likelihood, nll, 1e-5, 1e-5)


@pytest.mark.parametrize("kind", ["linear", "recompute", "callable"])
@pytest.mark.parametrize("forbidden", [slice(0, 20), slice(20, 33), slice(8, 16)])
def test_ids_forbidden_by_a_bias(kind: str, forbidden: slice) -> None:
    # Whole tiles of it, as where the vocabulary is padded. Targets of weight 0 are among them.
    case = Case("remainders")
    assert case.bias is not None
    case.bias[forbidden] = -np.inf
    allowed = np.isfinite(case.bias)
    case.weights = allowed[case.target_ids].astype(np.float32)
    assert 0 < np.sum(case.weights) < case.weights.size

    def loss(hidden_states: Array, weight: Array, bias: Array, weights: Array) -> Array:
        ids, head = jnp.asarray(case.target_ids), case.head(kind, weight, bias)
        return summed_linear_cross_entropy(hidden_states, head, ids, weights, z_loss_weight=Z).loss

    arguments = (case.hidden_states, case.weight, case.bias, case.weights)
    value, gradients = quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arguments)
    finite = case.oracle._replace(bias=np.where(allowed, case.bias, -1e4))
    expected, expected_gradients = finite.summed(as_float64(case.weights), Z)
    assert_close(value, expected)
    assert_gradients_close(gradients[:3], expected_gradients[:3])
    counted = case.weights > 0
    assert_close(gradients[3][counted], expected_gradients[3][counted])
    assert np.all(np.isfinite(gradients[3]))


# Callables


class _Projection(eqx.Module):
    """A head with a layer of its own."""

    inner: Array
    outer: Array

    def __call__(self, hidden_states: Array) -> Array:
        return jnp.tanh(hidden_states @ self.inner) @ self.outer.T


def test_gradients_reach_the_parameters_of_a_callable() -> None:
    # 1031 positions: the library's tiles hold 256 tokens, and none divides a prime.
    rng = np.random.default_rng(0)
    inner, outer, hidden_states = (
        jnp.asarray(rng.standard_normal((size, EMBED)), jnp.float32) for size in (EMBED, 33, 1031)
    )
    head, ids = _Projection(inner, outer), jnp.asarray(rng.integers(0, 33, 1031))

    def loss(head: _Projection, hidden_states: Array) -> Array:
        return summed_linear_cross_entropy(hidden_states, head, ids, jnp.ones(1031)).loss

    value, gradients = quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))(head, hidden_states)
    h, inner, outer = map(as_float64, (hidden_states, inner, outer))
    activations = np.tanh(h @ inner)
    oracle = HeadOracle(activations, outer, None, np.asarray(ids))
    expected, (of_activations, of_outer, *_) = oracle.summed(np.ones(1031), 0.0)
    before = of_activations * (1 - activations**2)
    assert_close(value, expected, 1e-5)
    assert_close(gradients[0].outer, of_outer, 1e-4, 1e-3)
    assert_close(gradients[0].inner, h.T @ before, 1e-4, 1e-3)
    assert_close(gradients[1], before @ inner.T, 1e-4, 1e-4)


def test_a_callable_sees_no_padding() -> None:
    # A cosine has no gradient at 0, and one NaN would be in the gradient of all parameters.
    rng = np.random.default_rng(0)
    weight, hidden_states = rng.standard_normal((33, EMBED)), rng.standard_normal((1031, EMBED))
    ids = rng.integers(0, 33, 1031)

    def loss(scale: Array) -> Array:
        def head(hidden_states: Array) -> Array:
            scaled = hidden_states * scale
            normed = scaled / jnp.linalg.norm(scaled, axis=-1, keepdims=True)
            return normed @ jnp.asarray(weight, jnp.float32).T

        return jnp.sum(
            linear_cross_entropy(
                jnp.asarray(hidden_states, jnp.float32), head, jnp.asarray(ids)
            ).negative_log_likelihood
        )

    def oracle(scale: np.ndarray) -> float:
        scaled = hidden_states * scale
        normed = scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)
        return float(np.sum(HeadOracle(normed, weight, None, ids).losses[0]))

    scale = np.linspace(0.5, 1.5, EMBED)
    gradient = quick_jit(jax.grad(loss))(scale.astype(np.float32))
    assert_close(gradient, finite_differences(oracle, scale), 1e-3, 1e-2)


# Transformations


def test_vmap_over_hidden_states_and_heads() -> None:
    case = Case("soft-cap")
    weights = jnp.stack([jnp.asarray(case.weight), 2 * jnp.asarray(case.weight)])
    hidden_states = jnp.stack([jnp.asarray(case.hidden_states)] * 2)

    def loss(hidden_states: Array, weight: Array) -> Array:
        return summed_linear_cross_entropy(
            hidden_states,
            case.head("linear", weight, None),
            jnp.asarray(case.target_ids),
            jnp.asarray(case.weights),
        ).loss

    values, gradients = quick_jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1))))(
        hidden_states, weights
    )
    for index in range(2):
        oracle = case.oracle._replace(weight=np.asarray(weights[index]))
        value, expected = oracle.summed(case.weights, 0.0)
        assert_close(values[index], value)
        assert_gradients_close([x[index] for x in gradients], expected[:2])


@pytest.mark.parametrize("loss", [linear_cross_entropy, summed_linear_cross_entropy])
def test_gradients_through_a_scan(loss: Callable[..., Any]) -> None:
    # Rows one at a time, as in gradient accumulation inside a differentiated loop.
    case = Case("remainders")

    def total(hidden_states: Array, weight: Array, bias: Array) -> Array:
        head = case.head("linear", weight, bias)

        def visit(total: Array, row: tuple[Array, Array, Array]) -> tuple[Array, None]:
            hidden_states, ids, weights = row
            if loss is summed_linear_cross_entropy:
                return total + loss(hidden_states, head, ids, weights).loss, None
            nll = loss(hidden_states, head, ids).negative_log_likelihood
            return total + jnp.sum(weights * nll), None

        rows = (hidden_states, jnp.asarray(case.target_ids), jnp.asarray(case.weights))
        return jax.lax.scan(visit, jnp.zeros(()), rows)[0]

    arguments = (case.hidden_states, case.weight, case.bias)
    value, gradients = quick_jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arguments)
    expected, expected_gradients = case.oracle.summed(case.weights, 0.0)
    assert_close(value, expected)
    assert_gradients_close(gradients, expected_gradients[:3])


# Low precision


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["linear", "recompute", "token"])
def test_low_precision(dtype: Any, kind: str) -> None:
    """Only the logits' cotangents, and the results, are rounded to the inputs' dtype."""
    case = Case("soft-cap")
    low = [jnp.asarray(x, dtype) for x in (case.hidden_states, case.weight)]
    weights, ids = np.abs(case.weights), jnp.asarray(case.target_ids)

    def loss(hidden_states: Array, weight: Array) -> Array:
        head = case.head(kind, weight, None)
        if kind != "token":
            return summed_linear_cross_entropy(
                hidden_states, head, ids, jnp.asarray(weights), z_loss_weight=Z
            ).loss
        out = linear_cross_entropy(hidden_states, head, ids)
        return jnp.sum(weights * (out.negative_log_likelihood + Z * out.log_sum_exp**2))

    value, gradients = quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))(*low)
    h, w = (np.asarray(x, np.float64) for x in low)
    oracle = case.oracle._replace(hidden_states=h, weight=w)
    expected, expected_gradients = oracle.summed(weights, Z)
    assert value.dtype == jnp.float32
    assert_close(value, expected)
    lse_cotangent = 2 * Z * weights * oracle.losses[1]
    cotangent = np.abs(oracle.logits_cotangent(weights, lse_cotangent))
    tokens = cotangent.reshape(-1, len(w))
    sizes = (cotangent @ np.abs(w), tokens.T @ np.abs(h).reshape(-1, EMBED))
    info = jnp.finfo(dtype)
    for gradient, wanted, size in zip(gradients, expected_gradients[:2], sizes, strict=True):
        assert gradient.dtype == dtype
        # Half an eps each for cotangents and result, twice where the result is scaled; float16's
        # cotangents below its smallest number are rounded to multiples of that.
        bound = 1.01 * float(info.eps) * size + 100 * float(info.smallest_subnormal)
        assert np.all(np.abs(np.asarray(gradient, np.float64) - wanted) <= bound)


# Size


TOKENS, VOCAB, TOKEN_TILE, VOCAB_TILE = (4, 64), 1000, 16, 125


def large_case(dtype: Any = jnp.float32) -> tuple[Array, Array]:
    return jnp.ones((*TOKENS, EMBED), dtype), jnp.ones((VOCAB, EMBED), dtype)


def large_loss(kind: str, hidden_states: Array, weight: Array) -> Array:
    head = LinearHead(
        weight,
        recompute_logits=kind == "recompute",
        token_tile=TOKEN_TILE,
        vocab_tile=VOCAB_TILE,
    )
    ids = jnp.zeros(TOKENS, jnp.int32)
    if kind == "token":
        return jnp.sum(linear_cross_entropy(hidden_states, head, ids).negative_log_likelihood)
    return summed_linear_cross_entropy(hidden_states, head, ids, jnp.ones(TOKENS)).loss


@pytest.mark.parametrize(
    ("kind", "num_tile_logits"),
    [
        ("linear", TOKEN_TILE * VOCAB),
        ("recompute", TOKEN_TILE * VOCAB_TILE),
        ("token", TOKEN_TILE * VOCAB_TILE),
    ],
)
def test_nothing_is_larger_than_a_tile(kind: str, num_tile_logits: int) -> None:
    text = compiled_text(
        jax.value_and_grad(partial(large_loss, kind), argnums=(0, 1)), *large_case()
    )
    sizes = array_sizes(text)
    hidden, head = math.prod(TOKENS) * EMBED, VOCAB * EMBED
    assert sizes[f"f32[{VOCAB},{EMBED}]"] == head
    assert max(sizes.values()) <= max(num_tile_logits, head, hidden) < math.prod(TOKENS) * VOCAB


def test_all_logits_are_found_by_their_size() -> None:
    def naive(hidden_states: Array, weight: Array) -> Array:
        return jnp.sum(jax.nn.logsumexp(hidden_states @ weight.T, axis=-1))

    text = compiled_text(jax.value_and_grad(naive), *large_case())
    assert max(array_sizes(text).values()) == math.prod(TOKENS) * VOCAB


def test_a_callable_is_run_on_tiles_of_tokens() -> None:
    hidden_states, weight = jnp.ones((8, 512, EMBED)), jnp.ones((50, EMBED))

    def loss(hidden_states: Array, weight: Array) -> Array:
        ids = jnp.zeros((8, 512), jnp.int32)
        out = linear_cross_entropy(hidden_states, lambda hidden: hidden @ weight.T, ids)
        return jnp.sum(out.negative_log_likelihood)

    text = compiled_text(jax.value_and_grad(loss, argnums=(0, 1)), hidden_states, weight)
    # A tile has 256 tokens; the hidden states of all are larger.
    assert 8 * 512 * 50 not in array_sizes(text).values()
    assert 256 * 50 in array_sizes(text).values()


@pytest.mark.parametrize("kind", ["linear", "recompute", "token"])
def test_a_low_precision_head_is_not_copied(kind: str) -> None:
    """It goes into the products tile by tile, as it is."""
    lowered = jax.jit(partial(large_loss, kind)).lower(*large_case(jnp.bfloat16)).as_text()
    assert f"tensor<{VOCAB}x{EMBED}xbf16>" in lowered
    assert f"tensor<{VOCAB}x{EMBED}xf32>" not in lowered


@pytest.mark.parametrize(("kind", "products"), [("linear", 3), ("recompute", 4), ("token", 4)])
def test_number_of_matrix_products(kind: str, products: int) -> None:
    gradient = jax.grad(partial(large_loss, kind), argnums=(0, 1))
    assert num_matrix_products(gradient, *large_case()) == products


# The modules themselves


@pytest.mark.parametrize("name", CASES)
def test_calling_a_head_gives_its_logits(name: str) -> None:
    case = Case(name)
    bias = None if case.bias is None else jnp.asarray(case.bias)
    head = case.head("linear", jnp.asarray(case.weight), bias)
    logits = head(jnp.asarray(case.hidden_states))
    assert_close(logits, case.oracle.logits, 1e-5, 1e-5)


def test_logits_are_accumulated_in_float32() -> None:
    hidden_states, weight = jnp.ones((2, 512), jnp.bfloat16), jnp.ones((3, 512))
    weight = weight.at[:, 0].set(2.0)
    assert_equal(LinearHead(weight)(hidden_states), np.full((2, 3), 513, np.float32))


WEIGHT = jnp.ones((33, EMBED))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"soft_cap": 0}, "`soft_cap` must be above 0; got 0"),
        ({"soft_cap": -5.0}, "`soft_cap` must be above 0; got -5"),
        ({"soft_cap": float("nan")}, "`soft_cap` must be finite.* got nan"),
        ({"soft_cap": float("inf")}, "`soft_cap` must be finite.* got inf"),
        ({"token_tile": 0}, "`token_tile` must be at least 1; got 0"),
        ({"vocab_tile": -1}, "`vocab_tile` must be at least 1; got -1"),
        ({"soft_cap": True}, "`soft_cap` must be a number above 0; got True"),
        ({"token_tile": True}, "`token_tile` must be an integer at least 1; got True"),
        ({"weight": WEIGHT[:0]}, "`weight` must have a row for each token id"),
    ],
)
def test_wrong_fields_of_a_head_raise(fields: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weight": WEIGHT} | fields
    with pytest.raises(ValueError, match=message):
        LinearHead(**arguments)


@pytest.mark.parametrize(
    ("argument", "args", "kwargs"),
    [
        ("weight", (WEIGHT[0],), {}),
        ("weight", (WEIGHT.astype(int),), {}),
        ("bias", (WEIGHT, jnp.ones(EMBED)), {}),
        ("bias", (WEIGHT, jnp.ones(33, int)), {}),
        ("soft_cap", (WEIGHT,), {"soft_cap": "30"}),
        ("vocab_tile", (WEIGHT,), {"vocab_tile": 8.0}),
        ("sharding", (WEIGHT,), {"sharding": P("vocab")}),
    ],
)
def test_wrong_arguments_of_a_head_are_named(
    argument: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert_rejects(argument, LinearHead, *args, **kwargs)


MESH = AbstractMesh((2, 4), ("data", "model"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": "data", "seq": "data"}, "different mesh axes; 'data' is named twice"),
        ({"batch": ("data", "model"), "vocab": "model"}, "'model' is named twice"),
        ({"batch": ("data", "data")}, "'data' is named twice"),
        ({"mesh": MESH, "vocab": "tensor"}, "has the axes 'data', 'model'; 'tensor' is none"),
        ({"mesh": MESH, "seq": ("model", "x")}, "'x' is none of them"),
    ],
)
def test_wrong_mesh_axes_raise(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadSharding(**fields)


def test_mesh_axes_of_a_head() -> None:
    sharding = HeadSharding(MESH, batch="data", vocab="model")
    assert (sharding.token_axes, sharding.vocab_axes) == (("data",), ("model",))
    assert sharding.spec("depth batch seq embed") == P(None, "data", None, None)
    assert sharding.spec("vocab embed") == P("model", None)
    both = HeadSharding(batch=("data", "model"), seq="context")
    assert both.token_axes == ("data", "model", "context")
    assert both.vocab_axes == ()
    assert both.spec("batch seq") == P(("data", "model"), "context")


HIDDEN, IDS, WEIGHTS = jnp.ones((2, 3, EMBED)), jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("argument", "args", "kwargs"),
    [
        ("hidden_states", (IDS, WEIGHT, IDS, WEIGHTS), {}),
        ("head", (HIDDEN, WEIGHT.T, IDS, WEIGHTS), {}),
        ("target_ids", (HIDDEN, WEIGHT, IDS[:, :2], WEIGHTS), {}),
        ("target_ids", (HIDDEN, WEIGHT, WEIGHTS, WEIGHTS), {}),
        ("weights", (HIDDEN, WEIGHT, IDS, WEIGHTS[0]), {}),
        ("weights", (HIDDEN, WEIGHT, IDS, IDS.astype(complex)), {}),
        ("z_loss_weight", (HIDDEN, WEIGHT, IDS, WEIGHTS), {"z_loss_weight": jnp.ones(2)}),
        ("predictions", (HIDDEN, WEIGHT, IDS, WEIGHTS), {"predictions": None}),
    ],
)
def test_wrong_arguments_of_the_sum_are_named(
    argument: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert_rejects(argument, summed_linear_cross_entropy, *args, **kwargs)


def test_a_mask_is_a_weight() -> None:
    case = Case("remainders")
    mask = case.weights > 0
    sums = [
        quick_jit(summed_linear_cross_entropy)(
            jnp.asarray(case.hidden_states),
            jnp.asarray(case.weight),
            jnp.asarray(case.target_ids),
            weights,
        ).loss
        for weights in (jnp.asarray(mask), jnp.asarray(mask, jnp.bfloat16))
    ]
    expected = np.sum(case.oracle._replace(bias=None).losses[0], where=mask)
    assert_close(sums, [expected] * 2)


def test_numbers_of_numpy_are_plain_in_a_head() -> None:
    head = LinearHead(
        jnp.ones((3, 2)),
        soft_cap=np.float32(2.5),
        token_tile=np.int64(4),
        vocab_tile=np.int32(2),
    )
    fields = (head.soft_cap, head.token_tile, head.vocab_tile)
    assert fields == (2.5, 4, 2)
    assert [type(field) for field in fields] == [float, int, int]
