"""Token embeddings, on one device and split over many."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, DTypeLike, Float, Integer

from .._types import checked
from ..sharding import HeadSharding, constrain, current_head_sharding


@checked
def embed_tokens(
    embedding: Float[Array, "vocab embed"],
    input_ids: Integer[Array, "batch seq"],
    *,
    dtype: DTypeLike | None = None,
    sharding: HeadSharding | None = None,
) -> Float[Array, "batch seq embed"]:
    """Looks tokens up: `embedding[input_ids]`.

    On a mesh every device keeps to its own part of the embedding. Devices that split the
    features and have different rows tell one another their ids, look all of them up, and exchange
    what they found: an all-to-all of the `batch seq embed` numbers of one device. Over a split
    vocabulary what was found is summed. The gradient takes the same way back.

    >>> print(emtp.nn.embed_tokens(10 * jnp.eye(3), jnp.asarray([[2, 0]])))
    [[[ 0.  0. 10.]
      [10.  0.  0.]]]

    **Arguments:**

    - `embedding`: one row for each token id; rows are split over `sharding.vocab`, and features
        over `sharding.embed`.
    - `input_ids`: in `[0, vocab)`. An id outside is looked up as the nearest that is inside,
        however the embedding is split: inside `jit` nothing can be raised.
    - `dtype`: of the result; `embedding`'s own if `None`.
    - `sharding`: where things lie on a mesh; by default as the rules of `sharding.use_rules` say.
        Inside a `shard_map`, or where no mesh is known, it is ignored.

    **Returns:** one embedding for each token, split as `input_ids` are.

    **Raises:** `ValueError` if a size is no multiple of the devices that share it, or the mesh that
    is set is not the one of `sharding`.
    """
    dtype = jnp.dtype(embedding.dtype if dtype is None else dtype)
    wide = input_ids.astype(jnp.promote_types(input_ids.dtype, jnp.int32))
    input_ids = jnp.clip(wide, 0, embedding.shape[0] - 1).astype(jnp.int32)
    sharding = current_head_sharding() if sharding is None else sharding
    mesh = None if sharding is None else sharding.active_mesh()
    if sharding is None or mesh is None:
        return embedding[input_ids].astype(dtype)
    vocab, embed = embedding.shape
    batch, seq = input_ids.shape
    sharding.check_sizes(mesh, {"vocab": vocab, "embed": embed, "batch": batch, "seq": seq})
    vocab_axes = sharding.vocab_axes
    # Features that are split over devices with the same rows are put together beforehand.
    exchanged = tuple(axis for axis in sharding.embed_axes if axis in sharding.batch_axes)

    def look_up(embedding: Array, ids: Array) -> Array:
        for axis in exchanged:
            ids = lax.all_gather(ids, axis, axis=0, tiled=True)
        found = _rows(embedding, ids, vocab_axes).astype(dtype)
        for axis in reversed(exchanged):
            found = lax.all_to_all(found, axis, split_axis=0, concat_axis=2, tiled=True)
        return lax.psum(found, vocab_axes) if vocab_axes else found

    specs = P(sharding.vocab, exchanged or None), sharding.spec("batch seq")
    arrays = (
        constrain(array, NamedSharding(mesh, spec))
        for array, spec in zip((embedding, input_ids), specs, strict=True)
    )
    out_specs = sharding.spec("batch seq embed")
    return jax.shard_map(look_up, mesh=mesh, in_specs=specs, out_specs=out_specs)(*arrays)


def _rows(embedding: Array, ids: Array, vocab_axes: tuple[str, ...]) -> Array:
    """The rows of these ids, and zeros for those that other devices have."""
    if not vocab_axes:
        return embedding[ids]
    rows = embedding.shape[0]
    ids = ids - lax.axis_index(vocab_axes) * rows
    is_here = (ids >= 0) & (ids < rows)
    return jnp.where(is_here[..., None], embedding[jnp.where(is_here, ids, 0)], 0)
