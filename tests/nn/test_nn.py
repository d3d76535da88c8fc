"""The reference decoder and its parts, against float64 NumPy."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray

from equinox_mtp import LinearHead, nn
from equinox_mtp._decoder import split_auxiliary

_BATCH, _SEQ, _EMBED, _HEADS, _KV_HEADS, _HEAD_DIM = 2, 7, 12, 4, 2, 6
_CONFIG = nn.TransformerConfig(
    vocab_size=11,
    embed_size=_EMBED,
    num_layers=3,
    num_heads=_HEADS,
    num_kv_heads=_KV_HEADS,
    head_dim=_HEAD_DIM,
    mlp_size=10,
    rope_theta=50.0,
    norm_epsilon=0.1,
)
_POSITIONS = np.asarray([[0, 1, 2, 3, 0, 1, 2], [5, 6, 7, 8, 9, 10, 11]])
_SEGMENTS = np.asarray([[1, 1, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 0, 0]])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _f32(x: np.ndarray, dtype: Any = jnp.float32) -> Array:
    return jnp.asarray(x, dtype)


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _rms_norm(x: np.ndarray, scale: Any, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * _f64(scale)


def _rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    out, half = np.empty_like(x), x.shape[-1] // 2
    for (b, s), position in np.ndenumerate(positions):
        for i in range(half):
            angle = position * theta ** (-2 * i / x.shape[-1])
            first, second = x[b, s, :, i], x[b, s, :, i + half]
            out[b, s, :, i] = first * np.cos(angle) - second * np.sin(angle)
            out[b, s, :, i + half] = first * np.sin(angle) + second * np.cos(angle)
    return out


def _attend(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    segments: np.ndarray | None,
    scale: float | None,
) -> np.ndarray:
    out = np.empty_like(query)
    batch, seq, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // key.shape[2])
            for i in range(seq):
                seen = [
                    j for j in range(i + 1) if segments is None or segments[b, i] == segments[b, j]
                ]
                weights = np.exp(scale * np.asarray([query[b, i, h] @ key[b, j, kv] for j in seen]))
                out[b, i, h] = weights @ value[b, seen, kv] / weights.sum()
    return out


def _swiglu(x: np.ndarray, module: nn.SwiGLU) -> np.ndarray:
    gate, up = x @ _f64(module.gate.kernel), x @ _f64(module.up.kernel)
    return (gate / (1 + np.exp(-gate)) * up) @ _f64(module.down.kernel)


def _self_attention(
    x: np.ndarray, module: nn.GroupedQueryAttention, segments: np.ndarray | None
) -> np.ndarray:
    query, key, value = (
        np.einsum("bse,ehd->bshd", x, _f64(kernel))
        for kernel in (module.query_kernel, module.key_kernel, module.value_kernel)
    )
    assert module.rotary is not None
    query, key = (_rotate(y, _POSITIONS, module.rotary.theta) for y in (query, key))
    attended = _attend(query, key, value, segments, module.scale)
    return np.einsum("bshd,hde->bse", attended, _f64(module.out_kernel))


def _transformer_layer(x: np.ndarray, layer: Any) -> np.ndarray:
    normed = _rms_norm(x, layer.attention_norm.scale, 0.1)
    x = x + _self_attention(normed, layer.attention, _SEGMENTS)
    return x + _swiglu(_rms_norm(x, layer.feed_forward_norm.scale, 0.1), layer.feed_forward)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_rms_norm(rng: np.random.Generator, shape: tuple[int, ...]):
    module = build(lambda key: nn.RMSNorm(5, epsilon=0.3))
    x = rng.normal(size=shape)
    assert_close(module(_f32(x)), _rms_norm(x, module.scale, 0.3), 1e-6)
    np.testing.assert_array_equal(nn.RMSNorm(5).scale, np.ones(5))
    assert nn.RMSNorm(5).epsilon == 1e-5


def test_rms_norm_of_bfloat16_is_computed_in_float32(rng: np.random.Generator):
    module = build(lambda key: nn.RMSNorm(512))
    x = _f32(100 * rng.normal(size=(3, 512)), jnp.bfloat16)
    assert module(x).dtype == jnp.bfloat16
    expected = _rms_norm(_f64(x), module.scale, 1e-5)
    # No error but that of rounding the result: 2^-9.
    np.testing.assert_allclose(_f64(module(x)), expected, rtol=2**-8)
    assert module(jnp.zeros(512)).tolist() == [0.0] * 512


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_linear(rng: np.random.Generator, shape: tuple[int, ...]):
    module = build(lambda key: nn.Linear(5, 4, key=key))
    x = rng.normal(size=shape)
    assert_close(module(_f32(x)), x @ _f64(module.kernel), 1e-6)
    low = module(_f32(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert_close(low.astype(jnp.float32), x @ _f64(module.kernel), 2e-2)


def test_initial_scales(getkey: Callable[[], PRNGKeyArray]):
    linear = quick_jit(partial(nn.Linear, 256, 128, scale=3.0))(key=getkey())
    assert linear.kernel.dtype == jnp.float32
    assert abs(float(linear.kernel.std()) * 16 / 3 - 1) < 0.02
    make_attention = partial(nn.GroupedQueryAttention, 64, 8, 2, 16, out_scale=0.5)
    attention = quick_jit(make_attention)(key=getkey())
    assert abs(float(attention.query_kernel.std()) * 8 - 1) < 0.05
    assert abs(float(attention.value_kernel.std()) * 8 - 1) < 0.05
    assert abs(float(attention.out_kernel.std()) * 128**0.5 / 0.5 - 1) < 0.05
    assert attention.key_kernel.shape == (64, 2, 16)


def test_rotary_embedding(rng: np.random.Generator):
    x = rng.normal(size=(_BATCH, _SEQ, _HEADS, _HEAD_DIM))
    rotated = nn.rotary_embedding(_f32(x), jnp.asarray(_POSITIONS), theta=50.0)
    assert_close(rotated, _rotate(x, _POSITIONS, 50.0), 2e-6)
    default = nn.rotary_embedding(_f32(x), jnp.asarray(_POSITIONS))
    assert_close(default, _rotate(x, _POSITIONS, 10_000.0), 2e-6)
    np.testing.assert_array_equal(default[0, [0, 4]], _f32(x)[0, [0, 4]])
    low = nn.rotary_embedding(_f32(x, jnp.bfloat16), jnp.asarray(_POSITIONS))
    assert low.dtype == jnp.bfloat16
    assert_close(low.astype(jnp.float32), default, 1e-2)


def test_rotary_products_depend_on_distance_alone(rng: np.random.Generator):
    query, key = (_f32(rng.normal(size=(1, _SEQ, 1, _HEAD_DIM))) for _ in range(2))
    positions = jnp.arange(_SEQ)[None]

    def products(offset: int) -> Array:
        rotated = [nn.rotary_embedding(x, positions + offset) for x in (query, key)]
        return jnp.einsum("bqhd,bkhd->bqk", *rotated)

    assert_close(products(100), products(0))


def test_rotary_embedding_of_odd_size():
    with pytest.raises(ValueError, match=r"`head_dim` must be even.*got 5"):
        nn.rotary_embedding(jnp.zeros((1, 2, 1, 5)), jnp.zeros((1, 2), int))


@pytest.mark.parametrize("segments", [None, _SEGMENTS], ids=["one-document", "packed"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_causal_attention(
    rng: np.random.Generator, segments: np.ndarray | None, kv_heads: int, scale: float | None
):
    query = rng.normal(size=(_BATCH, _SEQ, 4, _HEAD_DIM))
    key, value = (rng.normal(size=(_BATCH, _SEQ, kv_heads, _HEAD_DIM)) for _ in range(2))
    rows: dict[str, Any] = {
        "position_ids": jnp.asarray(_POSITIONS),
        "segment_ids": None if segments is None else jnp.asarray(segments),
        "scale": scale,
    }
    actual = nn.causal_attention(*map(_f32, (query, key, value)), **rows)
    expected = _attend(query, key, value, segments, scale)
    assert_close(actual, expected, 3e-6)
    low = nn.causal_attention(*(_f32(x, jnp.bfloat16) for x in (query, key, value)), **rows)
    assert low.dtype == jnp.bfloat16
    assert_close(low.astype(jnp.float32), expected, 3e-2)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("segments", [None, _SEGMENTS], ids=["one-document", "packed"])
def test_grouped_query_attention(
    rng: np.random.Generator, scale: float | None, segments: np.ndarray | None
):
    def make(key: PRNGKeyArray) -> nn.GroupedQueryAttention:
        return nn.GroupedQueryAttention(
            _EMBED, _HEADS, _KV_HEADS, _HEAD_DIM, rotary=nn.Rotary(50.0), scale=scale, key=key
        )

    module = build(make)
    x = rng.normal(size=(_BATCH, _SEQ, _EMBED))
    actual = module(
        _f32(x),
        position_ids=jnp.asarray(_POSITIONS),
        segment_ids=None if segments is None else jnp.asarray(segments),
    )
    assert_close(actual, _self_attention(x, module, segments))


@pytest.mark.parametrize(
    ("num_kv_heads", "message"), [(0, "must be at least 1; got 0"), (3, "must divide.*got 3 and 4")]
)
def test_grouped_query_attention_error(
    getkey: Callable[[], PRNGKeyArray], num_kv_heads: int, message: str
):
    with pytest.raises(ValueError, match=f"`num_kv_heads` {message}"):
        nn.GroupedQueryAttention(_EMBED, 4, num_kv_heads, _HEAD_DIM, key=getkey())


def test_swiglu(rng: np.random.Generator):
    module = build(lambda key: nn.SwiGLU(_EMBED, 10, key=key))
    x = rng.normal(size=(_BATCH, _SEQ, _EMBED))
    assert_close(module(_f32(x)), _swiglu(x, module))
    assert module(_f32(x, jnp.bfloat16)).dtype == jnp.bfloat16


def _decoder(**changes: Any) -> nn.TransformerDecoder:
    return build(partial(nn.TransformerDecoder, dataclasses.replace(_CONFIG, **changes)))


def _arguments(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "input_ids": jnp.asarray(rng.integers(0, 11, (_BATCH, _SEQ))),
        "position_ids": jnp.asarray(_POSITIONS),
        "segment_ids": jnp.asarray(_SEGMENTS),
    }


@quick_jit
def _call(decoder: nn.TransformerDecoder, arguments: dict[str, Any]) -> Array:
    return split_auxiliary(decoder(**arguments))[0]


def test_decoder_is_a_loop_over_layers(rng: np.random.Generator):
    """The scan over stacked layers, against NumPy layers one after another."""
    decoder, arguments = _decoder(), _arguments(rng)
    hidden = _f64(decoder.embedding)[np.asarray(arguments["input_ids"])]
    assert_close(decoder.embed(arguments["input_ids"], arguments["position_ids"]), hidden, 1e-7)
    for index in range(3):
        layer = jax.tree.map(lambda x, i=index: x[i] if eqx.is_array(x) else x, decoder.layers)
        hidden = _transformer_layer(hidden, layer)
    actual = _call(decoder, arguments)
    assert_close(actual, hidden)
    assert_close(decoder.final_norm(actual), _rms_norm(hidden, decoder.norm.scale, 0.1))


def test_layers_start_different_and_scaled(getkey: Callable[[], PRNGKeyArray]):
    decoder = quick_jit(partial(nn.TransformerDecoder, _CONFIG))(key=getkey())
    for leaf in jax.tree.leaves(eqx.filter(decoder.layers, eqx.is_array)):
        assert leaf.shape[0] == 3
        assert leaf.ndim == 2 or bool((leaf[0] != leaf[1]).all())
    down = decoder.layers.feed_forward.down.kernel
    assert abs(float(down.std()) * (10 * 6) ** 0.5 - 1) < 0.15
    assert decoder.embedding.shape == (11, _EMBED)
    assert decoder.head is None


def test_output_head():
    tied, untied = _decoder(), _decoder(tie_embeddings=False)
    assert tied.head is None
    assert tied.output_head() is tied.embedding
    assert untied.head is not None
    assert untied.output_head() is untied.head
    assert untied.head.shape == (11, _EMBED)
    assert bool((untied.head != untied.embedding).any())


def test_bfloat16(rng: np.random.Generator):
    """bfloat16 compute: float32 parameters and gradients, and close values."""
    decoder, low, arguments = _decoder(), _decoder(dtype="bfloat16"), _arguments(rng)
    parameters = jax.tree.leaves(eqx.filter(low, eqx.is_array))
    assert {x.dtype for x in parameters} == {jnp.dtype("float32")}
    embedded = low.embed(arguments["input_ids"], arguments["position_ids"])
    assert embedded.dtype == jnp.bfloat16
    hidden = _call(low, arguments)
    assert hidden.dtype == low.final_norm(hidden).dtype == jnp.bfloat16
    assert_close(hidden.astype(jnp.float32), _call(decoder, arguments), 3e-2)


def _sum(decoder: nn.TransformerDecoder, arguments: dict[str, Any]) -> Array:
    return jnp.sum(jnp.sin(split_auxiliary(decoder(**arguments))[0].astype(jnp.float32)))


_summed = quick_jit(eqx.filter_value_and_grad(_sum))


def test_checkpoint_policy_changes_no_value(rng: np.random.Generator):
    arguments = _arguments(rng)
    value, gradients = _summed(_decoder(), arguments)
    value_again, gradients_again = _summed(_decoder(checkpoint_policy=None), arguments)
    assert_close(value_again, value)
    leaves = jax.tree.leaves(gradients)
    for x, y in zip(jax.tree.leaves(gradients_again), leaves, strict=True):
        assert x.dtype == jnp.float32
        assert_close(x, y)
    assert sum(bool(x.any()) for x in leaves) == len(leaves) - 1  # The final norm is not used.
    recomputed = [
        "remat" in str(eqx.filter_make_jaxpr(_sum)(decoder, arguments)[0])
        for decoder in (_decoder(), _decoder(checkpoint_policy=None))
    ]
    assert recomputed == [False, True]


def test_dropout(rng: np.random.Generator):
    arguments = _arguments(rng)
    plain, dropping = _decoder(), _decoder(dropout_rate=0.5)
    expected = _call(plain, arguments)
    one, again, other = (
        _call(dropping, {**arguments, "key": jax.random.key(s)}) for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-2
    assert float(jnp.abs(one - expected).max()) > 1e-2
    np.testing.assert_array_equal(_call(dropping, {**arguments, "inference": True}), expected)
    with pytest.raises(RuntimeError, match="requires a key"):
        _call(dropping, arguments)


def test_injected_attention(rng: np.random.Generator):
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def nothing(*args: Any, **kwargs: Any) -> Array:
        calls.append((args, kwargs))
        return jnp.zeros_like(args[0])

    decoder, arguments = _decoder(attention=nothing, num_layers=1), _arguments(rng)
    actual = decoder(**arguments)
    [(args, kwargs)] = calls
    query_shape = (_BATCH, _SEQ, _HEADS, _HEAD_DIM)
    kv_shape = (_BATCH, _SEQ, _KV_HEADS, _HEAD_DIM)
    assert [x.shape for x in args] == [query_shape, kv_shape, kv_shape]
    assert kwargs.keys() == {"position_ids", "segment_ids", "scale"}
    assert kwargs["position_ids"] is arguments["position_ids"]
    assert kwargs["segment_ids"] is arguments["segment_ids"]
    assert kwargs["scale"] is None
    # Attention that adds nothing leaves the feed-forward network.
    hidden = _f64(decoder.embedding)[np.asarray(arguments["input_ids"])]
    layer = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, decoder.layers)
    normed = _rms_norm(hidden, layer.feed_forward_norm.scale, 0.1)
    assert_close(actual, hidden + _swiglu(normed, layer.feed_forward))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` must be at least 1; got 0"),
        ({"embed_size": -1}, "`embed_size` must be at least 1; got -1"),
        ({"num_layers": 0}, "`num_layers` must be at least 1; got 0"),
        ({"num_heads": 0}, "`num_heads` must be at least 1; got 0"),
        ({"num_kv_heads": 0}, "`num_kv_heads` must be at least 1; got 0"),
        ({"head_dim": 0}, "`head_dim` must be at least 1; got 0"),
        ({"mlp_size": -2}, "`mlp_size` must be at least 1; got -2"),
        ({"num_heads": 5, "head_dim": None}, "`num_heads` must divide `embed_size`.*got 5 and 12"),
        ({"head_dim": 3}, "`head_dim` must be even for rotary embeddings; got 3"),
        ({"head_dim": None}, "`head_dim` must be even for rotary embeddings; got 3"),
        ({"num_kv_heads": 3}, "`num_kv_heads` must divide `num_heads`; got 3 and 4"),
        ({"dropout_rate": 1.0}, r"`dropout_rate` must be at least 0 and below 1; got 1"),
        ({"dropout_rate": -0.1}, r"`dropout_rate` must be at least 0 and below 1; got -0.1"),
        ({"dtype": "float16"}, "`dtype` must be 'float32' or 'bfloat16'; got 'float16'"),
    ],
)
def test_transformer_config_errors(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_CONFIG, **changes)


def test_transformer_config_defaults():
    config = nn.TransformerConfig(vocab_size=11, embed_size=96, num_layers=1, num_heads=4)
    assert config.resolved_num_kv_heads == 4
    assert config.resolved_head_dim == 24
    assert config.resolved_mlp_size == 256
    layer = build(partial(nn.TransformerDecoderLayer, config))
    assert layer.attention.key_kernel.shape == (96, 4, 24)
    assert layer.feed_forward.up.kernel.shape == (96, 256)
    assert _CONFIG.resolved_head_dim == _HEAD_DIM
    assert _CONFIG.resolved_num_kv_heads == _KV_HEADS
    assert _CONFIG.resolved_mlp_size == 10


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(2, 2, 6), (2, 1, 6), (1, 2, 6)])
def test_rows_may_be_split_over_devices(
    axis_type: AxisType, shape: tuple[int, ...], getkey: Callable[[], Array]
) -> None:
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(axis_type, axis_type))
    spec = P(*(name if n == 2 else None for name, n in zip(mesh.axis_names, shape, strict=False)))
    x, linear = jax.random.normal(getkey(), shape), nn.Linear(6, 4, key=getkey())
    head = LinearHead(jax.random.normal(getkey(), (5, 6)))
    expected = np.asarray(x, np.float64) @ np.asarray(linear.kernel, np.float64)
    expected_logits = np.asarray(x, np.float64) @ np.asarray(head.weight, np.float64).T
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        assert_close(eqx.filter_jit(linear)(split), expected, 1e-5)
        assert_close(eqx.filter_jit(head)(split), expected_logits, 1e-5)
