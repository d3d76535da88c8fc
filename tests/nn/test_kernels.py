"""Kernels that are laid out with their outputs first."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from helpers import compiled_text
from jax.sharding import AxisType

import equinox_mtp as emtp
from equinox_mtp import _products, nn
from equinox_mtp._products import rows_times
from equinox_mtp.nn import _kernels
from equinox_mtp.nn._kernels import OutputsFirst, multiply

EMBED = 12
# From the fewest rows to more than count as few.
ROWS = [(1, 1), (2, 2), (1, 64), (5, 13)]


def attention(key: Any, **options: Any) -> nn.GroupedQueryAttention:
    return nn.GroupedQueryAttention(EMBED, 4, 2, 6, key=key, **options)


def latent_attention(key: Any, **options: Any) -> nn.MultiHeadLatentAttention:
    sizes = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
    return nn.MultiHeadLatentAttention(EMBED, 4, **sizes, **options, key=key)


def mixture(key: Any) -> nn.MixtureOfExperts:
    keys = jax.random.split(key, 4)
    return nn.MixtureOfExperts(
        nn.Router(EMBED, 4, top_k=2, key=keys[0]),
        nn.Experts(4, EMBED, 16, key=keys[1]),
        shared_expert=nn.SwiGLU(EMBED, 16, key=keys[2]),
        shared_gate=nn.Linear(EMBED, 1, key=keys[3]),
    )


PARTS: dict[str, Any] = {
    "attention": attention,
    "with-gate": lambda key: attention(key, gate=True, bias=True, out_bias=True, norm_epsilon=1e-5),
    "latent": lambda key: latent_attention(key, q_lora_rank=None),
    "latent-queries": lambda key: latent_attention(key, q_lora_rank=8),
    "gated-delta": lambda key: nn.GatedDeltaNet(EMBED, 2, 4, 6, 8, key=key),
    "swiglu": lambda key: nn.SwiGLU(EMBED, 32, key=key),
    "mixture": mixture,
}
# Kernels of each, as many as are laid out.
COUNTS = {
    "attention": 4,
    "with-gate": 5,
    "latent": 3,
    "latent-queries": 4,
    "gated-delta": 5,
    "swiglu": 3,
    "mixture": 4,
}


def laid_out_kernels(tree: Any) -> list[OutputsFirst]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, OutputsFirst))
    return [x for x in leaves if isinstance(x, OutputsFirst)]


def run(part: Any, x: jax.Array) -> jax.Array:
    if isinstance(part, nn.AbstractFeedForward):
        out: Any = part(x)
        return out[0] if isinstance(out, tuple) else out
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return part(x, position_ids=positions)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [((5,), (7,)), ((5,), (2, 3)), ((2, 3), (7,))])
def test_products_are_those_of_a_loop(
    rows: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=rows + inputs), generator.normal(size=inputs + outputs)
    expected = np.zeros(rows + outputs)
    for row in np.ndindex(*rows):
        for i in np.ndindex(*inputs):
            for o in np.ndindex(*outputs):
                expected[row + o] += x[row + i] * kernel[i + o]
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    laid_out = OutputsFirst.of(kernel, len(inputs))
    assert laid_out.shape == kernel.shape
    assert laid_out.array.shape == outputs + inputs
    for one in (kernel, laid_out):
        assert_close(multiply(x, one, num_inputs=len(inputs)), expected, 1e-5)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("rows", [(1, 3), (3, 30)])
def test_parts_compute_the_same(name: str, rows: tuple[int, int]) -> None:
    part = build(PARTS[name])
    laid_out = nn.outputs_first(part)
    assert len(laid_out_kernels(laid_out)) == COUNTS[name]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*rows, EMBED)), jnp.float32)
    assert_close(quick_jit(run)(laid_out, x), quick_jit(run)(part, x), 1e-5)
    low = x.astype(jnp.bfloat16)
    out = quick_jit(run)(laid_out, low)
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), quick_jit(run)(part, low).astype(jnp.float32), 0.05)


def test_under_vmap_and_grad() -> None:
    linear = build(lambda key: nn.Linear(5, 7, key=key))
    laid_out = nn.outputs_first(linear)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 5)), jnp.float32)
    assert_close(jax.vmap(laid_out)(x), linear(x), 1e-6)

    def loss(module: nn.Linear, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(module(x)))

    expected, actual = eqx.filter_grad(loss)(linear, x), eqx.filter_grad(loss)(laid_out, x)
    assert_close(actual.kernel.array.T, expected.kernel, 1e-5)
    of_x = jax.grad(loss, argnums=1)
    assert_close(of_x(laid_out, x), of_x(linear, x), 1e-5)


def test_no_kernel_is_transposed_in_a_step() -> None:
    part = nn.outputs_first(build(PARTS["attention"]))
    steps = {
        "out": lambda x: multiply(x, part.out_kernel, num_inputs=2),
        "query": lambda x: multiply(x, part.query_kernel),
    }
    for name, shape in {"out": (1, 4, 4, 6), "query": (1, 4, EMBED)}.items():
        equations = jax.make_jaxpr(steps[name])(jnp.ones(shape)).jaxpr.eqns
        names = ["dot_general", "optimization_barrier", "transpose"]
        assert [x.primitive.name for x in equations] == names
        # The kernel is the left factor as it lies, and the result is transposed.
        kernel = getattr(part, f"{name}_kernel").array
        assert equations[0].invars[0].aval.shape == kernel.shape
        assert equations[2].invars[0].aval.size < kernel.size


@pytest.mark.parametrize("shape", [(4, EMBED), (1, 4, EMBED)])
def test_xla_keeps_the_kernel_on_the_left(shape: tuple[int, ...]) -> None:
    """It would turn a product whose result is transposed around, and pack the kernel then."""
    linear = nn.outputs_first(nn.Linear(EMBED, 32, key=jax.random.key(0)))
    text = compiled_text(lambda linear, x: [linear(x)], linear, jnp.ones(shape))
    (product,) = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert product == "32,4"


def test_laid_out_twice_is_laid_out_once() -> None:
    once = nn.outputs_first(build(PARTS["attention"]))
    twice = nn.outputs_first(once)
    assert len(laid_out_kernels(twice)) == COUNTS["attention"]
    assert eqx.tree_equal(once, twice)


def test_stacked_layers_are_refused() -> None:
    stacked = eqx.filter_vmap(PARTS["attention"])(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=r"`query_kernel` is stacked, of shape \(3, 12, 4, 6\)"):
        nn.outputs_first([stacked])


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        ("attention", AxisType.Auto),
        ("attention", AxisType.Explicit),
        ("swiglu", AxisType.Explicit),
        # The gated delta rule itself wants an Auto mesh.
        ("gated-delta", AxisType.Auto),
    ],
)
def test_on_eight_devices(name: str, axis_type: AxisType) -> None:
    part = build(PARTS[name])
    x = jnp.asarray(np.random.default_rng(4).normal(size=(8, 3, EMBED)), jnp.float32)
    expected = quick_jit(run)(part, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        laid_out = jax.device_put(nn.outputs_first(part), jax.NamedSharding(mesh, jax.P()))
        out = quick_jit(run)(laid_out, split)
        assert out.sharding.is_equivalent_to(split.sharding, out.ndim)
        assert_close(out, expected, 1e-5)


def test_other_platforms_keep_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "default_platform", lambda: "gpu")
    linear = nn.Linear(3, 5, key=jax.random.key(0))
    assert nn.outputs_first(linear) is linear


def test_products_elsewhere_have_the_rows_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = jnp.arange(6.0).reshape(2, 3), jnp.arange(15.0).reshape(5, 3)
    here = rows_times(x, matrix)
    monkeypatch.setattr(_products, "default_platform", lambda: "gpu")
    jaxpr = jax.make_jaxpr(rows_times)(x, matrix)
    assert [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns] == ["dot_general"]
    assert jaxpr.jaxpr.eqns[0].invars[0].aval.shape == x.shape
    assert_close(rows_times(x, matrix), here, 1e-6)


@pytest.mark.parametrize("num_rows", [0, 1, 4, 64, 65])
def test_logits_of_few_and_of_many_tokens(num_rows: int) -> None:
    generator = np.random.default_rng(3)
    weight, bias = generator.normal(size=(33, EMBED)), generator.normal(size=33)
    x = generator.normal(size=(num_rows, EMBED))
    head = emtp.LinearHead(
        jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32), soft_cap=3.0
    )
    expected = 3 * np.tanh((x @ weight.T + bias) / 3)
    x = jnp.asarray(x, jnp.float32)
    assert_close(head(x), expected, 1e-5)
    assert_close(head(x[None]), expected[None], 1e-5)
    low = head(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert_close(low, expected, 0.05)
