"""Where hidden states, embedding and output head lie on a mesh."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

MeshAxes: TypeAlias = str | tuple[str, ...] | None
"""The mesh axis, or axes, over which an array axis is split; `None` if it is not."""

_HOW_TO_SPLIT: Mapping[str, str] = {
    "batch": "Choose a batch that is a multiple of it, or split it over fewer mesh axes.",
    "seq": "Pad the rows to a multiple of it, or split them over fewer mesh axes.",
    "embed": "Choose features that are a multiple of it, or split them over fewer mesh axes.",
    "vocab": "Pad the head with rows of a very negative bias, or split it over fewer mesh axes.",
}


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """Where hidden states, embedding and output head lie on a mesh.

    With it the loss runs in a `shard_map`: every device works on its own tokens and its own part of
    the vocabulary, and devices exchange results once, outside of all loops: the head, if it lies
    otherwise, and its gradient, summed over devices; and over a split vocabulary three or four
    numbers a token, and the hidden states' gradient.

    Without it the loss is right too, and no hidden state or logit moves between devices that each
    hold some of the tokens; but every device gets the whole head, and its gradient is summed over
    devices in each tile. Set the mesh with `jax.set_mesh` then: on a mesh of `Auto` axes that is
    not set a tile is `token_tile` tokens of *all* devices, and a split head is gathered by tiles.

    Both ways take meshes of `Auto` and of `Explicit` axes. Explicit axes are automatic within the
    loss; losses of tokens come back sharded as the target ids are, and gradients as what they are
    gradients of. A head that is a callable must then be a pytree of its arrays.

    Inside a `shard_map` of your own leave it out: the loss is then a sum over the device's own
    tokens, for you to add up. The gradient of a head that is the same on all devices is a sum over
    them already if `check_vma` is on, as JAX has it, and each device's part otherwise.

    >>> sharding = emtp.HeadSharding(batch=("data", "fsdp"), vocab="tensor")
    >>> head = emtp.LinearHead(jnp.ones((32, 16)), sharding=sharding)
    >>> sharding.spec("batch seq embed") == jax.P(("data", "fsdp"), None, None)
    True

    **Fields:**

    - `mesh`: the mesh; `None` takes the one set by `jax.set_mesh`.
    - `batch`, `seq`: mesh axes over which tokens are split.
    - `vocab`: mesh axes over which the head's rows, and so the logits, are split.
    - `embed`: mesh axes over which the embedding's features are split, for `nn.embed_tokens`. The
        loss puts a head together that is split so.

    **Raises:** `ValueError` if an axis is named twice or is none of the mesh; in the loss, if there
    is no mesh, or another than that set by `jax.set_mesh`, or if a size is no multiple of the
    number of devices that share it.
    """

    mesh: Mesh | AbstractMesh | None = None
    batch: MeshAxes = None
    seq: MeshAxes = None
    vocab: MeshAxes = None
    embed: MeshAxes = None

    def __post_init__(self) -> None:
        for names, words in (
            ((*self.token_axes, *self.vocab_axes), "`batch`, `seq` and `vocab`"),
            ((*self.vocab_axes, *self.embed_axes), "`vocab` and `embed`"),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(
                        f"{words} must be split over different mesh axes; {name!r} is named twice."
                    )
        if self.mesh is not None:
            self._check_axes(self.mesh, "`mesh` has")

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which rows are split."""
        return mesh_axis_names(self.batch)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes over which tokens are split."""
        return (*self.batch_axes, *mesh_axis_names(self.seq))

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the vocabulary is split."""
        return mesh_axis_names(self.vocab)

    @property
    def embed_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the embedding's features are split."""
        return mesh_axis_names(self.embed)

    def spec(self, axis_words: str) -> P:
        """The partition spec of an array with these axis words."""
        split = {"batch": self.batch, "seq": self.seq, "vocab": self.vocab}
        return P(*(split.get(word) for word in axis_words.split()))

    def active_mesh(self) -> Mesh | AbstractMesh | None:
        """The mesh on which arrays lie; `None` inside a `shard_map`, or if no mesh is known.

        **Raises:** `ValueError` if the mesh that is set is not `mesh`.
        """
        current = jax.sharding.get_abstract_mesh()
        if current.manual_axes:
            return None
        if current.empty:
            return self.mesh
        self.check_current_mesh(current)
        return current

    def check_current_mesh(self, current: AbstractMesh) -> None:
        """**Raises:** `ValueError` if the mesh that is set is not `mesh`, or lacks an axis."""
        mesh = self.mesh
        if mesh is not None and mesh.shape_tuple != current.shape_tuple:
            raise ValueError(
                "`mesh` of `HeadSharding` must be the one set by `jax.set_mesh`, "
                f"{current.shape}; got {mesh.shape}. Leave `mesh` out to take that one."
            )
        self._check_axes(current, "the mesh set by `jax.set_mesh` has")

    def check_sizes(self, mesh: Mesh | AbstractMesh, sizes: Mapping[str, int]) -> None:
        """**Raises:** `ValueError` if a size is no multiple of the devices that share it."""
        for word, mend in _HOW_TO_SPLIT.items():
            axes = mesh_axis_names(getattr(self, word))
            devices = math.prod(mesh.shape[axis] for axis in axes)
            if sizes.get(word, 0) % devices:
                raise ValueError(
                    f"`{word}` must be a multiple of the {devices} devices over which the mesh "
                    f"splits it, by {' · '.join(map(repr, axes))}; got {sizes[word]}. {mend}"
                )

    def _check_axes(self, mesh: Mesh | AbstractMesh, whose: str) -> None:
        for name in (*self.token_axes, *self.vocab_axes, *self.embed_axes):
            if name not in mesh.axis_names:
                known = ", ".join(repr(axis) for axis in mesh.axis_names)
                raise ValueError(f"{whose} the axes {known}; {name!r} is none of them.")


def constrain(array: Array, sharding: NamedSharding) -> Array:
    """Lays an array on a mesh, whether its axes are of `Auto` or of `Explicit` type.

    >>> sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    >>> rows_of_two = jax.jit(lambda x: emtp.sharding.constrain(x, sharding))(jnp.ones((8, 3)))
    >>> rows_of_two.sharding.shard_shape((8, 3))
    (2, 3)
    """
    if sharding.mesh.explicit_axes:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def mesh_axis_names(axes: MeshAxes) -> tuple[str, ...]:
    """One mesh axis, several or none, as a tuple.

    >>> emtp.sharding.mesh_axis_names("data"), emtp.sharding.mesh_axis_names(None)
    (('data',), ())

    **Arguments:**

    - `axes`: the name of a mesh axis, a tuple of names, or `None`.

    **Returns:** the names, outermost first; an empty tuple for `None`.
    """
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
