"""The methods of Linen's modules, under JAX's transformations, and in every dtype."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, quick_jit
from helpers import assert_rejects
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array
from maxtext import (
    BATCH,
    SEQ,
    get,
    toy_block,
    toy_config,
    toy_decoder,
    toy_inputs,
)

import equinox_mtp as emtp
from equinox_mtp import linen, nn

# Linen's methods


def test_init_draws_the_same_from_every_form_of_a_key() -> None:
    key = jax.random.key(3)
    block = toy_block(rngs={"params": key})
    expected = block.init(key)["params"]

    for rngs in (jax.random.PRNGKey(3), {"params": key}, {"default": key}, None):
        params = block.init(rngs)["params"]
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    other = block.init(jax.random.key(4))["params"]
    kernel = ("mtp_layer_1", "mtp_1_projection", "kernel")
    assert not np.array_equal(get(other, kernel), get(expected, kernel))


@pytest.mark.parametrize("rngs", [{"dropout": jax.random.key(0)}, {}, None])
def test_init_without_a_key_raises(rngs: Any) -> None:
    with pytest.raises(ValueError, match="`rngs` must hold a key for the stream 'params'"):
        toy_block().init(rngs)


@pytest.mark.parametrize("rngs", [7, jnp.zeros(2), jax.random.split(jax.random.key(0)), "key"])
def test_init_from_something_else_raises(rngs: Any) -> None:
    with pytest.raises(TypeError, match="`rngs` must be a key, a mapping"):
        toy_block().init(rngs)


def test_init_checks_the_arguments_of_the_call() -> None:
    block = toy_block()
    output, variables = block.init_with_output(jax.random.key(0), **toy_inputs())
    assert output == {}
    jax.tree.map(np.testing.assert_array_equal, variables, block.init(jax.random.key(0)))
    with pytest.raises(TypeError):
        block.init(jax.random.key(0), **toy_inputs(segments=None))
    with pytest.raises(Exception, match="input_ids"):
        block.init(jax.random.key(0), **toy_inputs(input_ids=jnp.zeros((BATCH, SEQ + 1), int)))


def test_bound_block_is_apply() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    bound = block.bind(variables, mutable="mtp_losses")
    output, collections = bound(**toy_inputs())
    assert output == {}
    expected = block.apply(variables, **toy_inputs(), mutable="mtp_losses")[1]
    jax.tree.map(np.testing.assert_array_equal, collections, expected)
    assert bound.unbind() == (block, variables)
    assert block.bind(variables)(**toy_inputs()) == {}


def test_a_block_without_variables_cannot_run() -> None:
    with pytest.raises(TypeError, match=r"use `block.apply\(variables"):
        toy_block()(**toy_inputs())
    for variables in ({}, {"mtp_losses": {}}):
        with pytest.raises(ValueError, match="`variables` must hold the collection 'params'"):
            toy_block().apply(variables, **toy_inputs())
    assert_rejects("variables", toy_block().apply, None, **toy_inputs())


def test_dropout_takes_its_own_key() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    run = quick_jit(
        lambda key: block.apply(
            variables,
            **toy_inputs(deterministic=False),
            mutable="mtp_losses",
            rngs={"params": jax.random.key(0), "dropout": key},
        )[1]["mtp_losses"]["mtp_block"]["losses"]
    )
    first, again, other = (run(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.all(np.abs(np.asarray(first - other)) > 1e-3)


def test_nothing_can_be_changed() -> None:
    block = toy_block()
    with pytest.raises(dataclasses.FrozenInstanceError):
        block.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    variables = block.init(jax.random.key(0))
    before = jax.tree.map(np.array, variables)
    block.apply(variables, **toy_inputs(), mutable=True)
    assert jax.tree.structure(before) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_repr_and_table() -> None:
    block = toy_block()
    assert repr(block) == (
        "LinenBlock(name='mtp_block', mtp_num_layers=2, emb_dim=8, dtype=float32, "
        "transformer_layer_module=ToyLayer, decoder=ToyDecoder, mesh=None)"
    )
    first, header, _, *rows, total = block.tabulate(jax.random.key(0)).splitlines()
    assert first == repr(block)
    assert header.split() == ["path", "shape", "dtype", "parameters"]
    assert [row.split() for row in rows][2] == [
        *("mtp_layer_1/mtp_1_projection/kernel", "[16,", "8]", "float32", "128")
    ]
    assert total.split() == ["total", str(2 * (8 + 8 + 128 + 8))]


# Dtypes


def test_dtypes_are_those_of_the_configuration() -> None:
    block = toy_block(toy_config(dtype="bfloat16", weight_dtype=jnp.bfloat16))
    variables = block.init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
    hidden_states = toy_inputs()["main_hidden_state"].astype(jnp.bfloat16)
    _, collections = block.apply(
        variables, **toy_inputs(main_hidden_state=hidden_states), mutable=True
    )
    losses = collections["mtp_losses"]["mtp_block"]["losses"]
    assert losses.dtype == jnp.float32
    exact = toy_block(toy_config())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    _, expected = exact.apply(wide, **toy_inputs(), mutable=True)
    assert_close(losses, expected["mtp_losses"]["mtp_block"]["losses"], 0.02)


# Transformations


def test_vmap_over_apply() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    inputs = toy_inputs()
    hidden_states = inputs.pop("main_hidden_state")

    def losses(variables: Any, hidden_states: Array) -> Array:
        _, out = block.apply(variables, **inputs, main_hidden_state=hidden_states, mutable=True)
        return out["mtp_losses"]["mtp_block"]["losses"]

    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x + 1]), variables)
    batched = quick_jit(jax.vmap(losses, in_axes=(0, None)))(several, hidden_states)
    for index in range(3):
        one = jax.tree.map(lambda x, index=index: x[index], several)
        assert_close(batched[index], losses(one, hidden_states))
    gradients = quick_jit(jax.vmap(jax.grad(lambda v: losses(v, hidden_states).sum())))(several)
    one = jax.tree.map(lambda x: x[1], several)
    expected = quick_jit(jax.grad(lambda v: losses(v, hidden_states).sum()))(one)
    jax.tree.map(lambda x, y: assert_close(x[1], y), gradients, expected)


# Shifting across shards


def context_mesh(name: str = "context") -> Mesh:
    return jax.make_mesh((4,), (name,), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


@pytest.mark.parametrize("shift", [0, -1, -3, -5])
def test_shifting_fetches_across_a_context_axis(shift: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(1, 100, (2, 16)).astype(np.int32)
    segments = np.sort(rng.integers(0, 4, (2, 16)), axis=1)[:, ::-1].astype(np.int32).copy()
    specs: dict[str, Any] = {"in_specs": P(None, "context"), "out_specs": P(None, "context")}
    mapped = jax.shard_map(lambda x: linen.roll_and_mask(x, shift), mesh=context_mesh(), **specs)
    np.testing.assert_array_equal(jax.jit(mapped)(x), emtp.roll_and_mask(x, shift))
    mapped = jax.shard_map(
        lambda x, s: linen.roll_and_mask_by_segment(x, s, shift), mesh=context_mesh(), **specs
    )
    expected = emtp.roll_and_mask_by_segment(x, segments, shift)
    np.testing.assert_array_equal(jax.jit(mapped)(x, segments), expected)


def test_shifting_stays_within_rows_on_other_axes() -> None:
    x = np.arange(16, dtype=np.int32)[None] + 1
    specs: dict[str, Any] = {"in_specs": P(None, "data"), "out_specs": P(None, "data")}
    mapped = jax.shard_map(linen.roll_and_mask, mesh=context_mesh("data"), **specs)
    expected = np.pad(x.reshape(4, 4)[:, 1:], ((0, 0), (0, 1))).reshape(1, 16)
    np.testing.assert_array_equal(jax.jit(mapped)(x), expected)
    np.testing.assert_array_equal(linen.roll_and_mask(x), np.pad(x[:, 1:], ((0, 0), (0, 1))))
    np.testing.assert_array_equal(linen.roll_and_mask_by_segment(x, None), linen.roll_and_mask(x))


# Meshes


@pytest.mark.parametrize("with_rules", [False, True])
def test_embeddings_are_laid_out_on_a_mesh(with_rules: bool) -> None:
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    rules = [
        ("activation_batch", ["replica", "data"]),
        ("activation_length", "context"),
        ("activation_embed", ()),
    ]
    overrides: dict[str, Any] = {"logical_axis_rules": rules} if with_rules else {}
    config = toy_config(**overrides)
    block, plain = toy_block(config, mesh=mesh), toy_block(config)
    variables = plain.init(jax.random.key(0))
    run = jax.jit(lambda v: block.apply(v, **toy_inputs(), mutable=True)[1])
    text = run.lower(variables).as_text()
    # Behind an axis over depths.
    expected = '[{?}, {"data"}, {}, {}]' if with_rules else '[{?}, {"data"}, {}, {"tensor"}]'
    assert expected in text
    jax.tree.map(
        lambda x, y: assert_close(x, y),
        run(variables),
        plain.apply(variables, **toy_inputs(), mutable=True)[1],
    )
    assert "'data': 2" in repr(block)


class ExplicitDecoder(eqx.Module):
    """Says where embeddings lie, as lookups on explicit axes must."""

    norm: nn.RMSNorm

    def _apply_embedding(self, shared: Array, ids: Array, *_: Any, **__: Any) -> Array:
        return shared.at[ids].get(out_sharding=P("data", None, None))

    def apply_output_head(self, shared: Array, hidden_states: Array, *_: Any) -> Array:
        return self.norm(hidden_states) @ shared.T


def test_explicit_axes_are_left_to_jax() -> None:
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2]
    )
    block = toy_block(mesh=mesh, decoder=ExplicitDecoder(toy_decoder().norm))
    plain = toy_block()
    variables = plain.init(jax.random.key(0))
    arrays = {name: x for name, x in toy_inputs().items() if eqx.is_array(x)}
    split = jax.device_put(arrays, NamedSharding(mesh, P("data")))
    whole = jax.device_put((variables, toy_decoder().embedding), NamedSharding(mesh, P()))

    def run(variables: Any, table: Array, arrays: Any) -> Any:
        inputs = {**toy_inputs(shared_embedding=table), **arrays}
        return block.apply(variables, **inputs, mutable=True)[1]

    with jax.set_mesh(mesh):
        actual = jax.jit(run)(*whole, split)
    expected = plain.apply(variables, **toy_inputs(), mutable=True)[1]
    for name in ("mtp_losses", "mtp_acceptance"):
        jax.tree.map(lambda x, y: assert_close(x, y), actual[name], expected[name])


def test_a_block_can_be_static() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    run = jax.jit(
        lambda block, v: block.apply(v, **toy_inputs(), mutable=True)[1], static_argnums=0
    )
    expected = block.apply(variables, **toy_inputs(), mutable=True)[1]
    jax.tree.map(lambda x, y: assert_close(x, y), run(block, variables), expected)


@pytest.mark.parametrize("mutable", [None, 5])
def test_mutable_that_makes_no_sense_raises(mutable: Any) -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    with pytest.raises(TypeError, match="`mutable` must be True, False, a collection's name"):
        block.apply(variables, **toy_inputs(), mutable=mutable)


def test_parameters_that_are_no_mapping_raise() -> None:
    with pytest.raises(TypeError, match=r"`variables\['params'\]` must be a mapping; got a `list`"):
        toy_block().apply({"params": []}, **toy_inputs())


def test_mode_that_is_none_raises() -> None:
    block = toy_block()
    with pytest.raises(ValueError, match=r"`model_mode` must be one of 'train', .*got 'training'"):
        block.apply(block.init(jax.random.key(0)), **toy_inputs(model_mode="training"))


def test_numpy_arrays_are_taken() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    numpy = {k: np.asarray(x) if eqx.is_array(x) else x for k, x in toy_inputs().items()}
    actual = block.apply(variables, **numpy, mutable=True)[1]
    expected = block.apply(variables, **toy_inputs(), mutable=True)[1]
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
