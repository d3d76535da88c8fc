"""Parts of layers beyond the default ones against loops in float64; decoders of unlike layers."""

import math
import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from helpers import assert_rejects
from jaxtyping import Array

import equinox_mtp as emtp
from equinox_mtp import nn

BATCH, SEQ, EMBED, HEADS, KV_HEADS, HEAD_DIM = 2, 9, 12, 4, 2, 8
POSITIONS = np.asarray([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 0, 1, 2, 3]])
SEGMENTS = np.asarray([[1] * 9, [1] * 5 + [2] * 4])
ROTARIES = {
    "plain": nn.Rotary(50.0),
    "partial": nn.Rotary(50.0, size=4),
    "interleaved": nn.Rotary(50.0, interleaved=True),
    "partial-interleaved": nn.Rotary(50.0, size=6, interleaved=True),
    "linear": nn.Rotary(50.0, scaling=nn.LinearScaling(4.0)),
    "llama3": nn.Rotary(500.0, scaling=nn.Llama3Scaling(8.0, original_length=32)),
    "yarn": nn.Rotary(500.0, scaling=nn.YarnScaling(4.0, original_length=64)),
}


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def frequency(rotary: nn.Rotary, i: int, size: int) -> float:
    """As the papers define it, one pair at a time."""
    plain = rotary.theta ** (-2 * i / size)
    scaling: Any = rotary.scaling
    if scaling is None:
        return plain
    if isinstance(scaling, nn.LinearScaling):
        return plain / scaling.factor
    wavelength = 2 * math.pi / plain
    if isinstance(scaling, nn.Llama3Scaling):
        length = scaling.original_length
        if wavelength < length / scaling.high_freq_factor:
            return plain
        if wavelength > length / scaling.low_freq_factor:
            return plain / scaling.factor
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = (length / wavelength - low) / (high - low)
        return (1 - smooth) * plain / scaling.factor + smooth * plain

    # YaRN: which (real) index has so many turns within the original length?
    def index(turns: float) -> float:
        return (
            size
            * math.log(scaling.original_length / (turns * 2 * math.pi))
            / (2 * math.log(rotary.theta))
        )

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), size - 1)
    ramp = min(max((i - low) / (high - low), 0.0), 1.0)
    return ramp * plain / scaling.factor + (1 - ramp) * plain


def rotate(x: np.ndarray, rotary: nn.Rotary) -> np.ndarray:
    """`x` is `[batch seq heads head_dim]`."""
    out = x.copy()
    size = x.shape[-1] if rotary.size is None else rotary.size
    amplitude = 0.1 * math.log(4.0) + 1 if isinstance(rotary.scaling, nn.YarnScaling) else 1.0
    for (b, s), position in np.ndenumerate(POSITIONS):
        for i in range(size // 2):
            one, two = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + size // 2)
            angle = position * frequency(rotary, i, size)
            sin, cos = amplitude * math.sin(angle), amplitude * math.cos(angle)
            out[b, s, :, one] = x[b, s, :, one] * cos - x[b, s, :, two] * sin
            out[b, s, :, two] = x[b, s, :, one] * sin + x[b, s, :, two] * cos
    return out


def attend(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int, packed: bool
) -> np.ndarray:
    out = np.zeros_like(query)
    for b, i, h in np.ndindex(BATCH, SEQ, HEADS):
        kv = h // (HEADS // KV_HEADS)
        seen = [
            j
            for j in range(max(0, i - window + 1), i + 1)
            if not packed or SEGMENTS[b, i] == SEGMENTS[b, j]
        ]
        logits = np.asarray([query[b, i, h] @ key[b, j, kv] for j in seen]) / math.sqrt(HEAD_DIM)
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights @ value[b, seen, kv] / weights.sum()
    return out


def norm(x: np.ndarray, module: Any) -> np.ndarray:
    if module is None:
        return x
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + module.epsilon) * f64(module.scale)


def oracle(x: np.ndarray, module: Any, *, packed: bool) -> np.ndarray:
    def project(kernel: Array, bias: Array | None) -> np.ndarray:
        out = np.einsum("bse,ehd->bshd", x, f64(kernel))
        return out if bias is None else out + f64(bias)

    query = norm(project(module.query_kernel, module.query_bias), module.query_norm)
    key = norm(project(module.key_kernel, module.key_bias), module.key_norm)
    value = project(module.value_kernel, module.value_bias)
    if module.rotary is not None:
        query, key = rotate(query, module.rotary), rotate(key, module.rotary)
    attended = attend(query, key, value, module.window or SEQ, packed)
    if module.gate_kernel is not None:
        attended /= 1 + np.exp(-project(module.gate_kernel, None))
    out = np.einsum("bshd,hde->bse", attended, f64(module.out_kernel))
    return out if module.out_bias is None else out + f64(module.out_bias)


def make_attention(**options: Any) -> nn.GroupedQueryAttention:
    # `build` moves all parameters away from their initial values.
    return build(
        lambda key: nn.GroupedQueryAttention(EMBED, HEADS, KV_HEADS, HEAD_DIM, key=key, **options)
    )


CASES: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "out-bias": {"out_bias": True},
    "norm": {"norm_epsilon": 0.1},
    "gate": {"gate": True},
    "window": {"window": 3},
    "no-rotary": {"rotary": None},
    "window-of-one": {"window": 1},
    "all": {
        "bias": True,
        "out_bias": True,
        "gate": True,
        "norm_epsilon": 0.1,
        "window": 4,
        "rotary": ROTARIES["partial-interleaved"],
    },
    **{f"rotary-{name}": {"rotary": rotary} for name, rotary in ROTARIES.items()},
}


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_attention_in_parallel(name: str, by_position: bool) -> None:
    function = nn.causal_attention_by_position if by_position else nn.causal_attention
    module = make_attention(**CASES[name], attention=function)
    x = np.random.default_rng(0).normal(size=(BATCH, SEQ, EMBED))
    rows = {"position_ids": jnp.asarray(POSITIONS), "segment_ids": jnp.asarray(SEGMENTS)}
    actual = quick_jit(lambda module, x: module(x, **rows))(module, jnp.asarray(x, jnp.float32))
    assert_close(actual, oracle(x, module, packed=True), 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_attention_in_cached_steps(name: str) -> None:
    """Three positions, then one, then five, of which the first row's are those of the oracle."""
    module = make_attention(**CASES[name])
    x = np.random.default_rng(0).normal(size=(BATCH, SEQ, EMBED))
    positions = jnp.tile(jnp.arange(SEQ), (BATCH, 1))
    cache = module.init_cache(BATCH, SEQ + 2, jnp.float32)
    step = quick_jit(lambda module, x, cache, ids: module.decode(x, cache, position_ids=ids))
    outputs = []
    for start, stop in ((0, 3), (3, 4), (4, SEQ)):
        part = jnp.asarray(x[:, start:stop], jnp.float32)
        out, cache = step(module, part, cache, positions[:, start:stop])
        outputs.append(out)
    actual = jnp.concatenate(outputs, axis=1)
    assert_close(actual[:1], oracle(x, module, packed=True)[:1], 2e-5)


@pytest.mark.parametrize("name", ["all", "window-of-one"])
def test_prefill_is_the_first_cached_step(name: str) -> None:
    module = make_attention(**CASES[name])
    x = jax.random.normal(jax.random.key(0), (BATCH, SEQ, EMBED))
    rows = {"position_ids": jnp.tile(jnp.arange(SEQ), (BATCH, 1))}
    empty = module.init_cache(BATCH, SEQ + 2, jnp.float32)
    outcomes = [
        quick_jit(lambda x, cache, run=run: run(x, cache, **rows))(x, empty)
        for run in (module.prefill, module.decode)
    ]
    for one, other in zip(*map(jax.tree.leaves, outcomes), strict=True):
        assert_close(one, other, 2e-5)
    # What a row has beyond its cache is dropped.
    short = module.init_cache(BATCH, SEQ - 2, jnp.float32)
    _, cache = module.prefill(x, short, **rows)
    assert_close(cache.key, outcomes[0][1].key[..., : SEQ - 2])


@pytest.mark.parametrize("name", ["all", "window-of-one"])
def test_cached_steps_of_no_positions(name: str) -> None:
    module = make_attention(**CASES[name])
    x = jax.random.normal(jax.random.key(0), (BATCH, 3, EMBED))
    positions = jnp.tile(jnp.arange(3), (BATCH, 1))
    _, cache = module.prefill(x, module.init_cache(BATCH, SEQ, jnp.float32), position_ids=positions)
    for run in (module.decode, module.prefill):
        out, after = run(x[:, :0], cache, position_ids=positions[:, :0])
        assert out.shape == (BATCH, 0, EMBED)
        assert eqx.tree_equal(after, cache)


def test_attention_in_bfloat16_and_its_gradient() -> None:
    module = make_attention(bias=True, norm_epsilon=0.1, window=4)
    x = jax.random.normal(jax.random.key(0), (BATCH, SEQ, EMBED))
    rows = {"position_ids": jnp.asarray(POSITIONS), "segment_ids": jnp.asarray(SEGMENTS)}

    def total(module: Any, x: Array) -> Array:
        return jnp.sum(jnp.sin(module(x, **rows).astype(jnp.float32)))

    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), module)
    expected = quick_jit(eqx.filter_value_and_grad(total))(module, x)
    value, gradients = quick_jit(eqx.filter_value_and_grad(total))(low, x.astype(jnp.bfloat16))
    assert_close(value, expected[0], 0.1)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        assert one.dtype == jnp.bfloat16
        difference = jnp.linalg.norm((one.astype(jnp.float32) - other).ravel())
        assert float(difference) < 0.05 * float(jnp.linalg.norm(other.ravel())) + 1e-3


def test_norms_that_store_their_scale_less_1() -> None:
    fresh, plain = nn.RMSNorm(6, scale_offset=1.0), nn.RMSNorm(6)
    assert not fresh.scale.any()
    x = 3 * jax.random.normal(jax.random.key(0), (4, 6))
    np.testing.assert_array_equal(fresh(x), plain(x))
    # A scale that bfloat16 has only less 1.
    scale = jnp.full(6, 2.0**-12, jnp.bfloat16)
    narrow = eqx.tree_at(lambda norm: norm.scale, fresh, scale)
    x64 = f64(x)
    expected = x64 / np.sqrt(np.mean(x64**2, -1, keepdims=True) + 1e-5) * (1 + 2.0**-12)
    assert_close(narrow(x), expected, 1e-6)
    gradient = jax.grad(lambda norm: norm(x).sum())(fresh)
    assert_close(gradient.scale, jax.grad(lambda norm: norm(x).sum())(plain).scale, 1e-6)
    assert emtp.weight_decay_mask(fresh).scale is False


def test_yarn_at_its_ends() -> None:
    scaling = nn.YarnScaling(4.0, original_length=64)
    scaled = nn.Rotary(500.0, scaling=scaling).frequencies(32)
    plain = nn.Rotary(500.0).frequencies(32)
    np.testing.assert_allclose(scaled[0], plain[0])
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4, rtol=1e-6)
    assert nn.YarnScaling(4.0, attention_factor=0.7).amplitude == 0.7
    assert nn.YarnScaling(1.0).amplitude == 1.0
    exact = nn.YarnScaling(4.0, original_length=64, rounds_ramp=False)
    other = nn.Rotary(500.0, scaling=exact).frequencies(32)
    assert (other != scaled).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Rotary(0.0), "`theta` must be above 0"),
        (lambda: nn.Rotary(size=3), "`size` must be even"),
        (lambda: nn.Rotary(size=0), "`size` must be at least 1"),
        (lambda: nn.LinearScaling(0.0), "`factor` must be above 0"),
        (lambda: nn.Llama3Scaling(8.0, 4.0, 1.0), "`low_freq_factor` must be below"),
        (lambda: nn.YarnScaling(4.0, attention_factor=-1.0), "`attention_factor` must be above 0"),
        (lambda: make_attention(window=0), "`window` must be at least 1"),
        (lambda: nn.RMSNorm(4, scale_offset=math.inf), "`scale_offset` must be finite"),
        (
            lambda: nn.Rotary(size=10)(jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 1), int)),
            "`head_dim` must be even and at least `size`",
        ),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Decoders whose layers are not all alike


def make_layer(window: int | None, key: Array) -> nn.TransformerDecoderLayer:
    attention_key, feed_forward_key = jax.random.split(key)
    return nn.TransformerDecoderLayer.of(
        nn.GroupedQueryAttention(
            EMBED, HEADS, KV_HEADS, HEAD_DIM, window=window, key=attention_key
        ),
        nn.SwiGLU(EMBED, 16, key=feed_forward_key),
        attention_norm=nn.RMSNorm(EMBED),
        feed_forward_norm=nn.RMSNorm(EMBED),
        dropout_rate=0.1,
    )


WINDOWS = (None, None, 3, 3, None, 2)


def make_decoder(**options: Any) -> tuple[nn.TransformerDecoder, list[nn.TransformerDecoderLayer]]:
    keys = jax.random.split(jax.random.key(0), len(WINDOWS) + 1)
    layers = [make_layer(window, key) for window, key in zip(WINDOWS, keys[1:], strict=True)]
    embedding = jax.random.normal(keys[0], (11, EMBED))
    return nn.TransformerDecoder.of(
        layers, embedding=embedding, norm=nn.RMSNorm(EMBED), **options
    ), layers


def test_unlike_layers_are_scanned_in_runs() -> None:
    decoder, layers = make_decoder()
    assert decoder.num_layers == len(WINDOWS)
    assert isinstance(decoder.layers, tuple)
    lengths = [run.num_layers for run in decoder.layers if isinstance(run, nn.LayerRun)]
    assert lengths == [2, 2, 1, 1]
    ids = np.random.default_rng(0).integers(0, 11, (BATCH, SEQ))
    rows = {"position_ids": jnp.asarray(POSITIONS), "segment_ids": jnp.asarray(SEGMENTS)}
    hidden: Any = decoder.embedding[ids]
    for index, layer in enumerate(layers):
        hidden = layer(hidden, **rows, inference=True)
        assert eqx.tree_equal(decoder.layer(index), layer)
    run = quick_jit(lambda decoder: decoder(jnp.asarray(ids), **rows, inference=True))
    assert_close(run(decoder), hidden, 1e-5)
    recomputing, _ = make_decoder(checkpoint_policy=None)
    assert_close(run(recomputing), hidden, 1e-5)
    # The layers of `for_decoding` are single ones, and run as well.
    assert_close(run(decoder.for_decoding()), hidden, 1e-5)
    with pytest.raises(ValueError, match="`index` must be at least 0 and at most 5"):
        decoder.layer(6)


def test_unlike_layers_draw_their_own_dropout() -> None:
    decoder, layers = make_decoder()
    ids = jnp.zeros((BATCH, SEQ), int)
    positions, key = jnp.asarray(POSITIONS), jax.random.key(1)
    hidden: Any = decoder.embedding[ids]
    for layer, layer_key in zip(layers, jax.random.split(key, len(layers)), strict=True):
        hidden = layer(hidden, position_ids=positions, key=layer_key, inference=False)
    actual = quick_jit(
        lambda decoder: decoder(ids, position_ids=positions, key=key, inference=False)
    )(decoder)
    assert_close(actual, hidden, 1e-5)


def test_unlike_layers_in_cached_steps() -> None:
    decoder, _ = make_decoder()
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 11, (BATCH, SEQ)))
    positions = jnp.tile(jnp.arange(SEQ), (BATCH, 1))
    expected = decoder(ids, position_ids=positions, inference=True)
    decoding = decoder.for_decoding()
    cache, outputs = decoding.init_cache(BATCH, SEQ), []
    step = quick_jit(lambda d, ids, cache, positions: d.decode(ids, cache, position_ids=positions))
    for start, stop in ((0, 4), (4, 5), (5, SEQ)):
        out, cache = step(decoding, ids[:, start:stop], cache, positions[:, start:stop])
        outputs.append(out)
    assert_close(jnp.concatenate(outputs, axis=1), expected, 1e-5)


def test_a_model_of_unlike_layers_trains() -> None:
    decoder, _ = make_decoder()
    block = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig(2),
        lambda key: make_layer(None, key),
        embed_size=EMBED,
        key=jax.random.key(2),
    )
    model = emtp.MTPModel(decoder, block)
    batch = emtp.make_batch(np.arange(20).reshape(2, 10) % 11)

    def loss(model: Any) -> Array:
        output = model(batch, inference=True)
        return output.main.mean + output.mtp.loss

    gradients = quick_jit(eqx.filter_grad(loss))(model)
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(gradients)]
    assert all(math.isfinite(x) and x > 0 for x in norms)


def test_biases_are_neither_decayed_nor_matrices() -> None:
    module = make_attention(bias=True, out_bias=True, norm_epsilon=0.1)
    decays, numbers = emtp.weight_decay_mask(module), emtp.muon_dimension_numbers(module)
    biases = ("query_bias", "key_bias", "value_bias", "out_bias")
    for name in (*biases, "query_norm.scale", "key_norm.scale"):
        attribute = operator.attrgetter(name)
        assert attribute(decays) is False
        assert attribute(numbers) is None
    assert decays.query_kernel is True
    assert numbers.query_kernel is not None


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="`layers` must hold at least one layer"):
        nn.TransformerDecoder.of([], embedding=jnp.zeros((3, EMBED)), norm=nn.RMSNorm(EMBED))


def test_parts_that_do_not_fit() -> None:
    layer, embedding = make_layer(None, jax.random.key(0)), jnp.zeros((3, EMBED))
    with pytest.raises(ValueError, match="`norm` must be of the 12 features of `embedding`; got"):
        nn.TransformerDecoder.of([layer], embedding=embedding, norm=nn.RMSNorm(EMBED + 1))
    head = jnp.zeros((4, EMBED))
    norm = nn.RMSNorm(EMBED)
    assert_rejects(
        "head", nn.TransformerDecoder.of, [layer], embedding=embedding, norm=norm, head=head
    )
    with pytest.raises(ValueError, match=r"`attention_norm` and `feed_forward_norm`.*12 and 5"):
        nn.TransformerDecoderLayer.of(
            layer.attention,
            layer.feed_forward,
            attention_norm=nn.RMSNorm(EMBED),
            feed_forward_norm=nn.RMSNorm(5),
        )
