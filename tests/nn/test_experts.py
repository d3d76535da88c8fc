"""A mixture of experts against loops over tokens in float64, and what its program holds."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from helpers import array_sizes, compiled_text, finite_differences
from jaxtyping import Array, TypeCheckError

import equinox_mtp as emtp
from equinox_mtp import nn
from equinox_mtp.nn.experts._grouped import Groups, Matrices, grouped_swiglu

BATCH, SEQ, EMBED, MLP, EXPERTS = 2, 7, 6, 5, 8
MASK = np.asarray([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 1]], bool)


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def swiglu(x: np.ndarray, gate: Any, up: Any, down: Any) -> np.ndarray:
    inner = x @ f64(gate)
    return (inner * sigmoid(inner) * (x @ f64(up))) @ f64(down)


def scores_of(x: np.ndarray, router: Any) -> np.ndarray:
    logits = x @ f64(router.kernel)
    if router.scores == "sigmoid":
        return sigmoid(logits)
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def chosen_by(scores: np.ndarray, router: Any) -> list[int]:
    """The experts of one token, best first, as the papers and the released code say."""
    corrected = scores + (0 if router.bias is None else f64(router.bias))
    size = len(scores) // router.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
    rank = [sum(sorted((corrected[i] for i in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda g: -rank[g])[: router.top_groups]
    allowed = [i for g in kept for i in groups[g]]
    return sorted(allowed, key=lambda i: -corrected[i])[: router.top_k]


def mixture_by_loop(x: np.ndarray, mixture: Any) -> np.ndarray:
    out, router = np.zeros_like(x), mixture.router
    for place in np.ndindex(x.shape[:2]):
        token = x[place]
        scores = scores_of(token, router)
        ids = chosen_by(scores, router)
        total = sum(scores[i] for i in ids) if router.normalize else 1.0
        for i in ids:
            weights = [w[i] for w in (mixture.experts.gate, mixture.experts.up)]
            expert = swiglu(token, weights[0], weights[1], mixture.experts.down[i])
            out[place] += router.scaling_factor * scores[i] / total * expert
        if mixture.shared_expert is not None:
            shared = mixture.shared_expert
            y = swiglu(token, shared.gate.kernel, shared.up.kernel, shared.down.kernel)
            if mixture.shared_gate is not None:
                y = y * sigmoid(token @ f64(mixture.shared_gate.kernel))
            out[place] += y
    return out


def statistics_by_loop(x: np.ndarray, router: Any, mask: np.ndarray) -> dict[str, Any]:
    experts = len(router.kernel[0])
    load, shares, z_loss = np.zeros(experts), np.zeros(experts), 0.0
    sequence_losses, rows = 0.0, 0
    for b in range(len(x)):
        plain, of_row = np.zeros(experts), np.zeros(experts)
        for s in np.flatnonzero(mask[b]):
            scores = scores_of(x[b, s], router)
            share = scores / scores.sum()
            for i in chosen_by(scores, router):
                load[i] += 1
            for i in np.argsort(-scores)[: router.top_k]:
                plain[i] += 1
            of_row += share
            z_loss += np.log(np.exp(x[b, s] @ f64(router.kernel)).sum()) ** 2
        shares += of_row
        tokens = mask[b].sum()
        if tokens:
            rows += 1
            f = experts / (router.top_k * tokens) * plain
            sequence_losses += f @ (of_row / tokens)
    return {
        "load": load,
        "scores": shares,
        "tokens": mask.sum(),
        "rows": rows,
        "z_losses": z_loss,
        "sequence_balance_losses": sequence_losses,
    }


def make_mixture(
    *, shared: bool = False, gated: bool = False, seed: int = 0, **router: Any
) -> nn.MixtureOfExperts:
    def make(key: Array) -> nn.MixtureOfExperts:
        return nn.MixtureOfExperts(
            nn.Router(EMBED, EXPERTS, key=key, **router),
            nn.Experts(EXPERTS, EMBED, MLP, key=key),
            shared_expert=nn.SwiGLU(EMBED, 4, key=key) if shared else None,
            shared_gate=nn.Linear(EMBED, 1, key=key) if gated else None,
        )

    return build(make, seed)


CASES: dict[str, dict[str, Any]] = {
    "one-of-all": {"top_k": 1, "normalize": False},
    "softmax": {"top_k": 3},
    "softmax-as-it-is": {"top_k": 2, "normalize": False},
    "sigmoid": {"top_k": 2, "scores": "sigmoid"},
    "sigmoid-bias": {"top_k": 2, "scores": "sigmoid", "bias": True, "scaling_factor": 1.5},
    "groups": {
        "top_k": 3,
        "scores": "sigmoid",
        "bias": True,
        "num_groups": 4,
        "top_groups": 2,
        "scaling_factor": 2.5,
        "shared": True,
    },
    "groups-of-one": {"top_k": 2, "num_groups": 8, "top_groups": 3},
    "all-experts": {"top_k": 8, "normalize": False},
    "gated-shared": {"top_k": 3, "shared": True, "gated": True},
}


def inputs(seed: int = 0, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, SEQ, EMBED))


def low(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)


run_with_mask = quick_jit(lambda mixture, x, mask: mixture(x, token_mask=mask))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_statistics(name: str) -> None:
    mixture, x = make_mixture(**CASES[name]), inputs()
    y, statistics = run_with_mask(mixture, low(x), jnp.asarray(MASK))
    assert_close(y, mixture_by_loop(x, mixture), 1e-5)
    for field, expected in statistics_by_loop(x, mixture.router, MASK).items():
        np.testing.assert_allclose(getattr(statistics, field), expected, rtol=2e-5, err_msg=field)
    # Outputs do not depend on which positions are tokens.
    again, whole = run_with_mask(mixture, low(x), jnp.ones_like(MASK))
    np.testing.assert_array_equal(again, y)
    everywhere = statistics_by_loop(x, mixture.router, np.ones_like(MASK))
    np.testing.assert_allclose(whole.load, everywhere["load"])


@pytest.mark.parametrize("name", ["softmax", "groups"])
def test_without_a_mask_every_position_is_a_token(name: str) -> None:
    mixture, x = make_mixture(**CASES[name]), low(inputs())
    y, statistics = run_with_mask(mixture, x, None)
    expected, everywhere = run_with_mask(mixture, x, jnp.ones_like(MASK))
    np.testing.assert_array_equal(y, expected)
    for one, other in zip(*map(jax.tree.leaves, (statistics, everywhere)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_cases_differ() -> None:
    """Groups and biases change the choice: tests without an effect would not tell."""
    x = inputs()
    ids = {
        name: make_mixture(**CASES[name]).router(low(x)).expert_ids.tolist()
        for name in ("sigmoid", "sigmoid-bias")
    }
    assert ids["sigmoid"] != ids["sigmoid-bias"]
    router = make_mixture(**CASES["groups"]).router
    free = nn.Router(EMBED, EXPERTS, top_k=3, scores="sigmoid", bias=True, key=jax.random.key(0))
    free = eqx.tree_at(lambda r: (r.kernel, r.bias), free, (router.kernel, router.bias))
    assert (free(low(x)).expert_ids != router(low(x)).expert_ids).any()


@pytest.mark.parametrize("name", ["softmax", "groups", "gated-shared"])
def test_gradients(name: str) -> None:
    mixture, x = make_mixture(**CASES[name]), inputs(1)[:, :3]
    direction = np.random.default_rng(2).normal(size=x.shape)

    def loss(mixture: Any, x: Array) -> Array:
        return jnp.sum(mixture(x)[0] * low(direction))

    of_mixture, of_x = quick_jit(lambda m, x: eqx.filter_grad(lambda p: loss(*p))((m, x)))(
        mixture, low(x)
    )
    # In NumPy: an index into an array of JAX takes far longer.
    copy = jax.tree.map(f64, mixture)
    expected = finite_differences(lambda x: np.sum(mixture_by_loop(x, copy) * direction), x)
    assert_close(of_x, expected, 1e-4)
    for where in (
        lambda m: m.router.kernel,
        lambda m: m.experts.gate,
        lambda m: m.experts.up,
        lambda m: m.experts.down,
    ):

        def by_loop(weights: np.ndarray, where: Callable[..., Any] = where) -> float:
            changed = eqx.tree_at(where, copy, weights)
            return float(np.sum(mixture_by_loop(x, changed) * direction))

        weights = f64(where(mixture))
        assert_close(where(of_mixture), finite_differences(by_loop, weights), 1e-4)
    if mixture.router.bias is not None:
        np.testing.assert_array_equal(of_mixture.router.bias, 0)


def test_gradients_of_the_losses() -> None:
    """Of what is differentiable in them: the scores, and not the choices."""
    mixture, x = make_mixture(**CASES["sigmoid-bias"]), inputs(3)
    router = mixture.router

    def losses(router: Any, x: Array) -> Array:
        statistics = nn.router_statistics(router(x), jnp.asarray(MASK))
        return (
            statistics.balance_loss + 2 * statistics.sequence_balance_loss + 3 * statistics.z_loss
        )

    def by_loop(kernel: np.ndarray) -> float:
        sums = statistics_by_loop(x, eqx.tree_at(lambda r: r.kernel, router, kernel), MASK)
        load, tokens = sums["load"], sums["tokens"]
        balance = EXPERTS * (load / load.sum()) @ (sums["scores"] / tokens)
        sequence = sums["sequence_balance_losses"] / sums["rows"]
        return float(balance + 2 * sequence + 3 * sums["z_losses"] / tokens)

    value, gradient = quick_jit(eqx.filter_value_and_grad(losses))(router, low(x))
    assert_close(value, by_loop(f64(router.kernel)), 1e-5)
    assert_close(gradient.kernel, finite_differences(by_loop, f64(router.kernel)), 1e-4)
    np.testing.assert_array_equal(gradient.bias, 0)


def test_statistics_add_up() -> None:
    """Of microbatches, in a scan; and they are those of the whole."""
    mixture, x = make_mixture(**CASES["groups"]), inputs(batch=4)
    mask = np.concatenate([MASK, ~MASK])
    run = quick_jit(lambda x, mask: mixture(x, token_mask=mask)[1])
    whole = run(low(x), jnp.asarray(mask))
    parts = low(x).reshape(2, 2, SEQ, EMBED), jnp.asarray(mask).reshape(2, 2, SEQ)

    @quick_jit
    def in_a_scan(parts: Any) -> Any:
        nothing = jax.tree.map(jnp.zeros_like, whole)
        add = lambda total, part: (total + mixture(part[0], token_mask=part[1])[1], None)  # noqa: E731
        return jax.lax.scan(add, nothing, parts)[0]

    total = in_a_scan(parts)
    for one, other in zip(jax.tree.leaves(total), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    for name in ("balance_loss", "sequence_balance_loss", "z_loss"):
        assert_close(getattr(total, name), getattr(whole, name))


def test_no_tokens() -> None:
    mixture, x = make_mixture(**CASES["groups"]), low(inputs())

    def losses(router: Any, mask: Array) -> Array:
        s = nn.router_statistics(router(x), mask)
        return s.balance_loss + s.sequence_balance_loss + s.z_loss

    run = quick_jit(eqx.filter_value_and_grad(losses))
    value, gradient = run(mixture.router, jnp.zeros_like(MASK))
    assert value == 0
    np.testing.assert_array_equal(gradient.kernel, 0)
    y, statistics = mixture(x[:, :0])
    assert y.shape == (BATCH, 0, EMBED)
    np.testing.assert_array_equal(statistics.load, np.zeros(EXPERTS))


def test_vmap() -> None:
    mixture = make_mixture(**CASES["groups"])
    x = np.stack([inputs(0), inputs(1), inputs(2)])
    y, statistics = quick_jit(jax.vmap(lambda x: mixture(x)))(low(x))
    for index in range(3):
        assert_close(y[index], mixture_by_loop(x[index], mixture), 1e-5)
    assert statistics.load.shape == (3, EXPERTS)

    def total(mixture: Any, x: Array) -> Array:
        return jnp.sum(jax.vmap(lambda x: mixture(x)[0])(x) ** 2)

    def one_by_one(mixture: Any, x: Array) -> Array:
        return sum((jnp.sum(mixture(part)[0] ** 2) for part in x), jnp.zeros(()))

    gradients = [quick_jit(eqx.filter_grad(f))(mixture, low(x)) for f in (total, one_by_one)]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert_close(one, other, 1e-5)


def test_bfloat16() -> None:
    mixture, x = make_mixture(**CASES["groups"]), low(inputs())
    small: Any = jax.tree.map(lambda p: p.astype(jnp.bfloat16), mixture)
    # The same choice, for numbers that may be compared.
    small = eqx.tree_at(lambda m: m.router, small, mixture.router)
    rounded = x.astype(jnp.bfloat16)
    y, _ = quick_jit(small)(rounded)
    assert y.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), small)
    expected, _ = quick_jit(wide)(rounded.astype(jnp.float32))
    assert_close(y, expected, 0.03)
    # Matrices are cast for decoding once, and the router's is not.
    decoding = mixture.for_decoding(jnp.bfloat16)
    assert decoding.router.kernel.dtype == jnp.float32
    assert decoding.experts.up.dtype == decoding.shared_expert.up.kernel.dtype == jnp.bfloat16  # type: ignore[union-attr]
    assert_close(quick_jit(decoding)(rounded)[0], quick_jit(mixture)(rounded)[0], 0.01)

    def total(mixture: Any, x: Array) -> Array:
        return jnp.sum(jnp.sin(mixture(x)[0].astype(jnp.float32)))

    gradients = quick_jit(eqx.filter_grad(total))(small, rounded)
    references = quick_jit(eqx.filter_grad(total))(wide, rounded.astype(jnp.float32))
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(references), strict=True):
        difference = jnp.linalg.norm((one.astype(jnp.float32) - other).ravel())
        assert float(difference) <= 0.05 * float(jnp.linalg.norm(other.ravel()))


@pytest.mark.parametrize(
    ("num_rows", "sizes", "first"),
    [
        (20, [5, 0, 9], 3),
        (200, [100, 1, 0, 99], 0),
        (3, [0, 0, 2, 0, 0], 1),
        (1, [1], 0),
        (40, [0, 0], 0),
        (700, [600, 70], 30),
    ],
)
def test_networks_of_groups(num_rows: int, sizes: list[int], first: int) -> None:
    """One group after the other; rows of no group are 0, and get no gradient."""
    rng = np.random.default_rng(0)
    rows, cotangent = rng.normal(size=(2, num_rows, 5))
    weights = rng.normal(size=num_rows)
    gate, up = rng.normal(size=(2, len(sizes), 5, 3))
    matrices: Any = (gate, up, rng.normal(size=(len(sizes), 3, 5)))
    output, of_rows, of_weights = np.zeros_like(rows), np.zeros_like(rows), np.zeros_like(weights)
    of_matrices, start = [np.zeros_like(x) for x in matrices], first
    for group, size in enumerate(sizes):
        own = slice(start, start + size)
        x, w, out = rows[own], weights[own, None], cotangent[own]
        gate, up, down = (x[group] for x in matrices)
        inner, ups = x @ gate, x @ up
        silu, slope = inner * sigmoid(inner), sigmoid(inner) * (1 + inner * sigmoid(-inner))
        hidden = silu * ups
        output[own] = w * (hidden @ down)
        of_hidden = w * out @ down.T
        of_weights[own] = np.sum(out * (hidden @ down), 1)
        parts = (of_hidden * ups * slope, of_hidden * silu)
        of_rows[own] = parts[0] @ gate.T + parts[1] @ up.T
        for total, new in zip(
            of_matrices, (x.T @ parts[0], x.T @ parts[1], hidden.T @ (w * out)), strict=True
        ):
            total[group] = new
        start += size

    def run(rows: Array, weights: Array, matrices: Any, cotangent: Array) -> Any:
        groups = Groups(jnp.asarray(sizes, jnp.int32), jnp.int32(first))
        found, pull = jax.vjp(
            lambda x, w, m: grouped_swiglu(x, w, m, groups), rows, weights, Matrices(*matrices)
        )
        return found, *pull(cotangent)

    arguments = jax.tree.map(low, (rows, weights, matrices, cotangent))
    found = jax.tree.leaves(quick_jit(run)(*arguments))
    expected = (output, of_rows, of_weights, *of_matrices)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


def test_no_array_is_larger_than_the_copies_of_the_tokens() -> None:
    """Their inner features are kept for the gradient alone."""
    experts, embed, mlp, top_k, tokens = 16, 10, 12, 4, 300
    keys = jax.random.split(jax.random.key(0))
    mixture = nn.MixtureOfExperts(
        nn.Router(embed, experts, top_k=top_k, key=keys[0]),
        nn.Experts(experts, embed, mlp, key=keys[1]),
    )

    def loss(mixture: Any, x: Array) -> Array:
        y, statistics = mixture(x)
        return jnp.sum(y**2) + statistics.balance_loss + statistics.sequence_balance_loss

    x = jnp.ones((2, tokens // 2, embed))
    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    for function, features in ((lambda m, x: m(x), embed), (gradient, mlp)):
        sizes = array_sizes(compiled_text(function, mixture, x))
        assert max(sizes.values()) == tokens * top_k * features, max(sizes, key=sizes.__getitem__)


# In layers, decoders and models


def make_layer(key: Array, *, is_dense: bool = False, **router: Any) -> nn.TransformerDecoderLayer:
    keys = jax.random.split(key, 3)
    if is_dense:
        feed_forward: nn.AbstractFeedForward = nn.SwiGLU(EMBED, MLP, key=keys[1])
    else:
        feed_forward = nn.MixtureOfExperts(
            nn.Router(EMBED, EXPERTS, **{"top_k": 2, **router}, key=keys[1]),
            nn.Experts(EXPERTS, EMBED, MLP, key=keys[2]),
        )
    return nn.TransformerDecoderLayer.of(
        nn.GroupedQueryAttention(EMBED, 2, 1, 4, key=keys[0]),
        feed_forward,
        attention_norm=nn.RMSNorm(EMBED),
        feed_forward_norm=nn.RMSNorm(EMBED),
    )


def make_decoder(layers: list[Any]) -> nn.TransformerDecoder:
    embedding = jax.random.normal(jax.random.key(9), (11, EMBED))
    return nn.TransformerDecoder.of(layers, embedding=embedding, norm=nn.RMSNorm(EMBED))


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (BATCH, SEQ)))
ROWS = {
    "position_ids": jnp.tile(jnp.arange(SEQ), (BATCH, 1)),
    "segment_ids": jnp.asarray([[1, 1, 1, 1, 2, 2, 0], [1] * 7]),
}


def test_decoders_stack_statistics_over_layers() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [make_layer(key, is_dense=index in (0, 2)) for index, key in enumerate(keys)]
    run = quick_jit(lambda decoder: decoder(IDS, **ROWS))
    decoder = make_decoder(layers)
    hidden_states, statistics = run(decoder)
    assert statistics.load.shape == (2, EXPERTS)
    np.testing.assert_array_equal(statistics.tokens, [13, 13])
    np.testing.assert_array_equal(statistics.load.sum(-1), [26, 26])
    assert statistics.balance_loss.shape == statistics.z_loss.shape == (2,)
    x, mask = decoder.embedding[IDS], ROWS["segment_ids"] != 0
    loads = []
    run_layer = quick_jit(lambda layer, x: layer(x, **ROWS, token_mask=mask))
    for layer in layers:
        x = run_layer(layer, x)
        if isinstance(x, tuple):
            x, of_layer = x
            loads.append(of_layer.load)
    assert_close(hidden_states, x, 1e-5)
    np.testing.assert_array_equal(statistics.load, loads)
    # Dense layers alone give hidden states alone, and mixtures of several kinds a tuple.
    assert isinstance(run(make_decoder(layers[:1] + layers[2:3])), jax.Array)
    other = eqx.tree_at(lambda layer: layer.feed_forward, layers[1], _other_mixture(keys[0]))
    _, both = run(make_decoder([layers[1], other, layers[3]]))
    assert [part.load.shape for part in both] == [(1, EXPERTS), (1, 5), (1, EXPERTS)]


def _other_mixture(key: Array) -> nn.MixtureOfExperts:
    return nn.MixtureOfExperts(
        nn.Router(EMBED, 5, top_k=2, key=key), nn.Experts(5, EMBED, 3, key=key)
    )


def test_cached_steps_are_the_whole_pass() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    decoder = make_decoder([make_layer(key, is_dense=i == 0) for i, key in enumerate(keys)])
    run = quick_jit(lambda decoder: decoder(IDS, position_ids=ROWS["position_ids"]))
    expected, _ = run(decoder)
    decoding = decoder.for_decoding()
    cache, outputs = decoding.init_cache(BATCH, SEQ), []
    for method, start, stop in (("prefill", 0, 4), ("decode", 4, 5), ("decode", 5, SEQ)):
        step = quick_jit(getattr(decoding, method))
        positions = ROWS["position_ids"][:, start:stop]
        out, cache = step(IDS[:, start:stop], cache, position_ids=positions)
        outputs.append(out)
    assert_close(jnp.concatenate(outputs, axis=1), expected, 1e-5)


def make_model(**options: Any) -> emtp.MTPModel:
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [make_layer(key, is_dense=i == 0) for i, key in enumerate(keys)]
    block = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig(2, **options), lambda key: make_layer(key), embed_size=EMBED, key=keys[0]
    )
    return emtp.MTPModel(make_decoder(layers), block)


@pytest.mark.parametrize("repeated", [False, True])
def test_models_pass_statistics_out(repeated: bool) -> None:
    model = make_model(repeated_layer=repeated)
    rows = np.random.default_rng(1).integers(1, 11, (BATCH, SEQ + 1))
    segment_ids = np.asarray([[1, 1, 1, 1, 2, 2, 2, 0], [1] * 8])
    batch = emtp.make_batch(rows, segment_ids=segment_ids)
    output = quick_jit(lambda model: model(batch))(model)
    segments = np.asarray(batch.segment_ids)
    np.testing.assert_array_equal(output.auxiliary.tokens, [np.sum(segments != 0)] * 2)
    targets: Any = batch.align(num_depths=2).targets
    tokens = np.asarray(targets.token_mask).sum((1, 2))
    assert output.mtp.auxiliary.load.shape == (2, EXPERTS)
    np.testing.assert_array_equal(output.mtp.auxiliary.tokens, tokens)
    np.testing.assert_array_equal(output.mtp.auxiliary.load.sum(-1), 2 * tokens)

    def loss(model: Any) -> Array:
        output = model(batch)
        routers = (output.auxiliary, output.mtp.auxiliary)
        balance = sum(jnp.sum(s.balance_loss + s.z_loss) for s in routers)
        return output.main.mean + output.mtp.loss + 0.01 * balance

    gradients = quick_jit(eqx.filter_grad(loss))(model)
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(gradients)]
    assert all(math.isfinite(x) and x > 0 for x in norms)


def test_the_bias_balances() -> None:
    """Every expert gets its share of random tokens after steps on the bias alone."""
    router = make_mixture(**CASES["sigmoid-bias"]).router
    x = jax.random.normal(jax.random.key(0), (4, 64, EMBED))

    @quick_jit
    def step(router: Any, rate: Any) -> Any:
        load = nn.router_statistics(router(x)).load
        bias = nn.update_router_bias(router.bias, load, rate)
        return eqx.tree_at(lambda r: r.bias, router, bias), load

    router, first = step(router, jnp.float32(0.01))
    load = first
    for number in range(200):
        router, load = step(router, jnp.float32(0.01 / (1 + number / 20)))
    mean = 4 * 64 * 2 / EXPERTS
    assert np.max(first) > 1.5 * mean
    assert np.max(load) < 1.15 * mean
    stacked = nn.update_router_bias(jnp.zeros((2, 3)), jnp.asarray([[1.0, 2, 3], [5, 5, 5]]), 0.5)
    np.testing.assert_array_equal(stacked, [[0.5, 0, -0.5], [0, 0, 0]])


def test_what_optimizers_must_know() -> None:
    mixture = make_mixture(**CASES["groups"], gated=True)
    decays, matrices = emtp.weight_decay_mask(mixture), emtp.muon_dimension_numbers(mixture)
    assert decays.router.bias is False
    assert matrices.router.bias is None
    assert decays.experts.up is True
    assert matrices.experts.up == matrices.experts.down
    assert (matrices.experts.up.reduction_axis, matrices.experts.up.output_axis) == ((-2,), (-1,))


router = partial(nn.Router, EMBED, EXPERTS, key=jax.random.key(0))
experts = partial(nn.Experts, EXPERTS, EMBED, MLP, key=jax.random.key(0))
linear = partial(nn.Linear, key=jax.random.key(0))
swiglu_of = partial(nn.SwiGLU, mlp_size=4, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: router(top_k=0), "`top_k` must be at least 1; got 0"),
        (lambda: router(top_k=9), "`top_k` must be at most `num_experts`; got 9 and 8"),
        (lambda: router(top_k=1, num_groups=3), "`num_groups` must divide .*; got 3 and 8"),
        (lambda: router(top_k=1, num_groups=16), "`num_groups` must divide .*; got 16 and 8"),
        (lambda: router(top_k=1, num_groups=2, top_groups=3), "`top_groups` .* got 3 and 2"),
        (lambda: router(top_k=3, num_groups=4), "at most the 2 experts of `top_groups`.*got 3"),
        (lambda: router(top_k=1, scaling_factor=0.0), "`scaling_factor` must be above 0"),
        (lambda: nn.Experts(0, 2, 2, key=jax.random.key(0)), "`num_experts` must be at least 1"),
        (
            lambda: nn.MixtureOfExperts(
                router(top_k=1), nn.Experts(4, EMBED, MLP, key=jax.random.key(0))
            ),
            "`experts` must be 8 experts of 6 features.*got 4 of 6",
        ),
        (
            lambda: nn.MixtureOfExperts(router(top_k=1), experts(), shared_gate=linear(EMBED, 1)),
            "`shared_gate` is of a `shared_expert`",
        ),
        (
            lambda: nn.MixtureOfExperts(
                router(top_k=1),
                experts(),
                shared_expert=swiglu_of(EMBED),
                shared_gate=linear(EMBED, 2),
            ),
            "`shared_gate` must map 6 features to 1",
        ),
        (
            lambda: nn.MixtureOfExperts(router(top_k=1), experts(), shared_expert=swiglu_of(5)),
            "`shared_expert` must take 6 features",
        ),
        (lambda: make_mixture(top_k=1)(jnp.zeros((1, 2, 5))), "the 6 features of the experts"),
        (lambda: router(top_k=1)(jnp.zeros((1, 2, 5))), "the 6 features of the router"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_unknown_scores() -> None:
    with pytest.raises((ValueError, TypeCheckError), match="softmax"):
        router(top_k=1, scores="relu")  # pyright: ignore[reportArgumentType]
