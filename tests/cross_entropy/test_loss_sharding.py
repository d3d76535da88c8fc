"""The losses on eight devices: one device's values, and what the compiled programs move.

Arrays in a compiled program have the shapes of one device's part. The sizes here are chosen so that
tokens, hidden states and logits of more tokens than a tile are larger than all that may be there.
"""

import contextlib
import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal
from hlo import Collective, collectives, compile_for, sizes
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from equinox_mtp import (
    AbstractDecoder,
    AbstractDecoderLayer,
    HeadSharding,
    LinearHead,
    MTPConfig,
    MultiTokenPredictionBlock,
    align_targets,
    calculate_mtp_loss,
    linear_cross_entropy,
    summed_linear_cross_entropy,
)
from equinox_mtp.nn import RMSNorm
from equinox_mtp.sharding import with_auto_axes

NUM_DEVICES = 8
# Nine positions for each of eight devices, and rows of the head that fill no whole tiles: there is
# padding, and overlap, everywhere.
BATCH, SEQ, EMBED, VOCAB = 8, 72, 8, 104
TOKEN_TILE, VOCAB_TILE = 16, 40
TILE_LOGITS = TOKEN_TILE * 105
FSDP_HEAD = (VOCAB * EMBED, VOCAB)
SOFT_CAP, Z_LOSS_WEIGHT = 5.0, 0.1


def assert_nothing_is_gathered(program: str, *, allowed: tuple[int, ...] = ()) -> None:
    gathered = [
        size for c in collectives(program) if c.operation == "all-gather" for size in c.sizes
    ]
    assert set(gathered) <= set(allowed)
    assert not any(c.operation == "all-to-all" for c in collectives(program))


def assert_no_collective_in_loops(program: str) -> None:
    assert "while(" in program
    assert [c for c in collectives(program) if c.in_loop] == []


def test_the_reading_of_compiled_programs() -> None:
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def body(_: int, x: jax.Array) -> jax.Array:
        return jnp.cos(x + jnp.sum(x))

    x = jax.device_put(jnp.ones((16, 3)), split)
    for steps, in_loop in ((0, False), (3, True)):
        function = jax.jit(partial(lax.fori_loop, 0, 3, body) if steps else partial(body, 0))
        found = collectives(compile_for(function, x)[1])
        assert [(c.operation, c.in_loop) for c in found] == [("all-reduce", in_loop)]
    gather = jax.jit(lambda x: x + 1, out_shardings=whole)
    assert collectives(compile_for(gather, x)[1]) == [Collective("all-gather", (48,), False)]


# Losses of a linear head


class Placement(NamedTuple):
    """A mesh, and over which of its axes things are split."""

    mesh: dict[str, int]
    tokens: P
    head: P = P()
    sharding: dict[str, Any] = {}  # noqa: RUF012


PLACEMENTS = {
    "data": Placement({"data": 8}, P("data"), sharding={"batch": "data"}),
    "fsdp_rows": Placement(
        {"replica": 2, "data": 4},
        P(("replica", "data")),
        P("data"),
        {"batch": ("replica", "data")},
    ),
    "fsdp_features": Placement({"data": 8}, P("data"), P(None, "data"), {"batch": "data"}),
    "seq": Placement({"context": 8}, P(None, "context"), sharding={"seq": "context"}),
    "data_seq": Placement(
        {"data": 2, "context": 4},
        P("data", "context"),
        sharding={"batch": "data", "seq": "context"},
    ),
    "vocab": Placement(
        {"data": 2, "tensor": 4}, P("data"), P("tensor"), {"batch": "data", "vocab": "tensor"}
    ),
    "all": Placement(
        {"data": 2, "context": 2, "tensor": 2},
        P("data", "context"),
        P("tensor"),
        {"batch": "data", "seq": "context", "vocab": "tensor"},
    ),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(placement: Placement, axis_type: AxisType) -> jax.sharding.Mesh:
    shape, names = tuple(placement.mesh.values()), tuple(placement.mesh)
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names))


class Case(NamedTuple):
    """Arrays, or their partition specs."""

    hidden_states: Any
    weight: Any
    bias: Any
    target_ids: Any
    weights: Any


def make_case(dtype: Any = jnp.float32, bias: bool = True) -> Case:
    rng = np.random.default_rng(0)
    weights = rng.random((BATCH, SEQ)) * (rng.random((BATCH, SEQ)) < 0.8)
    return Case(
        hidden_states=jnp.asarray(rng.standard_normal((BATCH, SEQ, EMBED)), dtype),
        weight=jnp.asarray(rng.standard_normal((VOCAB, EMBED)), dtype),
        bias=jnp.asarray(rng.standard_normal(VOCAB), dtype) if bias else None,
        target_ids=jnp.asarray(rng.integers(0, VOCAB, (BATCH, SEQ)), jnp.int32),
        weights=jnp.asarray(weights / BATCH / SEQ, jnp.float32),
    )


def place(case: Case, placement: Placement, mesh: jax.sharding.Mesh) -> Case:
    specs = Case(
        hidden_states=placement.tokens,
        weight=placement.head,
        bias=P(*placement.head[:1]) if case.bias is not None else None,
        target_ids=placement.tokens,
        weights=placement.tokens,
    )
    return jax.tree.map(
        lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)),
        specs,
        case,
        is_leaf=lambda x: isinstance(x, P),
    )


def both_strategies(case: Case, **options: Any) -> Any:
    """Losses, predictions and all gradients, of each token's losses and of their sum."""
    options = {"token_tile": TOKEN_TILE, "vocab_tile": VOCAB_TILE, "soft_cap": SOFT_CAP} | options

    def by_token(differentiable: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        hidden_states, weight, bias, weights, z_loss_weight = differentiable
        head = LinearHead(weight, bias, **options)
        out = linear_cross_entropy(hidden_states, head, case.target_ids)
        per_token = out.negative_log_likelihood + z_loss_weight * out.log_sum_exp**2
        return jnp.sum(weights * per_token), out

    def summed(differentiable: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        hidden_states, weight, bias, weights, z_loss_weight = differentiable
        head = LinearHead(weight, bias, **options)
        out = summed_linear_cross_entropy(
            hidden_states, head, case.target_ids, weights, z_loss_weight=z_loss_weight
        )
        return out.loss, out

    z_loss_weight = jnp.float32(Z_LOSS_WEIGHT)
    differentiable = (case.hidden_states, case.weight, case.bias, case.weights, z_loss_weight)
    return [
        jax.value_and_grad(function, has_aux=True)(differentiable)
        for function in (by_token, summed)
    ]


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same integers, and numbers the same relative to the array's largest."""
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(other.dtype, jnp.integer):
            assert_equal(one, other)
        else:
            assert_close(one, other, 0, tolerance * np.max(np.abs(np.asarray(other, float))))


@pytest.fixture(scope="module")
def on_one_device() -> Any:
    return jax.jit(both_strategies)(make_case())


def run_on_devices(
    case: Case,
    placement: Placement,
    *,
    axis_type: AxisType = AxisType.Auto,
    sharded_head: bool = True,
    set_mesh: bool = True,
    **options: Any,
) -> tuple[Any, str]:
    """The results on eight devices, and the compiled program."""
    mesh = mesh_of(placement, axis_type)
    if sharded_head:
        options["sharding"] = HeadSharding(mesh, **placement.sharding)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        placed = place(case, placement, mesh)
        function = jax.jit(partial(both_strategies, **options))
        compiled, program = compile_for(function, placed)
        results = compiled(placed)
    for (_, _), gradients in results:
        for gradient, x in zip(gradients[:4], (*placed[:3], placed.weights), strict=True):
            if x is not None and axis_type == AxisType.Explicit:
                assert gradient.sharding.is_equivalent_to(x.sharding, x.ndim)
    return results, program


def assert_small_arrays(program: str, placement: Placement) -> None:
    """Nothing as large as the logits of more tokens than a tile's, nor as gathered tokens."""
    names = [name for name in placement.mesh if repr(name) in repr(placement.tokens)]
    tokens = BATCH * SEQ // math.prod(placement.mesh[name] for name in names)
    # Tiles have ten positions where a device has nine.
    allowed = max(TILE_LOGITS, tokens * EMBED * 10 // 9)
    assert allowed < BATCH * SEQ * VOCAB // NUM_DEVICES // 2
    assert allowed < BATCH * SEQ * EMBED
    assert max(sizes(program)) <= allowed


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        *((name, AUTO) for name in PLACEMENTS),
        *((name, EXPLICIT) for name in ("fsdp_features", "vocab")),
    ],
)
def test_head_sharding(name: str, axis_type: AxisType, on_one_device: Any) -> None:
    placement = PLACEMENTS[name]
    results, program = run_on_devices(make_case(), placement, axis_type=axis_type)
    assert_same(results, on_one_device)
    assert_no_collective_in_loops(program)
    # Under fsdp every device needs the whole head, and may fetch it once.
    assert_nothing_is_gathered(program, allowed=FSDP_HEAD if name.startswith("fsdp") else ())
    assert_small_arrays(program, placement)


@pytest.mark.parametrize(
    ("name", "axis_type", "set_mesh"),
    [
        ("data", AUTO, False),
        ("fsdp_rows", AUTO, False),
        ("fsdp_features", AUTO, True),
        ("seq", AUTO, False),
        ("data_seq", AUTO, True),
        ("data", EXPLICIT, True),
        ("data_seq", EXPLICIT, False),
    ],
)
def test_without_head_sharding(
    name: str, axis_type: AxisType, set_mesh: bool, on_one_device: Any
) -> None:
    placement = PLACEMENTS[name]
    # Where the mesh is not known, a tile's tokens are those of all devices.
    is_known = set_mesh or axis_type == EXPLICIT
    results, program = run_on_devices(
        make_case(),
        placement,
        axis_type=axis_type,
        sharded_head=False,
        set_mesh=set_mesh,
        token_tile=TOKEN_TILE if is_known else TOKEN_TILE * NUM_DEVICES,
    )
    assert_same(results, on_one_device)
    # Under fsdp every device needs the whole head, and may fetch it once.
    assert_nothing_is_gathered(program, allowed=FSDP_HEAD if name.startswith("fsdp") else ())
    assert not any(c.in_loop for c in collectives(program) if c.operation != "all-reduce")
    assert_small_arrays(program, placement)


NO_OPTIONS = {"soft_cap": None, "recompute_logits": True}
ONE_VOCAB_TILE = {"vocab_tile": 1000, "token_tile": 40}


@pytest.mark.parametrize(
    ("name", "dtype", "bias", "options"),
    [
        ("data_seq", jnp.float32, False, NO_OPTIONS),
        ("vocab", jnp.float32, False, NO_OPTIONS),
        ("vocab", jnp.bfloat16, True, ONE_VOCAB_TILE),
    ],
)
def test_options_of_a_sharded_head(
    name: str, dtype: Any, bias: bool, options: dict[str, Any]
) -> None:
    case = make_case(dtype, bias)
    expected = jax.jit(partial(both_strategies, **options))(case)
    results, program = run_on_devices(case, PLACEMENTS[name], **options)
    # Sums over devices are in float32, and rounded once.
    assert_same(results, expected, 1e-5 if dtype == jnp.float32 else 2.0**-8)
    assert_no_collective_in_loops(program)
    assert_nothing_is_gathered(program)


def test_ties_across_devices_go_to_the_first_id() -> None:
    mesh = mesh_of(PLACEMENTS["vocab"], AUTO)
    weight = np.zeros((VOCAB, EMBED), np.float32)
    # Position i points along feature i: two ids on different devices, on one, and all of them.
    for feature, best in enumerate([(27, 79, 80), (25, 26), (103, 78), (100, 102)]):
        weight[list(best), feature] = 1
    head = LinearHead(
        jnp.asarray(weight),
        vocab_tile=7,
        sharding=HeadSharding(mesh, batch="data", vocab="tensor"),
    )
    hidden_states = jnp.tile(jnp.eye(EMBED)[:5], (2, 1, 1))
    target_ids = jnp.zeros((2, 5), jnp.int32)
    out = eqx.filter_jit(linear_cross_entropy)(hidden_states, head, target_ids)
    assert_equal(out.predictions, np.array([[27, 25, 78, 100, 0]] * 2, np.int32))


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_the_mesh_may_be_the_one_that_is_set(axis_type: AxisType, on_one_device: Any) -> None:
    # The arrays lie on one device, and know nothing of it.
    case, mesh = make_case(), mesh_of(PLACEMENTS["vocab"], axis_type)
    function = jax.jit(
        partial(both_strategies, sharding=HeadSharding(batch="data", vocab="tensor"))
    )
    with jax.set_mesh(mesh):
        results = function(case)
    assert_same(results, on_one_device)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_outside_of_jit(axis_type: AxisType) -> None:
    hidden_states, weight, _, target_ids, weights = make_case()

    def loss(hidden_states: jax.Array, weight: jax.Array) -> jax.Array:
        return summed_linear_cross_entropy(hidden_states, weight, target_ids, weights).loss

    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden_states, weight)
    with jax.set_mesh(mesh_of(PLACEMENTS["data"], axis_type)):
        assert_same(jax.value_and_grad(loss, argnums=(0, 1))(hidden_states, weight), expected)


# Callable heads


class ModuleHead(eqx.Module):
    weight: jax.Array

    def __call__(self, hidden_states: jax.Array) -> jax.Array:
        return hidden_states @ self.weight.T


def sum_under_callable(case: Case) -> Any:
    def loss(hidden_states: jax.Array, weight: jax.Array) -> jax.Array:
        head = ModuleHead(weight)
        return summed_linear_cross_entropy(hidden_states, head, case.target_ids, case.weights).loss

    return jax.value_and_grad(loss, argnums=(0, 1))(case.hidden_states, case.weight)


@pytest.mark.parametrize(("name", "axis_type"), [("seq", AUTO), ("data_seq", EXPLICIT)])
def test_callable_heads(name: str, axis_type: AxisType) -> None:
    case, mesh = make_case(), mesh_of(PLACEMENTS[name], axis_type)
    expected = jax.jit(sum_under_callable)(case)
    with jax.set_mesh(mesh):
        placed = place(case, PLACEMENTS[name], mesh)
        compiled, program = compile_for(jax.jit(sum_under_callable), placed)
        assert_same(compiled(placed), expected)
    assert_nothing_is_gathered(program)


def test_a_closure_over_explicit_arrays_is_explained() -> None:
    mesh = mesh_of(PLACEMENTS["data"], EXPLICIT)
    case = place(make_case(), PLACEMENTS["data"], mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="context mesh") as raised:
        linear_cross_entropy(case.hidden_states, lambda x: x @ case.weight.T, case.target_ids)
    assert "make it an `equinox.Module`" in raised.value.__notes__[-1]
    assert "`LinearHead`" in raised.value.__notes__[-1]


def test_so_is_one_in_a_function_of_the_users() -> None:
    mesh = mesh_of(PLACEMENTS["data"], EXPLICIT)
    case = place(make_case(), PLACEMENTS["data"], mesh)
    product = with_auto_axes(lambda x: x @ case.weight.T, lambda spec: spec, case.target_ids)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="context mesh") as raised:
        product(case.hidden_states)
    note = raised.value.__notes__[-1]
    assert note.startswith("On a mesh of explicit axes a function must not close over arrays")
    assert "pass them as arguments" in note


# Inside a `shard_map`


@pytest.mark.parametrize("check_vma", [True, False])
def test_local_sums_in_a_shard_map(check_vma: bool, on_one_device: Any) -> None:
    placement = PLACEMENTS["data_seq"]
    axes = tuple(placement.mesh)

    def local(case: Case) -> Any:
        by_token, summed = both_strategies(case)
        totals = [lax.psum(loss, axes) for (loss, _), _ in (by_token, summed)]
        hidden, weight, bias, weights, _ = zip(by_token[1], summed[1], strict=True)
        # Where replication is checked the gradient of what is the same everywhere is a sum already.
        heads = (weight, bias) if check_vma else lax.psum((weight, bias), axes)
        return totals, hidden, weights, heads, by_token[0][1].predictions

    specs = Case(placement.tokens, P(), P(), placement.tokens, placement.tokens)
    out_specs = (P(), placement.tokens, placement.tokens, P(), placement.tokens)
    mapped = jax.shard_map(
        local,
        mesh=mesh_of(placement, AUTO),
        in_specs=(specs,),
        out_specs=out_specs,
        check_vma=check_vma,
    )
    compiled, program = compile_for(jax.jit(mapped), make_case())
    losses = [loss for (loss, _), _ in on_one_device]
    predictions = on_one_device[0][0][1].predictions
    gradients = zip(*(gradients for _, gradients in on_one_device), strict=True)
    hidden, weight, bias, weights, _ = gradients
    expected = (losses, hidden, weights, (weight, bias), predictions)
    assert_same(compiled(make_case()), expected)
    assert_no_collective_in_loops(program)


# Wrong meshes and sizes

TENSOR_MESH = {"data": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("sharding", "batch", "seq", "vocab", "message"),
    [
        (
            {"batch": "data"},
            3,
            4,
            8,
            r"`batch` must be a multiple of the 2 .*'data'; got 3\. Choose",
        ),
        ({"seq": ("data", "tensor")}, 2, 4, 8, r"`seq` .* 8 .*'data' · 'tensor'; got 4\. Pad"),
        ({"vocab": "tensor"}, 2, 4, 10, r"`vocab` .* 4 .*'tensor'; got 10\. Pad the head"),
    ],
)
def test_sizes_that_cannot_be_split(
    sharding: dict[str, Any], batch: int, seq: int, vocab: int, message: str
) -> None:
    mesh = mesh_of(Placement(TENSOR_MESH, P()), AUTO)
    head = LinearHead(jnp.ones((vocab, EMBED)), sharding=HeadSharding(mesh, **sharding))
    hidden_states, target_ids = jnp.ones((batch, seq, EMBED)), jnp.zeros((batch, seq), jnp.int32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden_states, head, target_ids)
    with pytest.raises(ValueError, match=message):
        summed_linear_cross_entropy(hidden_states, head, target_ids, jnp.ones((batch, seq)))


def loss_under(sharding: HeadSharding) -> jax.Array:
    head = LinearHead(jnp.ones((8, EMBED)), sharding=sharding)
    weights = jnp.ones((8, 4))
    hidden_states, target_ids = jnp.ones((8, 4, EMBED)), jnp.zeros((8, 4), jnp.int32)
    return summed_linear_cross_entropy(hidden_states, head, target_ids, weights).loss


def test_meshes_that_do_not_fit() -> None:
    mesh = mesh_of(Placement(TENSOR_MESH, P()), AUTO)
    other = mesh_of(PLACEMENTS["data"], AUTO)
    with pytest.raises(
        ValueError, match=r"no mesh is set; got `mesh=None`.*`with jax.set_mesh\(mesh\):`"
    ):
        loss_under(HeadSharding(batch="data"))
    with jax.set_mesh(other):
        with pytest.raises(
            ValueError, match=r"set by `jax.set_mesh` has .*'data'; 'tensor' is none"
        ):
            loss_under(HeadSharding(vocab="tensor"))
        with pytest.raises(ValueError, match=r"`mesh` .* must be the one set .*Leave `mesh` out"):
            loss_under(HeadSharding(mesh, batch="data"))
    with pytest.raises(ValueError, match="'tensor' is none of them"):
        HeadSharding(other, vocab="tensor")
    with pytest.raises(ValueError, match="'data' is named twice"):
        HeadSharding(other, batch="data", seq="data")
    mapped = jax.shard_map(
        lambda: loss_under(HeadSharding(batch="data")), mesh=mesh, in_specs=(), out_specs=P()
    )
    with pytest.raises(ValueError, match=r"`sharding` .*'data'.* mapped already. Leave `sharding`"):
        mapped()


# All depths of a block

# Unlike the head's, so that gradients can be told apart by size.
EMBEDDING_ROWS = VOCAB + 8


class PointwiseLayer(AbstractDecoderLayer):
    """A layer without attention: what moves in a program is not of its making."""

    norm: RMSNorm
    kernel: jax.Array

    def __init__(self, *, key: jax.Array):
        self.norm = RMSNorm(EMBED)
        self.kernel = jax.random.normal(key, (EMBED, EMBED)) / math.sqrt(EMBED)

    def __call__(self, hidden_states: jax.Array, **_: Any) -> jax.Array:
        return hidden_states + jnp.tanh(self.norm(hidden_states) @ self.kernel)


class HeadDecoder(AbstractDecoder):
    embedding: jax.Array
    head: LinearHead

    def embed(self, input_ids: jax.Array, position_ids: jax.Array) -> jax.Array:
        return self.embedding[input_ids]

    def __call__(self, input_ids: jax.Array, *, position_ids: jax.Array, **_: Any) -> jax.Array:
        return self.embed(input_ids, position_ids)

    def final_norm(self, hidden_states: jax.Array) -> jax.Array:
        return hidden_states * lax.rsqrt(jnp.mean(hidden_states**2, axis=-1, keepdims=True))

    def output_head(self) -> LinearHead:
        return self.head


def block_loss_and_gradients(
    case: Case, segment_ids: jax.Array, embedding: jax.Array, *, block: Any, **options: Any
) -> Any:
    """Of a block of two depths, over packed documents, under an objective not the default."""
    block_arrays, block_rest = eqx.partition(block, eqx.is_array)

    def loss(differentiable: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        hidden_states, weight, bias, embedding, block_arrays = differentiable
        head = LinearHead(weight, bias, token_tile=TOKEN_TILE, vocab_tile=VOCAB_TILE, **options)
        decoder = HeadDecoder(embedding, head)
        targets = align_targets(
            case.target_ids, case.target_ids, num_depths=2, segment_ids=segment_ids
        )
        block = eqx.combine(block_arrays, block_rest)
        objective = partial(calculate_mtp_loss, reduction="mean_of_depths")
        output = block(
            decoder,
            hidden_states,
            targets,
            segment_ids=segment_ids,
            z_loss_weight=Z_LOSS_WEIGHT,
            objective=objective,
        )
        return objective(output.losses), (output.losses, output.acceptance)

    differentiable = (case.hidden_states, case.weight, case.bias, embedding, block_arrays)
    return jax.value_and_grad(loss, has_aux=True)(differentiable)


@pytest.mark.parametrize(
    ("name", "sharded_head"),
    [
        ("data_seq", False),
        ("data_seq", True),
        ("vocab", True),
    ],
)
def test_block(name: str, sharded_head: bool) -> None:
    placement, case = PLACEMENTS[name], make_case()
    mesh = mesh_of(placement, AUTO)
    rng = np.random.default_rng(1)
    segment_ids = np.sort(rng.integers(0, 6, (BATCH, SEQ)).astype(np.int32))
    embedding = jnp.asarray(rng.standard_normal((EMBEDDING_ROWS, EMBED)), jnp.float32)
    block = MultiTokenPredictionBlock(
        MTPConfig(num_depths=2), PointwiseLayer, embed_size=EMBED, key=jax.random.key(0)
    )
    expected = jax.jit(partial(block_loss_and_gradients, block=block))(
        case, jnp.asarray(segment_ids), embedding
    )
    sharding = HeadSharding(mesh, **placement.sharding) if sharded_head else None
    function = jax.jit(partial(block_loss_and_gradients, block=block, sharding=sharding))
    with jax.set_mesh(mesh):
        segment_ids = jax.device_put(segment_ids, NamedSharding(mesh, placement.tokens))
        arguments = (place(case, placement, mesh), segment_ids, embedding)
        compiled, program = compile_for(function, *arguments)
        results = compiled(*arguments)
    assert_same(results, expected)
    assert_nothing_is_gathered(program, allowed=FSDP_HEAD if name.startswith("fsdp") else ())
    if sharded_head:
        # The layers are scanned over depths: their gradients and the embedding's are summed there.
        parameters = {x.size for x in jax.tree.leaves((block, embedding)) if eqx.is_array(x)}
        per_depth = parameters | {size // 2 for size in parameters}
        in_loop = {size for c in collectives(program) if c.in_loop for size in c.sizes}
        assert in_loop <= per_depth
