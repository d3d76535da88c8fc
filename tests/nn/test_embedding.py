"""Token embeddings that are split over devices, against a NumPy loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick_jit
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from equinox_mtp import HeadSharding, nn
from equinox_mtp.sharding import make_mesh

VOCAB, EMBED, BATCH, SEQ = 24, 16, 8, 6
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
SHARDINGS = {
    "rows_and_features": HeadSharding(batch=("data", "fsdp"), embed="fsdp"),
    "all": HeadSharding(batch=("data", "fsdp"), vocab="tensor", embed="fsdp"),
    "inner_axis_outside": HeadSharding(batch=("fsdp", "data"), vocab="tensor", embed="fsdp"),
    "features_over_two": HeadSharding(batch=("data", "fsdp"), seq="tensor", embed=("data", "fsdp")),
    "features_turned": HeadSharding(batch=("data", "fsdp"), embed=("fsdp", "data")),
    "same_rows": HeadSharding(batch="data", vocab="tensor", embed="fsdp"),
    "vocab_over_two": HeadSharding(batch="data", vocab=("tensor", "fsdp")),
    "positions": HeadSharding(batch="data", seq="fsdp", vocab="tensor"),
}


def make_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(VOCAB, EMBED)).astype(np.float32)
    ids = rng.integers(0, VOCAB, (BATCH, SEQ))
    # The first and the last of the vocabulary, and two that are not in it.
    ids[0, :4] = 0, VOCAB - 1, -3, VOCAB + 5
    return embedding, ids, rng.normal(size=(BATCH, SEQ, EMBED)).astype(np.float32)


def oracle(
    embedding: np.ndarray, ids: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings, and the gradient of their product with a cotangent."""
    found, gradient = np.zeros((*ids.shape, EMBED)), np.zeros(embedding.shape)
    for where, token in np.ndenumerate(np.clip(ids, 0, VOCAB - 1)):
        found[where] = embedding[token]
        gradient[token] += cotangent[where]
    return found, gradient


def look_up(sharding: HeadSharding | None, dtype: Any = None) -> Any:
    def both(embedding: Any, ids: Any, cotangent: Any) -> Any:
        def function(embedding: Any) -> Any:
            return nn.embed_tokens(embedding, ids, dtype=dtype, sharding=sharding)

        found, transpose = jax.vjp(function, embedding)
        return found, transpose(cotangent.astype(found.dtype))[0]

    return both


def placed(sharding: HeadSharding, mesh: Any) -> list[Any]:
    specs = (
        P(sharding.vocab, sharding.embed),
        sharding.spec("batch seq"),
        sharding.spec("batch seq embed"),
    )
    return [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(make_arrays(), specs, strict=True)
    ]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", SHARDINGS)
def test_split_embeddings(name: str, axis_type: AxisType) -> None:
    mesh, sharding = make_mesh(MESH, axis_type=axis_type), SHARDINGS[name]
    with jax.set_mesh(mesh):
        found, gradient = quick_jit(look_up(sharding))(*placed(sharding, mesh))
    expected, expected_gradient = oracle(*make_arrays())
    assert_close(found, expected)
    assert_close(gradient, expected_gradient)
    assert found.sharding.is_equivalent_to(
        NamedSharding(mesh, sharding.spec("batch seq embed")), found.ndim
    )


def test_without_a_mesh_or_a_sharding() -> None:
    expected, expected_gradient = oracle(*make_arrays())
    for sharding in (None, SHARDINGS["all"]):
        found, gradient = look_up(sharding)(*map(jnp.asarray, make_arrays()))
        assert_close(found, expected)
        assert_close(gradient, expected_gradient)
    # A mesh of its own does without `jax.set_mesh`.
    own = HeadSharding(make_mesh(MESH), batch=("data", "fsdp"), vocab="tensor", embed="fsdp")
    found, gradient = quick_jit(look_up(own))(*map(jnp.asarray, make_arrays()))
    assert_close(found, expected)
    assert_close(gradient, expected_gradient)


def test_in_a_shard_map_of_the_users() -> None:
    """Rows are the device's own there, and the embedding is whole."""
    mesh, sharding = make_mesh(MESH), SHARDINGS["all"]
    embedding, ids, _ = make_arrays()
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            lambda embedding, ids: nn.embed_tokens(embedding, ids, sharding=sharding),
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
        found = jax.jit(mapped)(jnp.asarray(embedding), jnp.asarray(ids))
    np.testing.assert_array_equal(found, embedding[np.clip(ids, 0, VOCAB - 1)])


def test_compute_dtype() -> None:
    """Embeddings are rounded once; the gradient is summed in float32."""
    mesh, sharding = make_mesh(MESH), SHARDINGS["all"]
    embedding, ids, cotangent = make_arrays()
    with jax.set_mesh(mesh):
        found, gradient = quick_jit(look_up(sharding, jnp.bfloat16))(*placed(sharding, mesh))
    assert found.dtype == jnp.bfloat16
    inside = np.clip(ids, 0, VOCAB - 1)
    np.testing.assert_array_equal(found, jnp.asarray(embedding, jnp.bfloat16)[inside])
    rounded = np.asarray(jnp.asarray(cotangent, jnp.bfloat16), np.float32)
    assert_close(gradient, oracle(embedding, ids, rounded)[1])


def test_over_depths() -> None:
    """As the block has it: in a `jax.vmap`."""
    mesh, sharding = make_mesh(MESH), SHARDINGS["all"]
    embedding, ids, _ = placed(sharding, mesh)
    depths = jnp.stack([ids, VOCAB - 1 - ids])
    with jax.set_mesh(mesh):
        mapped = jax.vmap(lambda ids: nn.embed_tokens(embedding, ids, sharding=sharding))
        found = jax.jit(mapped)(depths)
    inside = np.clip(np.asarray(depths), 0, VOCAB - 1)
    np.testing.assert_array_equal(found, np.asarray(embedding)[inside])


@pytest.mark.parametrize(
    ("embedding", "ids", "message"),
    [
        ((VOCAB, EMBED), (6, SEQ), "`batch` must be a multiple of the 4 devices"),
        ((VOCAB + 1, EMBED), (8, SEQ), "`vocab` must be a multiple of the 2 devices"),
        ((VOCAB, EMBED + 1), (8, SEQ), r"`embed` must be a multiple of the 2 devices.*got 17"),
    ],
)
def test_sizes_that_do_not_fit(embedding: Any, ids: Any, message: str) -> None:
    with (
        jax.set_mesh(make_mesh(MESH)),
        pytest.raises(ValueError, match=message),
    ):
        nn.embed_tokens(jnp.zeros(embedding), jnp.zeros(ids, int), sharding=SHARDINGS["all"])


def test_axes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"`vocab` and `embed` must be .*'tensor' is named twice"):
        HeadSharding(vocab="tensor", embed="tensor")
    for sharding, message in (
        (HeadSharding(batch="fsdp"), r"set by `jax.set_mesh` has the axes 'data'; 'fsdp' is none"),
        (HeadSharding(make_mesh(MESH)), r"`mesh` of `HeadSharding` must be the one set by"),
    ):
        with (
            jax.set_mesh(make_mesh({"data": 8})),
            pytest.raises(ValueError, match=message),
        ):
            nn.embed_tokens(jnp.zeros((8, 8)), jnp.zeros((8, 8), int), sharding=sharding)
    with pytest.raises(ValueError, match=r"`mesh` has the axes .*; 'model' is none of them"):
        HeadSharding(make_mesh(MESH), embed="model")
