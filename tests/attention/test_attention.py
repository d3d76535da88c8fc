"""Attention by tiles and its gradient, against the formula in float64."""

import importlib
import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from hlo import compile_for, sizes
from hypothesis import given, strategies as st
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

import equinox_mtp as emtp
from equinox_mtp import attention, nn, sharding
from equinox_mtp.attention._tiles import (
    FAR,
    Places,
    Softmax,
    split_places,
    visible_tiles,
    visits,
)


class Case(NamedTuple):
    """One call; the defaults are the plainest."""

    seq: int = 300
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    segments: bool = False
    by_position: bool = False
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None


CASES = {
    "plain": Case(),
    "one-tile": Case(seq=20, heads=3, kv_heads=1),
    "whole-tiles": Case(seq=256, segments=True),
    "one-position": Case(seq=1),
    "grouped": Case(heads=4, kv_heads=2, scale=0.9),
    "window": Case(window=40, kv_heads=1),
    "window-of-a-tile": Case(seq=384, window=128, segments=True),
    "soft-cap": Case(soft_cap=1.5, scale=2.0),
    "values": Case(value_dim=5, head_dim=12, segments=True),
    "positions": Case(by_position=True, segments=True, heads=4, kv_heads=2),
    "all": Case(
        heads=4,
        kv_heads=2,
        value_dim=4,
        segments=True,
        by_position=True,
        window=50,
        soft_cap=2.0,
        scale=0.7,
    ),
}
BATCH = 2


def make_arrays(case: Case) -> dict[str, np.ndarray]:
    """Queries, keys, values and a cotangent in float64, and where positions stand."""
    rng = np.random.default_rng(0)

    def normal(heads: int, features: int) -> np.ndarray:
        return rng.normal(size=(BATCH, case.seq, heads, features))

    # Documents of any length, the second row's not in the order of their numbers, and padding.
    starts = rng.random((BATCH, case.seq)) < 0.02
    segment_ids = 1 + np.cumsum(starts, axis=1)
    segment_ids[1] = np.where(segment_ids[1] % 2, 40 - segment_ids[1], segment_ids[1])
    segment_ids[0, case.seq - case.seq // 10 :] = 0
    order = np.stack([rng.permutation(case.seq) for _ in range(BATCH)])
    rows = np.arange(BATCH)[:, None]
    return {
        "query": normal(case.heads, case.head_dim),
        "key": normal(case.kv_heads, case.head_dim),
        "value": normal(case.kv_heads, case.value_dim),
        "cotangent": normal(case.heads, case.value_dim),
        # By position a row stands in any order.
        "position_ids": order if case.by_position else np.tile(np.arange(case.seq), (BATCH, 1)),
        "segment_ids": segment_ids[rows, order] if case.by_position else segment_ids,
    }


def oracle(case: Case, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The attended values and the gradients of query, key and value, head by head."""
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    positions, segment_ids = arrays["position_ids"], arrays["segment_ids"]
    scale = case.scale or 1 / math.sqrt(case.head_dim)
    outputs = [np.zeros_like(arrays["cotangent"])]
    outputs += [np.zeros_like(x) for x in (query, key, value)]
    for b in range(BATCH):
        distance = positions[b][:, None] - positions[b][None]
        mask = (distance >= 0) & (distance < (case.window or case.seq))
        if case.segments:
            mask &= segment_ids[b][:, None] == segment_ids[b][None]
        for h in range(case.heads):
            k = h // (case.heads // case.kv_heads)
            q_, k_, v_, g_ = query[b, :, h], key[b, :, k], value[b, :, k], arrays["cotangent"]
            logits = scale * q_ @ k_.T
            slope = np.full_like(logits, scale)
            if case.soft_cap is not None:
                tanh = np.tanh(logits / case.soft_cap)
                logits, slope = case.soft_cap * tanh, scale * (1 - tanh**2)
            logits = np.where(mask, logits, -np.inf)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            of_weights = g_[b, :, h] @ v_.T
            offset = np.sum(weights * of_weights, axis=1, keepdims=True)
            of_logits = weights * (of_weights - offset) * slope
            outputs[0][b, :, h] = weights @ v_
            outputs[1][b, :, h] = of_logits @ k_
            outputs[2][b, :, k] += of_logits.T @ q_
            outputs[3][b, :, k] += weights.T @ g_[b, :, h]
    return tuple(outputs)


def call(case: Case, implementation: Any = "tiled") -> Any:
    """A function of query, key and value, and of where positions stand."""
    function: Any = nn.causal_attention_by_position if case.by_position else nn.causal_attention

    def run(query: Array, key: Array, value: Array, places: tuple[Array, Array]) -> Array:
        position_ids, segment_ids = places
        return function(
            query,
            key,
            value,
            position_ids=position_ids,
            segment_ids=segment_ids if case.segments else None,
            scale=case.scale,
            window=case.window,
            soft_cap=case.soft_cap,
            implementation=implementation,
        )

    return run


def with_gradients(function: Any) -> Any:
    """The attended values, and gradients for a cotangent."""

    def run(arrays: tuple[Array, ...], places: Any, cotangent: Array) -> tuple[Array, ...]:
        out, pull_back = jax.vjp(lambda *arrays: function(*arrays, places), *arrays)
        return out, *pull_back(cotangent)

    return run


def as_arguments(arrays: dict[str, np.ndarray], dtype: Any = jnp.float32) -> tuple[Any, ...]:
    rows = tuple(jnp.asarray(arrays[name], dtype) for name in ("query", "key", "value"))
    places = tuple(jnp.asarray(arrays[name], jnp.int32) for name in ("position_ids", "segment_ids"))
    return rows, places, jnp.asarray(arrays["cotangent"], dtype)


@pytest.mark.parametrize("implementation", ["tiled", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, implementation: str) -> None:
    case = CASES[name]
    arrays = make_arrays(case)
    actual = jax.jit(with_gradients(call(case, implementation)))(*as_arguments(arrays))
    for one, other in zip(actual, oracle(case, arrays), strict=True):
        assert one.dtype == jnp.float32
        assert_close(one, other, 1e-5, 1e-5)


def test_bfloat16() -> None:
    case = CASES["grouped"]
    arrays = make_arrays(case)
    arguments = as_arguments(arrays, jnp.bfloat16)
    rounded = {**arrays, "cotangent": np.asarray(arguments[2], np.float64)}
    for name, array in zip(("query", "key", "value"), arguments[0], strict=True):
        rounded[name] = np.asarray(array, np.float64)
    actual = jax.jit(with_gradients(call(case)))(*arguments)
    for one, other in zip(actual, oracle(case, rounded), strict=True):
        assert one.dtype == jnp.bfloat16
        # Sums are float32: the error is that of rounding weights and results, to 2^-9.
        assert np.abs(np.asarray(one, np.float64) - other).max() < 2**-6 * np.abs(other).max()


def test_float64() -> None:
    case = CASES["all"]
    arrays = make_arrays(case)
    with jax.enable_x64(True):
        actual = jax.jit(with_gradients(call(case)))(*as_arguments(arrays, jnp.float64))
        for one, other in zip(actual, oracle(case, arrays), strict=True):
            assert one.dtype == jnp.float64
            assert_close(one, other, 1e-12, 1e-12)


@pytest.mark.parametrize("seq", [100, 200])
def test_the_dtype_is_that_of_the_query(seq: int) -> None:
    low, high = jnp.ones((1, seq, 2, 8), jnp.bfloat16), jnp.ones((1, seq, 2, 8))
    ids = jnp.arange(seq)[None]
    for query, other in ((low, high), (high, low)):
        out = nn.causal_attention(query, other, other, position_ids=ids, scale=1, soft_cap=50)
        assert out.dtype == query.dtype


def test_eager_calls_compile_once(caplog: pytest.LogCaptureFixture) -> None:
    rows, places, _ = as_arguments(make_arrays(Case(seq=136)))
    function = with_gradients(call(Case()))
    function(rows, places, rows[0])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        function(rows, places, rows[0])
    assert not [record.message for record in caplog.records if "ompil" in record.message]


@pytest.mark.parametrize("shape", [(0, 300), (2, 0), (0, 0)])
def test_no_rows_and_no_positions(shape: tuple[int, int]) -> None:
    query, key = jnp.zeros((*shape, 4, 8)), jnp.zeros((*shape, 2, 8))
    ids = jnp.zeros(shape, jnp.int32)
    function = with_gradients(call(Case(segments=True), None))
    outputs = jax.jit(function)((query, key, key), (ids, ids), query)
    assert [x.shape for x in outputs] == [query.shape, query.shape, key.shape, key.shape]


def test_large_logits() -> None:
    """An online softmax overflows nowhere; a maximum may come in any tile."""
    case = Case(scale=60.0)
    arrays = make_arrays(case)
    actual = jax.jit(call(case))(*as_arguments(arrays)[0], as_arguments(arrays)[1])
    # float32 rounds logits of some hundreds by 1e-5: that much weights are wrong.
    assert_close(actual, oracle(case, arrays)[0], 1e-3, 1e-3)


def test_transformations() -> None:
    """Under `vmap`, `scan`, `checkpoint`, and with forward over reverse differentiation."""
    case = Case(seq=136, segments=True)
    rows, places, cotangent = as_arguments(make_arrays(case))
    tiled, dense = call(case, "tiled"), call(case, "dense")

    def transformed(function: Any) -> Any:
        def total(rows: tuple[Array, ...]) -> Array:
            return jnp.sum(jnp.sin(jax.checkpoint(function)(*rows, places)))

        mapped = jax.vmap(function, in_axes=(0, 0, 0, None))(
            *(jnp.stack([x, 2 * x]) for x in rows), places
        )
        _, scanned = jax.lax.scan(
            lambda x, _: (function(x, *rows[1:], places),) * 2, rows[0], None, length=2
        )
        hessian_product = jax.jvp(jax.grad(total), (rows,), ((cotangent,) * 3,))
        return mapped, scanned, hessian_product

    transformed = jax.jit(transformed, static_argnums=0)
    for one, other in zip(*(jax.tree.leaves(transformed(f)) for f in (tiled, dense)), strict=True):
        assert_close(one, other, 1e-4, 1e-4)


# What is computed, and what is kept


@given(st.data())
def test_no_pair_that_sees_is_left_out(data: st.DataObject) -> None:
    seq, size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    window = data.draw(st.none() | st.integers(1, 12))
    numbers = st.lists(st.integers(0, 3), min_size=seq, max_size=seq)
    segment_ids = np.asarray([data.draw(numbers) for _ in range(2)], np.int32)
    order = np.asarray([data.draw(st.permutations(range(seq))) for _ in range(2)], np.int32)
    places = Places(jnp.asarray(order), jnp.asarray(segment_ids))
    queries, keys = (split_places(places, size, fill=fill) for fill in (-FAR, FAR))
    visible = np.asarray(visible_tiles(Softmax(1.0, window, None), queries, keys))
    distance = order[:, :, None] - order[:, None]
    sees = (distance >= 0) & (distance < (window or seq))
    sees &= segment_ids[:, :, None] == segment_ids[:, None]
    pairs = np.zeros((2, *[size * len(visible)] * 2), bool)
    pairs[:, :seq, :seq] = sees
    expected = pairs.reshape(2, len(visible), size, len(visible), size).any(axis=(0, 2, 4))
    assert not np.any(expected & ~visible)
    lists = visits(jnp.asarray(visible))
    for row, tiles, count in zip(visible, lists.tiles, lists.num, strict=True):
        assert tiles[: int(count)].tolist() == np.flatnonzero(row).tolist()


def num_visits(order: np.ndarray, segment_ids: np.ndarray | None, window: int | None) -> int:
    places = Places(
        jnp.asarray(order)[None], None if segment_ids is None else jnp.asarray(segment_ids)[None]
    )
    queries, keys = (split_places(places, 16, fill=fill) for fill in (-FAR, FAR))
    return int(visible_tiles(Softmax(1.0, window, None), queries, keys).sum())


def test_masked_tiles_are_not_visited() -> None:
    order = np.arange(256)
    assert num_visits(order, None, None) == 16 * 17 // 2
    assert num_visits(order, 1 + order // 64, None) == 4 * (4 * 5 // 2)
    assert num_visits(order, None, 16) == 16 + 15
    assert num_visits(order, None, 17) == 16 + 15
    assert num_visits(order, None, 18) == 16 + 15 + 14
    # In the order that balances devices the work is the same.
    assert num_visits(sharding.zigzag_order(256, 4), None, None) == 16 * 17 // 2


def gradient_memory(seq: int) -> tuple[int, str]:
    shape = jax.ShapeDtypeStruct((1, seq, 2, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, seq), jnp.int32)
    function = with_gradients(call(Case(segments=True), None))
    compiled, program = compile_for(jax.jit(function), (shape, shape, shape), (ids, ids), shape)
    return compiled.memory_analysis().temp_size_in_bytes, program


def test_memory_is_linear_in_the_length() -> None:
    small, _ = gradient_memory(1024)
    large, program = gradient_memory(4096)
    assert large < 4.2 * small
    assert large < 4096 * 4096 * 4 / 4
    assert max(sizes(program)) <= 4096 * 2 * 16


# On several devices


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_ring(name: str, axis_type: str) -> None:
    case = CASES[name]._replace(seq=296)  # 74 positions on each of four devices
    arrays = make_arrays(case)
    mesh = sharding.make_mesh({"data": 2, "context": 4}, axis_type=jax.sharding.AxisType[axis_type])
    rows, places, cotangent = as_arguments(arrays)

    def put(x: Array) -> Array:
        return jax.device_put(x, jax.NamedSharding(mesh, P("data", "context")))

    arguments = jax.tree.map(put, (rows, places, cotangent))
    with jax.set_mesh(mesh), sharding.use_rules():
        compiled, program = compile_for(jax.jit(with_gradients(call(case, None))), *arguments)
        actual = compiled(*arguments)
    for one, other in zip(actual, oracle(case, arrays), strict=True):
        assert one.sharding.spec[:2] == ("data", "context")
        assert_close(one, other, 1e-5, 1e-5)
    assert "all-gather" not in program
    assert "all-to-all" not in program
    assert "collective-permute" in program


def test_ring_memory_is_linear_in_the_part_of_a_device() -> None:
    mesh = sharding.make_mesh({"context": 8})

    def memory(seq: int, heads: int = 2) -> int:
        where = jax.NamedSharding(mesh, P(None, "context"))
        shape = jax.ShapeDtypeStruct((1, seq, heads, 16), jnp.float32, sharding=where)
        ids = jax.ShapeDtypeStruct((1, seq), jnp.int32, sharding=where)
        function = with_gradients(call(Case(by_position=True), None))
        with jax.set_mesh(mesh), sharding.use_rules():
            compiled, program = compile_for(
                jax.jit(function), (shape, shape, shape), (ids, ids), shape
            )
        # Keys or values of a device are seq / 8 · 2 · 16 numbers, a tile of logits 2 · 128².
        assert max(sizes(program)) <= max(seq // 8 * heads * 16, heads * 128**2)
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8 * 1024) < 4.2 * memory(8 * 256)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_heads_on_several_devices(kv_heads: int) -> None:
    """Split where a device has the keys of its queries; whole on each device otherwise."""
    case = Case(heads=4, kv_heads=kv_heads, seq=136, segments=True)
    arrays = make_arrays(case)
    arguments = as_arguments(arrays)
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    with jax.set_mesh(mesh), sharding.use_rules():
        compiled, program = compile_for(jax.jit(with_gradients(call(case, None))), *arguments)
        actual = compiled(*arguments)
    for one, other in zip(actual, oracle(case, arrays), strict=True):
        assert_close(one, other, 1e-5, 1e-5)
    # In a device's loops: its row, and its heads.
    heads = 1 if kv_heads == 4 else 4
    assert 72 * heads * 72 in sizes(program)
    assert 2 * 72 * 4 * 72 not in sizes(program)


def test_without_rules_under_automatic_partitioning() -> None:
    case = Case(seq=136, segments=True)
    arrays = make_arrays(case)
    mesh = sharding.make_mesh({"data": 2, "context": 4})
    arguments = jax.tree.map(
        lambda x: jax.device_put(x, jax.NamedSharding(mesh, P("data", "context"))),
        as_arguments(arrays),
    )
    actual = jax.jit(with_gradients(call(case)))(*arguments)
    for one, other in zip(actual, oracle(case, arrays), strict=True):
        assert_close(one, other, 1e-5, 1e-5)


def test_within_a_shard_map() -> None:
    """Of the user's own, over rows; `check_vma` is on, as JAX has it."""
    case = Case(seq=136, segments=True)
    arrays = make_arrays(case)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    with jax.set_mesh(mesh), sharding.use_rules():
        mapped = jax.shard_map(with_gradients(call(case)), in_specs=P("data"), out_specs=P("data"))
        actual = jax.jit(mapped)(*as_arguments(arrays))
    for one, other in zip(actual, oracle(case, arrays), strict=True):
        assert_close(one, other, 1e-5, 1e-5)


def test_rows_that_do_not_divide() -> None:
    mesh = sharding.make_mesh({"data": 2, "context": 4})
    rows, places, _ = as_arguments(make_arrays(Case(seq=130)))
    with (
        jax.set_mesh(mesh),
        sharding.use_rules(),
        pytest.raises(
            ValueError,
            match="^`seq` must be a multiple of the 4 devices over which the mesh splits it, by "
            r"'context'; got 130\. Pad",
        ),
    ):
        call(Case())(*rows, places)


# Which implementation


PLAIN = attention.AttentionCall(seq=4096, head_dim=128, value_dim=128, dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "cpu", "cuda", "tpu"),
    [
        ({}, "tiled", "cudnn", "splash"),
        ({"seq": 64}, "dense", "cudnn", "dense"),
        ({"seq": 4100}, "tiled", "cudnn", "tiled"),
        ({"dtype": "float32"}, "tiled", "tiled", "splash"),
        ({"dtype": "float16"}, "tiled", "cudnn", "splash"),
        ({"head_dim": 192, "value_dim": 128}, "tiled", "tiled", "tiled"),
        ({"head_dim": 256, "value_dim": 256}, "tiled", "tiled", "splash"),
        ({"head_dim": 36, "value_dim": 36}, "tiled", "tiled", "splash"),
        ({"packed": True}, "tiled", "tiled", "splash"),
        ({"soft_cap": True}, "tiled", "tiled", "splash"),
        ({"in_order": False}, "tiled", "tiled", "tiled"),
        ({"split": True}, "tiled", "tiled", "tiled"),
        ({"split": True, "seq": 8}, "tiled", "tiled", "tiled"),
    ],
)
def test_choice(changes: dict[str, Any], cpu: str, cuda: str, tpu: str) -> None:
    for platform, expected in (("cpu", cpu), ("cuda", cuda), ("tpu", tpu)):
        chosen = attention.attention_implementation(PLAIN._replace(**changes), platform)
        assert chosen == expected, platform
    # A GPU without cuDNN.
    assert attention.attention_implementation(PLAIN, "rocm") == "tiled"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (91200, "cudnn"),
        (RuntimeError("cuDNN is not detected."), "tiled"),
        (NotImplementedError("Compute capability 10.3 requires cuDNN version >= 9.11."), "tiled"),
    ],
    ids=str,
)
def test_choice_without_cudnn(
    monkeypatch: pytest.MonkeyPatch, version: int | Exception, expected: str
) -> None:
    """On a CUDA machine tiles take the place of a library that is missing or too old."""
    from jax._src.cudnn import fused_attention_stablehlo

    def find() -> int:
        if isinstance(version, Exception):
            raise version
        return version

    choice = importlib.import_module("equinox_mtp.attention._choice")
    monkeypatch.setattr(choice, "_current_platform", lambda: "cuda")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", find)
    assert attention.attention_implementation(PLAIN) == expected
    # A platform that is named need not be here.
    assert attention.attention_implementation(PLAIN, "cuda") == "cudnn"


def lowered(platform: str, implementation: Any, **options: Any) -> str:
    """The text of attention and its gradient for a platform that need not be there."""
    shape = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    shared = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    ids = jnp.tile(jnp.arange(256), (2, 1))

    def total(query: Array, key: Array, value: Array) -> Array:
        function = partial(nn.causal_attention, implementation=implementation, **options)
        return jnp.sum(function(query, key, value, position_ids=ids).astype(jnp.float32))

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    traced = gradient.trace(shape, shared, shared)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window", [None, 64])
def test_lowered_for_cuda(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    from jax._src.cudnn import fused_attention_stablehlo

    # It asks for the version of a library that is not here.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    text = lowered("cuda", "cudnn", window=window)
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "256x256x" not in text


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"soft_cap": 30.0}], ids=str)
def test_lowered_for_tpus(options: dict[str, Any]) -> None:
    text = lowered("tpu", "splash", **options)
    # Forward, and the gradients of queries, and of keys and values.
    assert text.count("tpu_custom_call") == 3


def test_queries_are_scaled_in_float32_for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes no scale: its queries are rounded once, to their own dtype."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    monkeypatch.setattr(
        splash_attention,
        "make_splash_mha_single_device",
        lambda *_, **__: lambda query, key, value, segment_ids: query,
    )
    query = jax.random.normal(jax.random.key(0), (1, 128, 2, 48), jnp.bfloat16)
    ids = jnp.arange(128)[None]
    scaled = nn.causal_attention(query, query, query, position_ids=ids, implementation="splash")
    expected = (np.asarray(query, np.float32) / np.float32(math.sqrt(48))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(scaled), expected)


def test_lowered_by_tiles() -> None:
    assert "custom_call @" not in lowered("cuda", "tiled")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, r"`window` must be at least 1 and at most 2147483647; got 0"),
        ({"soft_cap": 0.0}, r"`soft_cap` must be above 0; got 0"),
        ({"soft_cap": math.inf}, r"`soft_cap` must be finite"),
        ({"scale": math.nan}, r"`scale` must be finite"),
        ({"scale": 0}, r"`scale` must be above 0; got 0"),
        ({"window": 2**31}, r"`window` must be at least 1 and at most 2147483647; got 2147483648"),
        ({"implementation": "cudnn", "soft_cap": 3.0}, "'cudnn' does not support a soft-cap"),
        ({"implementation": "cudnn"}, "'cudnn' does not support float32"),
        (
            {"implementation": "splash"},
            "'splash' does not support rows that are no multiple of 128",
        ),
    ],
    ids=str,
)
def test_calls_that_cannot_be(options: dict[str, Any], message: str) -> None:
    rows, (position_ids, _), _ = as_arguments(make_arrays(Case(seq=20)))
    with pytest.raises(ValueError, match=message):
        nn.causal_attention(*rows, position_ids=position_ids, **options)


def test_heads_that_do_not_divide() -> None:
    rows, (position_ids, _), _ = as_arguments(make_arrays(Case(seq=20, heads=3)))
    with pytest.raises(ValueError, match=r"divides that of `query`; got 2 and 3"):
        nn.causal_attention(*rows, position_ids=position_ids)


@pytest.mark.parametrize(("policy", "num_forward"), [({}, 1), ({"checkpoint_policy": None}, 2)])
def test_depths_keep_what_attention_gave(policy: dict[str, Any], num_forward: int) -> None:
    """By default the backward pass of a depth does not attend again."""
    config = nn.TransformerConfig(
        vocab_size=64,
        embed_size=16,
        num_layers=1,
        num_heads=2,
        attention=partial(nn.causal_attention, implementation="tiled"),
    )
    decoder = nn.TransformerDecoder(config, key=jax.random.key(0))
    block = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig(num_depths=2, **policy),
        partial(nn.TransformerDecoderLayer, config),
        embed_size=16,
        key=jax.random.key(1),
    )
    batch = emtp.make_batch(np.arange(17)[None] % 64)
    arrays, static = eqx.partition(block, eqx.is_array)

    def loss(arrays: Any) -> Array:
        block = eqx.combine(arrays, static)
        hidden_states = jnp.ones((1, 16, 16))
        output = block(decoder, hidden_states, batch.align(2).targets, predictions=False)
        return output.loss

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(arrays))
    # A loop over the tiles of the other side for each pass forward, and one for that backward.
    assert jaxpr.count("while[") == num_forward + 1


def test_a_model_of_long_rows_trains_as_with_the_formula() -> None:
    """The whole model, packed, with recomputation: the same loss and gradients."""

    def outcome(implementation: Any) -> Any:
        config = nn.TransformerConfig(
            vocab_size=64,
            embed_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            attention=partial(nn.causal_attention, implementation=implementation),
        )
        decoder = nn.TransformerDecoder(config, key=jax.random.key(0))
        block = emtp.MultiTokenPredictionBlock(
            emtp.MTPConfig(num_depths=2),
            partial(nn.TransformerDecoderLayer, config),
            embed_size=16,
            key=jax.random.key(1),
        )
        model = emtp.MTPModel(decoder, block)
        tokens = np.random.default_rng(0).integers(64, size=(1, 161))
        batch = emtp.make_batch(tokens, segment_ids=1 + np.arange(161)[None] // 70)

        def loss(model: emtp.MTPModel) -> Array:
            output = model(batch)
            return output.main.mean + emtp.calculate_mtp_loss(output.mtp.losses)

        return eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)

    tiled, dense = (jax.tree.leaves(outcome(name)) for name in ("tiled", "dense"))
    for one, other in zip(tiled, dense, strict=True):
        if eqx.is_array(one):
            assert_close(one, other, 1e-4, 1e-6)
