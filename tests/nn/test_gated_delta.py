"""Gated DeltaNet against loops over positions in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from helpers import finite_differences
from jaxtyping import Array, PRNGKeyArray

import equinox_mtp as emtp
from equinox_mtp import nn
from equinox_mtp.nn.gated_delta import _rule
from equinox_mtp.sharding import DEFAULT_RULES, make_mesh, use_rules

BATCH, EMBED, KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 12, 2, 4, 5, 6
SEGMENTS = np.asarray([[1] * 11, [0, 3, 3, 3, 1, 1, 2, 2, 2, 2, 0]])
SEQ = SEGMENTS.shape[1]


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def rule_by_loop(
    inputs: dict[str, np.ndarray],
    segment_ids: np.ndarray | None = None,
    state: np.ndarray | None = None,
    num_kept: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Position by position, as the paper writes it."""
    query, key, value, log_decay, beta = (f64(x) for x in inputs.values())
    batch, seq, kv_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    read, kept = np.zeros_like(value), np.zeros((batch, heads, key_dim, value_dim))
    for b, h in np.ndindex(batch, heads):
        s = kept[b, h] if state is None else f64(state)[b, h]
        states = [s]
        for t in range(seq):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                s = np.zeros_like(s)
            k, q = key[b, t, h // (heads // kv_heads)], query[b, t, h // (heads // kv_heads)]
            s = np.exp(log_decay[b, t, h]) * s
            s = s + beta[b, t, h] * np.outer(k, value[b, t, h] - s.T @ k)
            read[b, t, h] = s.T @ q
            states.append(s)
        kept[b, h] = states[-1 if num_kept is None else num_kept[b]]
    return read, kept


def make_inputs(seq: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    return {
        "query": unit(rng.normal(size=(BATCH, seq, KEY_HEADS, KEY_DIM))),
        "key": unit(rng.normal(size=(BATCH, seq, KEY_HEADS, KEY_DIM))),
        "value": rng.normal(size=(BATCH, seq, HEADS, VALUE_DIM)),
        # From a decay of hardly anything to one of nearly all.
        "log_decay": -np.exp(rng.normal(-1, 2, size=(BATCH, seq, HEADS))),
        "beta": rng.uniform(size=(BATCH, seq, HEADS)),
    }


def as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("case", ["plain", "packed", "state", "kept", "packed-state-kept"])
def test_rule(case: str, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a chunk of one position it is the recurrence."""
    monkeypatch.setattr(_rule, "CHUNK_SIZE", chunk_size)
    rng = np.random.default_rng(1)
    inputs, options = make_inputs(SEQ), {}
    if "packed" in case:
        options["segment_ids"] = SEGMENTS
    if "state" in case:
        options["state"] = rng.normal(size=(BATCH, HEADS, KEY_DIM, VALUE_DIM))
    if "kept" in case:
        options["num_kept"] = np.asarray([0, 6])
    given = {n: jnp.asarray(x, jnp.float32 if n == "state" else None) for n, x in options.items()}
    actual = quick_jit(lambda inputs: nn.gated_delta_rule(**inputs, **given))(as_float32(inputs))
    for one, other in zip(actual, rule_by_loop(inputs, **options), strict=True):
        assert one.dtype == jnp.float32
        assert_close(one, other, 1e-5)


def test_rule_over_several_chunks_of_its_own_size() -> None:
    inputs = make_inputs(2 * _rule.CHUNK_SIZE + 3)
    actual = quick_jit(lambda inputs: nn.gated_delta_rule(**inputs))(as_float32(inputs))
    for one, other in zip(actual, rule_by_loop(inputs), strict=True):
        assert_close(one, other, 2e-5)


def test_rule_with_keys_that_are_all_alike() -> None:
    """Nothing decays, and each value replaces the one before: powers of it would explode."""
    seq = _rule.CHUNK_SIZE
    inputs = make_inputs(seq)
    inputs["key"] = np.broadcast_to(inputs["key"][:, :1], inputs["key"].shape)
    inputs |= {"log_decay": 0 * inputs["log_decay"], "beta": 0 * inputs["beta"] + 1}
    inputs["query"] = inputs["key"]
    read, _ = nn.gated_delta_rule(**as_float32(inputs))
    assert_close(read, inputs["value"], 1e-5)


def test_gradients_of_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rule, "CHUNK_SIZE", 2)
    inputs = {name: x[:, :5] for name, x in make_inputs(5).items()}
    segments, rng = np.asarray([[1, 1, 1, 1, 1], [1, 2, 2, 2, 0]]), np.random.default_rng(2)
    state = rng.normal(size=(BATCH, HEADS, KEY_DIM, VALUE_DIM))
    weights = [rng.normal(size=(BATCH, 5, HEADS, VALUE_DIM)), rng.normal(size=state.shape)]

    def loss(inputs: dict[str, Array], state: Array) -> Array:
        outputs = nn.gated_delta_rule(**inputs, segment_ids=jnp.asarray(segments), state=state)
        return sum(jnp.sum(w * x) for w, x in zip(weights, outputs, strict=True))  # type: ignore[return-value]

    def in_float64(name: str) -> Callable[[np.ndarray], float]:
        def total(x: np.ndarray) -> float:
            changed = inputs if name == "state" else inputs | {name: x}
            outputs = rule_by_loop(changed, segments, x if name == "state" else state)
            return float(sum(np.sum(w * y) for w, y in zip(weights, outputs, strict=True)))

        return total

    gradients = quick_jit(jax.grad(loss, (0, 1)))(as_float32(inputs), as_float32(state))
    for name, gradient in (*gradients[0].items(), ("state", gradients[1])):
        x = state if name == "state" else inputs[name]
        assert_close(gradient, finite_differences(in_float64(name), x), 2e-4)


# The layer


def make_layer(**options: Any) -> nn.GatedDeltaNet:
    # `build` moves all parameters away from their initial values.
    sizes = EMBED, KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM
    return build(lambda key: nn.GatedDeltaNet(*sizes, key=key, **options))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def layer_by_loop(x: np.ndarray, layer: Any) -> np.ndarray:
    """One document in float64, `[seq embed]`."""

    def project(kernel: Array) -> np.ndarray:
        return np.einsum("se,e...->s...", x, f64(kernel))

    def convolve(inputs: np.ndarray, kernel: Array) -> np.ndarray:
        out, width = np.zeros_like(inputs), kernel.shape[0]
        for t in range(len(inputs)):
            for j in range(max(0, t - width + 1), t + 1):
                out[t] += f64(kernel)[width - 1 - (t - j)] * inputs[j]
        return silu(out)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)

    decay = np.log1p(np.exp(project(layer.decay_kernel) + f64(layer.dt_bias)))
    inputs = {
        "query": unit(convolve(project(layer.query_kernel), layer.query_convolution)),
        "key": unit(convolve(project(layer.key_kernel), layer.key_convolution)),
        "value": convolve(project(layer.value_kernel), layer.value_convolution),
        "log_decay": -np.exp(f64(layer.a_log)) * decay,
        "beta": 1 / (1 + np.exp(-project(layer.beta_kernel))),
    }
    inputs["query"] /= np.sqrt(KEY_DIM)
    read = rule_by_loop({name: x[None] for name, x in inputs.items()})[0][0]
    read /= np.sqrt(np.mean(read**2, -1, keepdims=True) + layer.output_norm.epsilon)
    read *= f64(layer.output_norm.scale) * silu(project(layer.gate_kernel))
    return np.einsum("shv,hve->se", read, f64(layer.out_kernel))


def positions_of(batch: int, seq: int) -> Array:
    return jnp.tile(jnp.arange(seq), (batch, 1))


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("width", [1, 4])
def test_documents_of_packed_rows(
    width: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is as it is alone: nothing enters by the state or by the convolution."""
    monkeypatch.setattr(_rule, "CHUNK_SIZE", chunk_size)
    layer = make_layer(width=width, norm_epsilon=0.1)
    x = np.random.default_rng(0).normal(size=(BATCH, SEQ, EMBED))
    rows = {"position_ids": positions_of(BATCH, SEQ), "segment_ids": jnp.asarray(SEGMENTS)}
    actual = quick_jit(lambda layer, x: layer(x, **rows))(layer, as_float32(x))
    for b in range(BATCH):
        edges = [0, *np.flatnonzero(np.diff(SEGMENTS[b])) + 1, SEQ]
        for start, stop in itertools.pairwise(edges):
            if SEGMENTS[b, start]:
                expected = layer_by_loop(x[b, start:stop], layer)
                assert_close(actual[b, start:stop], expected, 2e-5)


def test_gradients_do_not_cross_documents() -> None:
    layer, x = make_layer(), jax.random.normal(jax.random.key(0), (1, 6, EMBED))
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2]])

    def second(x: Array) -> Array:
        out = layer(x, position_ids=positions_of(1, 6), segment_ids=segments)
        return jnp.sum(jnp.sin(out[:, 3:]))

    gradient = quick_jit(jax.grad(second))(x)
    assert not gradient[:, :3].any()
    assert gradient[:, 3:].any(axis=-1).all()


def test_no_position_sees_a_later_one() -> None:
    layer, x = make_layer(), jax.random.normal(jax.random.key(0), (1, 6, EMBED))
    at_3 = lambda x: layer(x, position_ids=positions_of(1, 6))[0, 3].sum()  # noqa: E731
    gradient = quick_jit(jax.grad(at_3))(x)
    assert not gradient[:, 4:].any()
    assert gradient[:, :4].any(axis=-1).all()


def run_steps(
    layer: nn.GatedDeltaNet, x: np.ndarray, *, rollback: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Steps of a few positions that begin anywhere in reach, and whose last inputs may be refused.

    **Returns:** what each accepted position gave, and what it should have.
    """
    rng = np.random.default_rng(seed)
    seq, lengths = x.shape[1], np.asarray([2, 7])
    expected = np.stack([layer_by_loop(row, layer) for row in x])
    cache = layer.init_cache(BATCH, seq, jnp.float32, rollback=rollback)
    prefill, decode = quick_jit(layer.prefill), quick_jit(layer.decode)
    # The first row is padded with anything.
    prompt = np.where(np.arange(7)[None, :, None] < lengths[:, None, None], x[:, :7], 50.0)
    out, cache = prefill(
        as_float32(prompt),
        cache,
        position_ids=positions_of(BATCH, 7),
        lengths=jnp.asarray(lengths),
    )
    actual, wanted = [f64(out[1]), f64(out[0, :2])], [expected[1, :7], expected[0, :2]]
    right, furthest = lengths.copy(), lengths.copy()
    for _ in range(8):
        size = int(rng.integers(1, 5))
        # Below 0 there is no token.
        lowest = np.where(furthest > rollback, furthest - rollback, -2)
        first = rng.integers(lowest, right + 1) if rollback else right
        positions = first[:, None] + np.arange(size)
        places = np.clip(positions, 0, seq - 1)
        inputs = np.take_along_axis(x, places[..., None], axis=1)
        num_right = rng.integers(max(1, size - rollback), size + 1)
        inputs[:, num_right:] = 50.0
        out, cache = decode(as_float32(inputs), cache, position_ids=jnp.asarray(positions))
        shown = (positions >= 0) & (np.arange(size) < num_right) & (positions < seq)
        actual.append(f64(out)[shown])
        wanted.append(np.take_along_axis(expected, places[..., None], axis=1)[shown])
        right = np.maximum(first + num_right, 0)
        furthest = np.maximum(furthest, first + size)
        # What was refused must still be in reach.
        right = np.maximum(right, furthest - rollback)
        if (right > first + num_right).any():
            break
    return actual, wanted


@pytest.mark.parametrize("rollback", [0, 1, 3, 9])
@pytest.mark.parametrize("seed", range(3))
def test_cached_steps_that_go_back(rollback: int, seed: int) -> None:
    layer = make_layer()
    x = np.random.default_rng(seed).normal(size=(BATCH, 40, EMBED))
    for one, other in zip(*run_steps(layer, x, rollback=rollback, seed=seed), strict=True):
        assert_close(one, other, 3e-5)


def test_steps_that_go_back_too_far_give_nan() -> None:
    layer, x = make_layer(), jax.random.normal(jax.random.key(0), (BATCH, 6, EMBED))
    cache = layer.init_cache(BATCH, 8, jnp.float32, rollback=2)
    _, cache = quick_jit(layer.prefill)(x, cache, position_ids=positions_of(BATCH, 6))
    positions = jnp.asarray([[4, 5], [3, 4]])
    out, _ = quick_jit(layer.decode)(x[:, :2], cache, position_ids=positions)
    assert bool(jnp.isfinite(out[0]).all())
    assert bool(jnp.isnan(out[1]).all())


def test_steps_of_no_positions() -> None:
    layer, x = make_layer(), jax.random.normal(jax.random.key(0), (BATCH, 3, EMBED))
    cache = layer.init_cache(BATCH, 8, jnp.float32, rollback=2)
    _, cache = quick_jit(layer.prefill)(x, cache, position_ids=positions_of(BATCH, 3))
    out, after = layer.decode(x[:, :0], cache, position_ids=jnp.zeros((BATCH, 0), int))
    assert out.shape == (BATCH, 0, EMBED)
    assert eqx.tree_equal(after, cache)
    assert layer(x[:, :0], position_ids=jnp.zeros((BATCH, 0), int)).shape == (BATCH, 0, EMBED)


def test_bfloat16_keeps_its_state_in_float32() -> None:
    layer = make_layer()
    x = jax.random.normal(jax.random.key(0), (BATCH, SEQ, EMBED))
    rows = {"position_ids": positions_of(BATCH, SEQ), "segment_ids": jnp.asarray(SEGMENTS)}

    def total(layer: Any, x: Array) -> Array:
        return jnp.sum(jnp.sin(layer(x, **rows).astype(jnp.float32)))

    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), layer)
    expected = quick_jit(eqx.filter_value_and_grad(total))(layer, x)
    value, gradients = quick_jit(eqx.filter_value_and_grad(total))(low, x.astype(jnp.bfloat16))
    assert_close(value, expected[0], 0.2)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        assert one.dtype == jnp.bfloat16
        difference = jnp.linalg.norm((one.astype(jnp.float32) - other).ravel())
        assert float(difference) < 0.1 * float(jnp.linalg.norm(other.ravel())) + 1e-2
    cache = low.init_cache(BATCH, 8, jnp.bfloat16, rollback=2)
    prefill = quick_jit(low.prefill)
    _, cache = prefill(x.astype(jnp.bfloat16), cache, position_ids=positions_of(BATCH, SEQ))
    assert (cache.state.dtype, cache.inputs.value.dtype) == (jnp.float32, jnp.bfloat16)
    # Its matrices may be cast beforehand.
    step = {"position_ids": jnp.full((BATCH, 1), SEQ)}
    ready = layer.for_decoding(jnp.bfloat16)
    assert ready.query_convolution.dtype == jnp.bfloat16
    assert ready.a_log.dtype == jnp.float32
    decode = quick_jit(lambda layer, x: layer.decode(x, cache, **step)[0])
    outs = [decode(one, x[:, :1].astype(jnp.bfloat16)) for one in (layer, ready)]
    assert_close(outs[1], outs[0], 0.01)


def test_vmap_and_remat_change_no_value() -> None:
    layer = make_layer()
    x = jax.random.normal(jax.random.key(0), (3, BATCH, SEQ, EMBED))
    rows = {"position_ids": positions_of(BATCH, SEQ), "segment_ids": jnp.asarray(SEGMENTS)}
    run = quick_jit(lambda x: layer(x, **rows))
    one_by_one = jnp.stack([run(part) for part in x])
    at_once = quick_jit(jax.vmap(jax.checkpoint(lambda x: layer(x, **rows))))
    assert_close(at_once(x), one_by_one, 1e-5)


def test_initial_values() -> None:
    layer = nn.GatedDeltaNet(64, 2, 400, 4, 4, key=jax.random.key(0))
    rate = np.exp(f64(layer.a_log)) * np.log1p(np.exp(f64(layer.dt_bias)))
    assert 0.001 <= rate.min() < 0.01
    assert 0.5 < rate.max() <= 1.6
    np.testing.assert_array_equal(layer.output_norm.scale, 1)
    assert_close(jnp.std(layer.value_convolution), 0.5, 0.02)


def test_what_optimizers_are_told() -> None:
    layer = make_layer()
    decays = emtp.weight_decay_mask(layer)
    assert [name for name in vars(layer) if getattr(decays, name) is False] == ["a_log", "dt_bias"]
    assert decays.output_norm.scale is False
    numbers = emtp.muon_dimension_numbers(layer)
    assert numbers.value_kernel == numbers.gate_kernel
    assert numbers.value_kernel.output_axis == (-2, -1)
    assert numbers.beta_kernel.reduction_axis == (-2,)
    assert numbers.out_kernel.reduction_axis == (-3, -2)
    assert numbers.key_convolution is None


def test_splits_of_heads_change_no_value() -> None:
    layer = make_layer()
    x = jax.random.normal(jax.random.key(0), (4, SEQ, EMBED))
    rows = {"position_ids": positions_of(4, SEQ)}
    expected = quick_jit(lambda layer, x: layer(x, **rows))(layer, x)
    mesh = make_mesh({"data": 4, "tensor": 2})
    sharded = emtp.sharding.shard_model(layer, mesh)
    assert sharded.value_kernel.sharding.shard_shape((EMBED, HEADS, VALUE_DIM))[1] == HEADS // 2
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        assert_close(quick_jit(lambda layer, x: layer(x, **rows))(sharded, x), expected, 1e-5)
    context = make_mesh({"data": 4, "context": 2})
    with (
        jax.set_mesh(context),
        use_rules(DEFAULT_RULES),
        pytest.raises(ValueError, match="`rules` must not split positions over devices"),
    ):
        jax.jit(lambda x: layer(x, **rows))(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda key: nn.GatedDeltaNet(8, 2, 3, 4, 4, key=key), "`num_key_heads` must divide"),
        (lambda key: nn.GatedDeltaNet(8, 1, 0, 4, 4, key=key), "`num_value_heads` must be at"),
        (lambda key: nn.GatedDeltaNet(8, 1, 2, 4, 4, width=0, key=key), "`width` must be at"),
        (
            lambda key: nn.GatedDeltaNet(8, 1, 2, 4, 4, norm_epsilon=-1.0, key=key),
            "`epsilon` must be at least 0",
        ),
        (
            lambda key: make_layer().init_cache(1, 4, jnp.float32, rollback=-1),
            "`rollback` must be at least 0",
        ),
        (
            lambda key: nn.gated_delta_rule(
                jnp.ones((1, 1, 2, 1)),
                jnp.ones((1, 1, 2, 1)),
                jnp.ones((1, 1, 3, 1)),
                jnp.ones((1, 1, 3)),
                jnp.ones((1, 1, 3)),
            ),
            "`kv_heads` must divide `heads`; got 2 and 3",
        ),
    ],
)
def test_errors(make: Callable[[PRNGKeyArray], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(jax.random.key(0))
