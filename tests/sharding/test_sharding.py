"""Whole training steps on eight devices: one device's numbers, and what the programs move."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import quick_jit
from helpers import assert_close
from hlo import collectives, sizes
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float
from sharded_step import (
    BATCH,
    DEPTHS,
    EMBED,
    KV_FEATURES,
    MESHES,
    OPTIMIZER,
    SEQ,
    TOKEN_TILE,
    VOCAB,
    Rows,
    Step,
    assert_same_step,
    make_model,
    make_rows,
    on_one_device,
    run_on,
    train_step,
)

import equinox_mtp as emtp
from equinox_mtp import MTPModel, nn, sharding
from equinox_mtp.sharding import DEFAULT_RULES, make_mesh


def parameter_sizes(model: MTPModel) -> set[int]:
    """Of whole parameters, stacked and one by one."""
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    return {size for x in leaves for size in (x.size, x[0].size)}


# An axis alone does less than next to another.
@pytest.mark.parametrize("name", [name for name in MESHES if name != "fsdp"])
def test_a_training_step_is_that_of_one_device(name: str) -> None:
    mesh = make_mesh(MESHES[name])
    model = make_model()
    step, program = run_on(mesh, model, make_rows())
    assert_same_step(step, on_one_device())
    shape = dict.fromkeys(("data", "fsdp", "context", "tensor"), 1) | MESHES[name]
    rows = BATCH // (shape["data"] * shape["fsdp"])
    found = collectives(program)
    # No device gathers anything of other positions: their keys and values come by, in turn.
    gathered = {n for c in found if c.operation == "all-gather" for n in c.sizes}
    allowed: set[int] = set()
    exchanged = {n for c in found if c.operation == "all-to-all" for n in c.sizes}
    if shape["fsdp"] > 1:
        # Parameters are put together; but the embedding's features are looked up where they lie,
        # for all tokens, and sent to where the tokens are.
        # The depths' tokens are looked up together.
        ids = {depths * rows * shape["fsdp"] * SEQ for depths in (1, DEPTHS)}
        allowed |= parameter_sizes(model) | ids
        features = rows * SEQ * EMBED // shape["fsdp"]
        assert exchanged == {features, DEPTHS * features}
    else:
        assert exchanged == set()
    assert gathered <= allowed
    # The embedding's gradient is summed over devices once, not in each depth.
    embedding = VOCAB * EMBED // (shape["tensor"] * shape["fsdp"])
    reduced = [c for c in found if c.operation == "all-reduce" and embedding in c.sizes]
    assert not any(c.in_loop for c in reduced)
    passed_on = [c.sizes for c in found if c.operation == "collective-permute"]
    positions = rows * SEQ // shape["context"]
    keys = positions * KV_FEATURES // shape["tensor"]
    order = SEQ // shape["context"]  # the same for all rows
    in_rings = {n for sizes in passed_on for n in sizes if n >= order}
    # Each shift moves the tokens that cross from shard to shard: k in each row at depth k.
    shifts = sorted(sizes for sizes in passed_on if max(sizes) < order)
    if shape["context"] == 1:
        assert passed_on == []
    else:
        assert in_rings == {keys, positions, order}
        of_fields = 3 * [1, 2, 3]  # inputs, targets and their masks
        of_documents = [1, 1, 2]  # which of them end, and that for depths 2 and 3
        assert shifts == sorted((k * rows,) for k in of_fields + of_documents)
    # Logits are computed in tiles.
    tokens = rows * SEQ // shape["context"]
    whole = tokens * VOCAB // shape["tensor"]
    assert whole > TOKEN_TILE * VOCAB
    assert whole not in sizes(program)
    assert step.model.decoder.decoder.embedding.sharding.spec == DEFAULT_RULES.spec(
        "vocab embed", mesh
    )


@pytest.mark.parametrize(
    "name", ["fsdp", pytest.param("data_tensor_context", marks=pytest.mark.slow)]
)
def test_explicit_axes(name: str) -> None:
    mesh = make_mesh(MESHES[name], axis_type=AxisType.Explicit)
    model = sharding.shard_model(make_model(), mesh)
    with jax.set_mesh(mesh), sharding.use_rules():
        moments = sharding.shard_model(OPTIMIZER.init(eqx.filter(model, eqx.is_array)), mesh)
        rows = sharding.shard_batch(make_rows(), mesh)
        placed = sharding.parameter_shardings(model, mesh)
        out = Step(P(), P(), placed, placed, sharding.parameter_shardings(moments, mesh))
        step = quick_jit(sharding.automatic(train_step, out))(model, moments, rows)
    assert_same_step(step, on_one_device())
    kernel = step.model.block.layers.transformer_layer.attention.query_kernel
    assert kernel.sharding.spec == DEFAULT_RULES.spec("_ embed heads head_dim", mesh)
    assert kernel.sharding.mesh.axis_types == (AxisType.Explicit,) * len(MESHES[name])
    assert step.model.decoder.layers.dropout.p == 0.0


@pytest.mark.slow
def test_balanced_order_of_packed_rows() -> None:
    mesh = make_mesh(MESHES["data_context"])
    rows = make_rows()
    targets = emtp.align_targets(
        rows.input_ids,
        rows.target_ids,
        rows.target_mask,
        num_depths=DEPTHS,
        segment_ids=jnp.asarray(rows.segment_ids),
        position_ids=jnp.asarray(rows.position_ids),
    )
    order = sharding.zigzag_order(SEQ, mesh.shape["context"])
    assert not np.array_equal(order, np.arange(SEQ))
    rows, targets = sharding.reorder((rows, targets), order)
    model = make_model(attention=nn.causal_attention_by_position)
    step, program = run_on(mesh, model, rows, targets)
    assert_same_step(step, on_one_device())
    positions = BATCH // mesh.shape["data"] * SEQ // mesh.shape["context"]
    passed_on = [c for c in collectives(program) if c.operation == "collective-permute"]
    # In rings; no target is shifted.
    assert all(c.in_loop and min(c.sizes) >= positions for c in passed_on)


# Orders


def zigzag_oracle(seq: int, num_shards: int) -> list[int]:
    chunk = seq // (2 * num_shards)
    out: list[int] = []
    for shard in range(num_shards):
        for index in (shard, 2 * num_shards - 1 - shard):
            out += range(index * chunk, (index + 1) * chunk)
    return out


@pytest.mark.parametrize(("seq", "num_shards"), [(8, 1), (8, 2), (8, 4), (72, 4), (12, 3)])
def test_zigzag_order(seq: int, num_shards: int) -> None:
    order = sharding.zigzag_order(seq, num_shards)
    assert order.tolist() == zigzag_oracle(seq, num_shards)
    # Under causal attention position i attends to i + 1: the same sum on every shard.
    work = (order + 1).reshape(num_shards, -1).sum(axis=1)
    assert len(set(work.tolist())) == 1


def test_reorder_and_restore() -> None:
    order = sharding.zigzag_order(8, 2)
    tree = {"x": np.arange(16).reshape(2, 8), "none": None}
    there = sharding.reorder(tree, order)
    assert there["x"][0].tolist() == order.tolist()
    back = sharding.restore(there, order)
    np.testing.assert_array_equal(back["x"], tree["x"])
    with pytest.raises(ValueError, match=r"the 8 positions of `order`; got shape \(2, 9\)"):
        sharding.reorder(np.zeros((2, 9)), order)


@pytest.mark.parametrize(("seq", "num_shards"), [(9, 1), (8, 3), (4, 4), (8, 0)])
def test_orders_that_cannot_be(seq: int, num_shards: int) -> None:
    with pytest.raises(ValueError, match="`seq` must be a multiple of twice `num_shards`"):
        sharding.zigzag_order(seq, num_shards)


# Rules


def test_default_rules_on_the_reference_model() -> None:
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    model = make_model()
    placed = sharding.parameter_shardings(model, mesh)
    layer, mtp = placed.decoder.layers, placed.block.layers
    assert {
        "embedding": placed.decoder.embedding.spec,
        "norm": placed.decoder.norm.scale.spec,
        "query": layer.attention.query_kernel.spec,
        "key": layer.attention.key_kernel.spec,
        "out": layer.attention.out_kernel.spec,
        "gate": layer.feed_forward.gate.kernel.spec,
        "down": layer.feed_forward.down.kernel.spec,
        "projection": mtp.projection_layer.kernel.spec,
        "mtp_query": mtp.transformer_layer.attention.query_kernel.spec,
    } == {
        "embedding": P("tensor", "fsdp"),
        "norm": P(None),
        "query": P(None, "fsdp", "tensor", None),
        "key": P(None, "fsdp", "tensor", None),
        "out": P(None, "tensor", None, "fsdp"),
        "gate": P(None, "fsdp", "tensor"),
        "down": P(None, "tensor", "fsdp"),
        "projection": P(None, "fsdp", None),
        "mtp_query": P(None, "fsdp", "tensor", None),
    }
    # The optimizer's moments lie as the parameters do, and its count everywhere.
    state = OPTIMIZER.init(eqx.filter(model, eqx.is_array))
    states = sharding.parameter_shardings(state, mesh)
    assert states[0].mu.decoder.embedding.spec == P("tensor", "fsdp")
    assert states[0].count.spec == P()
    # States that keep something else, or nothing, of parameters are whole where they do not fit.
    rules = DEFAULT_RULES.replace(parameters={"norm.scale": "_"})
    params = eqx.filter(model, eqx.is_array)
    for optimizer in (optax.sgd(0.1), optax.adafactor(0.1, min_dim_size_to_factor=2)):
        sharding.shard_model(optimizer.init(params), mesh, rules)
    # From shapes alone, too.
    shapes = eqx.filter_eval_shape(make_model)
    assert sharding.parameter_shardings(shapes, mesh).decoder.embedding.spec == P("tensor", "fsdp")


class Experts(eqx.Module):
    """Modules of others need no more than annotations, or rules."""

    weights: Float[Array, "experts embed mlp"]
    unnamed: Array
    optional: Float[Array, "vocab"] | None
    anything: Float[Array, "*any embed"]
    size: int = 3


def test_modules_of_others() -> None:
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    module = Experts(jnp.zeros((8, 4, 3)), jnp.zeros((4, 6)), jnp.zeros(4), jnp.zeros((2, 4)))
    rules = DEFAULT_RULES.replace(experts="expert", parameters={"unnamed": "experts embed"})
    placed = sharding.parameter_shardings({"a": [module]}, mesh, rules)["a"][0]
    assert placed.weights.spec == P("expert", "fsdp", None)
    assert placed.unnamed.spec == P("expert", "fsdp")
    assert placed.optional.spec == P(None)
    assert placed.anything.spec == P(None, None)
    assert placed.size is None
    values = sharding.shard_model({"a": [module]}, mesh, rules)["a"][0]
    assert values.size == 3
    assert values.weights.sharding == placed.weights
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = make_mesh({"fsdp": 2, "expert": 4}, axis_type=axis_type)
        with jax.set_mesh(mesh):
            made: Any = eqx.filter_jit(sharding.constrain_model)(module, mesh, rules)
        assert made.weights.sharding.is_equivalent_to(NamedSharding(mesh, placed.weights.spec), 3)
        assert made.weights.sharding.mesh.axis_types == (axis_type, axis_type)
        np.testing.assert_array_equal(made.unnamed, module.unnamed)


def test_hidden_states_in_a_shard_map_of_the_users() -> None:
    """There they stay as they are, and so does a whole decoder that is told of a mesh."""
    mesh = make_mesh({"data": 8})
    model, rows = make_model(), make_rows()
    decoder: Any = model.decoder
    arrays, static = eqx.partition(decoder, eqx.is_array)

    def run(arrays: Any, rows: Rows) -> Any:
        return eqx.combine(arrays, static)(
            rows.input_ids, position_ids=rows.position_ids, segment_ids=rows.segment_ids
        )

    rows = jax.tree.map(jnp.asarray, rows)
    with jax.set_mesh(mesh), sharding.use_rules():
        mapped = jax.shard_map(run, in_specs=(P(), P("data")), out_specs=P("data"))
        found = jax.jit(mapped)(arrays, rows)
    plain: Any = make_model().decoder
    expected = quick_jit(plain)(
        rows.input_ids, position_ids=rows.position_ids, segment_ids=rows.segment_ids
    )
    assert_close(found, expected, atol=5e-6)


def test_rules_that_do_not_fit() -> None:
    model = make_model()
    rules = DEFAULT_RULES.replace(parameters={"gates": "embed mlp"})
    with pytest.raises(ValueError, match=r"fit no parameter: 'gates'.*decoder\.embedding, "):
        sharding.shard_model(model, make_mesh({"fsdp": 8}), rules)
    with pytest.raises(ValueError, match=r"an axis 'model' that no rule in `rules` names"):
        sharding.shard_model(model, make_mesh({"model": 8}))
    cases = [
        (DEFAULT_RULES.replace(vocb="fsdp"), "axis words that no parameter has: vocb"),
        (DEFAULT_RULES.replace(embed="fdsp"), "splits 'embed' over 'fdsp', which is no axis of"),
        (
            DEFAULT_RULES.replace(parameters={"gate.kernel": "embd mlp"}),
            r"rule 'gate.kernel' of `rules` must name .* got 'embd mlp'",
        ),
        (
            DEFAULT_RULES.replace(parameters={"norm.scale": "embed mlp heads"}),
            r"must name the last axes of `.*scale`, which has shape .* got 'embed mlp heads'",
        ),
    ]
    for rules, message in cases:
        with pytest.raises(ValueError, match=message):
            sharding.shard_model(model, make_mesh({"fsdp": 8}), rules)
    message = r"key_kernel` cannot be split by the rule 'kv_heads': 'tensor'.* size 4 .* 8 devices"
    with pytest.raises(ValueError, match=message):
        sharding.shard_model(model, make_mesh({"tensor": 8}))
    with pytest.raises(ValueError, match=r"must multiply to the 8 device\(s\).* = 6"):
        make_mesh({"data": 2, "tensor": 3})
    with pytest.raises(ValueError, match=r"`sizes` must be positive; got 0 for 'data'"):
        make_mesh({"data": 0})
    with pytest.raises(ValueError, match=r"`batch` must be a multiple of the 8 device"):
        sharding.shard_batch(np.zeros((6, 4)), make_mesh({"data": 8}))
    with pytest.raises(ValueError, match=r"last axes are `batch` and `seq`; got one of shape \(8,"):
        sharding.shard_batch(np.zeros(8), make_mesh({"data": 8}))
    with pytest.raises(ValueError, match=r"`seq` must be a multiple of the 8 device"):
        sharding.shard_batch(np.zeros((8, 4)), make_mesh({"context": 8}))
    whole: Any = sharding.shard_batch(np.zeros((8, 5)), make_mesh({"context": 8}), split_seq=False)
    assert whole.sharding.spec == P(None, None)
