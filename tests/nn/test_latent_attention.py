"""Multi-head latent attention against a loop over positions and heads in float64."""

import functools
import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from helpers import finite_differences
from jax.sharding import AxisType, PartitionSpec as P
from jaxtyping import Array

import equinox_mtp as emtp
from equinox_mtp import nn, sharding

BATCH, SEQ, EMBED, HEADS = 2, 9, 16, 4
RANK, NOPE, ROPE, VALUE = 8, 6, 4, 10
POSITIONS = np.asarray([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 0, 1, 2, 3]])
SEGMENTS = np.asarray([[1] * 9, [1] * 5 + [2] * 4])
ROWS = {"position_ids": jnp.asarray(POSITIONS), "segment_ids": jnp.asarray(SEGMENTS)}
IN_ORDER = jnp.tile(jnp.arange(SEQ), (BATCH, 1))
YARN = nn.YarnScaling(4.0, original_length=8, mscale=0.8, mscale_all_dim=0.5)
CASES: dict[str, dict[str, Any]] = {
    "compressed-queries": {"q_lora_rank": 12},
    "whole-queries": {"q_lora_rank": None},
    "half-split": {"rotary": nn.Rotary(50.0)},
    "yarn": {"rotary": nn.Rotary(50.0, interleaved=True, scaling=YARN)},
    "one-value": {"v_head_dim": 1},
}


def make(**options: Any) -> nn.MultiHeadLatentAttention:
    # `build` moves all parameters away from their initial values.
    sizes = {
        "q_lora_rank": 12,
        "kv_lora_rank": RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "norm_epsilon": 0.1,
    }
    return build(
        lambda key: nn.MultiHeadLatentAttention(EMBED, HEADS, **{**sizes, **options}, key=key)
    )


def inputs(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(BATCH, SEQ, EMBED))


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def norm(x: np.ndarray, module: Any) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + module.epsilon) * f64(module.scale)


@functools.cache
def frequencies(rotary: nn.Rotary, size: int) -> list[float]:
    return rotary.frequencies(size).tolist()


def rotated(x: np.ndarray, position: int, rotary: nn.Rotary) -> np.ndarray:
    out, half = x.copy(), len(x) // 2
    scaling: Any = rotary.scaling
    amplitude = 1.0
    if scaling is not None:
        amplitude = (0.1 * scaling.mscale * math.log(scaling.factor) + 1) / (
            0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1
        )
    for i, frequency in enumerate(frequencies(rotary, len(x))):
        one, two = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + half)
        sin, cos = (amplitude * f(position * frequency) for f in (math.sin, math.cos))
        out[one], out[two] = x[one] * cos - x[two] * sin, x[one] * sin + x[two] * cos
    return out


def oracle(x: np.ndarray, module: Any, *, packed: bool) -> np.ndarray:
    """The paper's equations, one position and one head at a time."""
    out = np.zeros_like(x)
    num_values = module.out_kernel.shape[1]
    scaling: Any = module.rotary.scaling
    scale = 1 / math.sqrt(NOPE + ROPE)
    if scaling is not None:
        scale *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2
    places = POSITIONS if packed else np.asarray(IN_ORDER)
    for b, i in np.ndindex(BATCH, SEQ):
        latent, kernel = x[b, i], module.query_kernel
        if module.query_down is not None:
            latent = norm(latent @ f64(module.query_down.kernel), module.query_norm)
            kernel = module.query_up_kernel
        for h in range(HEADS):
            query = latent @ f64(kernel)[:, h]
            query[NOPE:] = rotated(query[NOPE:], int(places[b, i]), module.rotary)
            logits, values = [], []
            for j in range(i + 1):
                if packed and SEGMENTS[b, i] != SEGMENTS[b, j]:
                    continue
                down = x[b, j] @ f64(module.latent_down.kernel)
                up = norm(down[:RANK], module.latent_norm) @ f64(module.up_kernel)[:, h]
                shared = rotated(down[RANK:], int(places[b, j]), module.rotary)
                logits.append(scale * (query[:NOPE] @ up[:NOPE] + query[NOPE:] @ shared))
                values.append(up[NOPE:])
            assert len(values[0]) == num_values
            weights = np.exp(np.asarray(logits) - max(logits))
            attended = weights @ np.asarray(values) / weights.sum()
            out[b, i] += attended @ f64(module.out_kernel)[h]
    return out


def f32(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)


step = quick_jit(lambda module, x, cache, ids: module.decode(x, cache, position_ids=ids))


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_in_parallel(name: str, by_position: bool) -> None:
    function = nn.causal_attention_by_position if by_position else nn.causal_attention
    module, x = make(**CASES[name], attention=function), inputs()
    actual = quick_jit(lambda module, x: module(x, **ROWS))(module, f32(x))
    assert_close(actual, oracle(x, module, packed=True), 2e-5)
    # Rows that are packed do not see each other, to the last bit.
    other = x.copy()
    other[1, :5] = 7.0
    again = module(f32(other), **ROWS)
    np.testing.assert_array_equal(again[1, 5:], module(f32(x), **ROWS)[1, 5:])


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_in_cached_steps(name: str, laid_out: bool) -> None:
    """Three positions, two of which are thrown away, then three others, one, and the rest."""
    module, x = make(**CASES[name]), inputs()
    expected = oracle(x, module, packed=False)
    module = module.for_decoding(jnp.float32) if laid_out else module
    cache, outputs = module.init_cache(BATCH, SEQ + 2, jnp.float32), []
    wrong = f32(x).at[:, 1:].set(5.0)
    _, cache = step(module, wrong[:, :3], cache, IN_ORDER[:, :3])
    for start, stop in ((1, 4), (4, 5), (5, SEQ)):
        out, cache = step(module, f32(x)[:, start:stop], cache, IN_ORDER[:, start:stop])
        outputs.append(out)
    assert_close(jnp.concatenate(outputs, axis=1), expected[:, 1:], 2e-5)


def test_rows_at_different_positions() -> None:
    """And before a row's first: such positions are not written, and change nothing."""
    module, x = make(), inputs()
    expected = oracle(x, module, packed=False)
    cache, starts = module.init_cache(BATCH, SEQ, jnp.float32), np.asarray([0, -2])
    found = np.full_like(x, np.nan)
    while starts.min() < SEQ:
        ids = starts[:, None] + np.arange(3)
        part = np.stack([x[row, np.clip(ids[row], 0, SEQ - 1)] for row in range(BATCH)])
        out, cache = step(module, f32(part), cache, jnp.asarray(ids))
        assert np.isfinite(out).all()
        for row, column in np.ndindex(ids.shape):
            if 0 <= ids[row, column] < SEQ:
                found[row, ids[row, column]] = out[row, column]
        starts += 3
    assert_close(found, expected, 2e-5)


def test_prefill_is_the_first_cached_step() -> None:
    module, x = make(**CASES["yarn"]), f32(inputs())
    empty = module.init_cache(BATCH, SEQ + 2, jnp.float32)
    for laid_out in (module, module.for_decoding(jnp.float32)):
        prefilled = quick_jit(lambda module, x: module.prefill(x, empty, position_ids=IN_ORDER))(
            laid_out, x
        )
        decoded = step(module, x, empty, IN_ORDER)
        for one, other in zip(*map(jax.tree.leaves, (prefilled, decoded)), strict=True):
            assert_close(one, other, 2e-5)
    # What a row has beyond its cache is dropped; no positions are no error.
    short = module.init_cache(BATCH, SEQ - 2, jnp.float32)
    for run in (module.prefill, module.decode):
        _, cache = run(x, short, position_ids=IN_ORDER)
        assert_close(cache.latent, decoded[1].latent[:, : SEQ - 2], 2e-5)
        out, after = run(x[:, :0], cache, position_ids=IN_ORDER[:, :0])
        assert out.shape == (BATCH, 0, EMBED)
        assert eqx.tree_equal(after, cache)


def test_the_cache_holds_latents_and_shared_keys_alone() -> None:
    module, x = make(), inputs()
    cache = module.init_cache(BATCH, 50, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == BATCH * 50 * (RANK + ROPE)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    _, cache = module.prefill(
        f32(x), module.init_cache(BATCH, 50, jnp.float32), position_ids=IN_ORDER
    )
    down = x[1, 5] @ f64(module.latent_down.kernel)
    assert_close(cache.latent[1, 5], norm(down[:RANK], module.latent_norm), 1e-5)
    assert_close(cache.rotary_key[1, 5], rotated(down[RANK:], 5, module.rotary), 1e-5)


def test_a_step_changes_the_cache_in_place() -> None:
    module = make().for_decoding(jnp.float32)
    cache = module.init_cache(BATCH, 4096, jnp.float32)
    one, ids = jnp.zeros((BATCH, 1, EMBED)), jnp.asarray([[7], [9]])

    def run(cache: Any, x: Array) -> Any:
        return module.decode(x, cache, position_ids=ids)

    memory: Any = jax.jit(run, donate_argnums=0).lower(cache, one).compile().memory_analysis()
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= num_bytes
    # Logits of all heads are made, and no copy of the latents.
    logits = BATCH * HEADS * 4096 * 4
    assert memory.temp_size_in_bytes < 3 * logits + cache.latent.nbytes / 2


def test_decoding_computes_no_keys_and_values_of_the_cache() -> None:
    module, length = make().for_decoding(jnp.float32), 512
    cache = module.init_cache(BATCH, length, jnp.float32)
    one, ids = jnp.zeros((BATCH, 1, EMBED)), IN_ORDER[:, :1]
    made = str(jax.make_jaxpr(lambda x: module.decode(x, cache, position_ids=ids))(one))
    shapes = re.findall(r"f32\[([\d,]+)\]", made)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    # The cache itself; not so much as a number for each feature of a head and position.
    assert largest == BATCH * length * RANK < BATCH * length * HEADS * min(NOPE, VALUE)


@pytest.mark.parametrize("name", ["compressed-queries", "whole-queries", "yarn"])
def test_gradients(name: str) -> None:
    """Of the input by finite differences of the loop; of parameters in one direction each."""
    module, x = make(**CASES[name]), inputs()
    weights = np.random.default_rng(1).normal(size=x.shape)

    def total(module: Any, x: Array) -> Array:
        return jnp.sum(f32(weights) * module(x, **ROWS))

    def looped(module: Any, x: np.ndarray) -> float:
        return float(np.sum(weights * oracle(x, module, packed=True)))

    of_module, of_x = quick_jit(
        lambda module, x: eqx.filter_grad(lambda both: total(*both))((module, x))
    )(module, f32(x))
    row = finite_differences(
        lambda part: looped(module, np.concatenate([part, x[:, 1:]], 1)), x[:, :1]
    )
    assert_close(of_x[:, :1], row, 1e-4)
    rng, h = np.random.default_rng(2), 1e-4
    leaves, tree = jax.tree.flatten(module)
    for index, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(of_module), strict=True)):
        direction = rng.normal(size=leaf.shape)
        ends = []
        for sign in (1, -1):
            moved = [f64(x) for x in leaves]
            moved[index] = moved[index] + sign * h * direction
            ends.append(looped(jax.tree.unflatten(tree, moved), x))
        slope = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(np.sum(f64(gradient) * direction), slope, rtol=2e-3, atol=2e-4)


def test_vmap_and_scan() -> None:
    module, x = make(), f32(np.stack([inputs(0), inputs(1)]))
    mapped = quick_jit(jax.vmap(lambda x: module(x, **ROWS)))(x)
    assert_close(mapped[1], module(x[1], **ROWS))

    def scanned(module: Any, x: Array) -> Array:
        def one(cache: Any, inputs: Any) -> Any:
            part, ids = inputs
            out, cache = module.decode(part[:, None], cache, position_ids=ids[:, None])
            return cache, out[:, 0]

        empty = module.init_cache(BATCH, SEQ, jnp.float32)
        return jax.lax.scan(one, empty, (x.swapaxes(0, 1), IN_ORDER.T))[1].swapaxes(0, 1)

    assert_close(quick_jit(scanned)(module, x[0]), module(x[0], position_ids=IN_ORDER), 2e-5)
    steps = quick_jit(jax.vmap(lambda x: scanned(module, x)))(x)
    assert_close(steps[1], module(x[1], position_ids=IN_ORDER), 2e-5)


def test_bfloat16_and_its_gradient() -> None:
    module, x = make(), f32(inputs())

    def total(module: Any, x: Array) -> Array:
        return jnp.sum(jnp.sin(module(x, **ROWS).astype(jnp.float32)))

    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), module)
    narrow = x.astype(jnp.bfloat16)
    expected = quick_jit(eqx.filter_value_and_grad(total))(module, x)
    value, gradients = quick_jit(eqx.filter_value_and_grad(total))(low, narrow)
    assert_close(value, expected[0], 0.1)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        assert one.dtype == jnp.bfloat16
        difference = jnp.linalg.norm((one.astype(jnp.float32) - other).ravel())
        assert float(difference) < 0.05 * float(jnp.linalg.norm(other.ravel())) + 1e-3
    # Cached steps of float32 parameters run in the dtype of their input.
    wide = module(x, position_ids=IN_ORDER)
    laid_out: Any = module.for_decoding(jnp.bfloat16)
    assert laid_out.query_up_kernel.dtype == jnp.bfloat16
    assert laid_out.latent_norm.scale.dtype == jnp.float32
    empty = module.init_cache(BATCH, SEQ, jnp.bfloat16)
    for one in (module, laid_out):
        out, _ = step(one, narrow, empty, IN_ORDER)
        assert out.dtype == jnp.bfloat16
        assert_close(out, wide, 0.05)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_heads(axis_type: AxisType) -> None:
    module, x = make(), f32(inputs())
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 4}, axis_type=axis_type)

    def total(module: Any, x: Array) -> Array:
        return jnp.sum(jnp.sin(module(x, **ROWS)))

    expected = quick_jit(eqx.filter_value_and_grad(total))(module, x)
    out, _ = step(module, x, module.init_cache(BATCH, SEQ, jnp.float32), IN_ORDER)
    placed = sharding.parameter_shardings(module, mesh)
    assert placed.query_up_kernel.spec == P("fsdp", "tensor", None)
    assert placed.up_kernel.spec == P("fsdp", "tensor", None)
    assert placed.out_kernel.spec == P("tensor", None, "fsdp")
    assert placed.query_down.kernel.spec == P("fsdp", None)
    assert placed.latent_down.kernel.spec == P("fsdp", None)
    assert placed.latent_norm.scale.spec == P(None)
    sharded = sharding.shard_model(module, mesh)
    with jax.set_mesh(mesh), sharding.use_rules():
        gradient: Any = eqx.filter_value_and_grad(total)
        run = (
            sharding.automatic(gradient, (P(), placed))
            if axis_type is AxisType.Explicit
            else gradient
        )
        found = quick_jit(run)(sharded, x)
        if axis_type is AxisType.Auto:
            cache = module.init_cache(BATCH, SEQ, jnp.float32)
            assert_close(step(sharded.for_decoding(jnp.float32), x, cache, IN_ORDER)[0], out, 2e-5)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_close(one, other, 2e-5)


def test_optimizers_know_its_matrices() -> None:
    module = make()
    numbers, decays = emtp.muon_dimension_numbers(module), emtp.weight_decay_mask(module)
    assert numbers.up_kernel.reduction_axis == (-3,)
    assert numbers.up_kernel.output_axis == (-2, -1)
    assert numbers.latent_norm.scale is None
    assert decays.latent_norm.scale is False
    assert decays.latent_down.kernel is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_rope_head_dim": 3}, "`qk_rope_head_dim` must be even, .*; got 3"),
        ({"kv_lora_rank": 0}, "`kv_lora_rank` must be at least 1; got 0"),
        ({"q_lora_rank": 0}, "`q_lora_rank` must be at least 1; got 0"),
        ({"v_head_dim": 0}, "`v_head_dim` must be at least 1; got 0"),
        ({"qk_nope_head_dim": -2}, "`qk_nope_head_dim` must be at least 1; got -2"),
        ({"rotary": nn.Rotary(size=2)}, "`rotary` must rotate the 4 features .* size 2"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_scales_of_yarn() -> None:
    plain = nn.YarnScaling(40.0)
    assert plain.softmax_factor == 1.0
    equal = nn.YarnScaling(40.0, mscale=1.0, mscale_all_dim=1.0)
    assert equal.amplitude == 1.0
    assert equal.softmax_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert nn.YarnScaling(0.5, mscale_all_dim=1.0).softmax_factor == 1.0
    with pytest.raises(ValueError, match="`mscale` must be at least 0"):
        nn.YarnScaling(4.0, mscale=-1.0)
