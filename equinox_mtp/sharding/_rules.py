"""Which axis of an array lies on which axis of a mesh, as data."""

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec as P

from .._types import checked
from ._head_sharding import HeadSharding, MeshAxes, mesh_axis_names

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")
"""The mesh axes of the default rules; a mesh may lack some of them."""

UNSPLIT = "_"
"""The axis word of an array axis that is never split."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """A table from axis words and parameter names to mesh axes.

    Most parameters say in their annotation which axes they have: `Float[Array, "vocab embed"]`.
    `parameters` says it for the others, and overrules it. Axes in front of those named, over which
    layers are stacked, are not split; nor is an axis if the mesh has none of its mesh axes, or if
    an axis before it in the same array has them already.

    >>> rules = emtp.sharding.DEFAULT_RULES.replace(vocab="fsdp", embed=None)
    >>> rules.spec("vocab embed", mesh) == jax.P("fsdp", None)
    True

    **Fields:**

    - `axes`: from axis words to the mesh axis, or axes, over which they are split, or `None`. Words
        that are not in it are not split.
    - `parameters`: from the ends of parameter names, as `"gate.kernel"`, to their axis words,
        `"embed mlp"`; `"_"` is an axis that is not split. Of several that fit the longest counts.

    **Raises:** `ValueError` where mesh and rules do not know each other's axes, a rule of one's own
    fits no parameter, or an array axis is no multiple of the devices that share it: not here, but
    in the functions that use the rules.
    """

    axes: Mapping[str, MeshAxes]
    parameters: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", dict(self.axes))
        object.__setattr__(self, "parameters", dict(self.parameters))

    def __repr__(self) -> str:
        # Short where it is the default value of an argument.
        if self == DEFAULT_RULES:
            return "DEFAULT_RULES"
        return f"ShardingRules(axes={self.axes!r}, parameters={self.parameters!r})"

    def __hash__(self) -> int:
        return hash((frozenset(self.axes.items()), frozenset(self.parameters.items())))

    def replace(
        self, *, parameters: Mapping[str, str] | None = None, **axes: MeshAxes
    ) -> "ShardingRules":
        """The rules with some of them replaced: `rules.replace(vocab=None)`."""
        return ShardingRules({**self.axes, **axes}, {**self.parameters, **(parameters or {})})

    def mesh_axes(self, word: str, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
        """The axes of the mesh over which an axis word is split; empty if over none.

        **Raises:** `ValueError` if the mesh has an axis that no rule names.
        """
        self._check_mesh(mesh)
        return tuple(
            name for name in mesh_axis_names(self.axes.get(word)) if name in mesh.axis_names
        )

    def spec(self, axis_words: str, mesh: Mesh | AbstractMesh) -> P:
        """The partition spec of an array with these axis words, `"batch seq"` for instance."""
        used: set[str] = set()
        parts: list[str | tuple[str, ...] | None] = []
        for word in axis_words.split():
            names = tuple(n for n in self.mesh_axes(word, mesh) if n not in used)
            used.update(names)
            parts.append(names[0] if len(names) == 1 else names or None)
        return P(*parts)

    def head_sharding(self, mesh: Mesh | AbstractMesh) -> HeadSharding:
        """Where hidden states, embedding and output head lie: what `use_rules` makes of a mesh."""
        batch, seq, vocab, embed = (
            self.mesh_axes(word, mesh) or None for word in ("batch", "seq", "vocab", "embed")
        )
        if embed and vocab:
            embed = tuple(name for name in embed if name not in vocab) or None
        return HeadSharding(batch=batch, seq=seq, vocab=vocab, embed=embed)

    def num_shards(self, word: str, mesh: Mesh | AbstractMesh) -> int:
        """Into how many parts an axis word is split."""
        return math.prod(mesh.shape[name] for name in self.mesh_axes(word, mesh))

    def _check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        known = sorted({name for axes in self.axes.values() for name in mesh_axis_names(axes)})
        for word, axes in self.axes.items():
            for name in mesh_axis_names(axes):
                if name not in MESH_AXES and name not in mesh.axis_names:
                    raise ValueError(
                        f"`rules` splits {word!r} over {name!r}, which is no axis of `mesh`, "
                        f"{mesh.axis_names}, nor one of those it may lack, {MESH_AXES}."
                    )
        for name in mesh.axis_names:
            if name not in known and mesh.shape[name] > 1:
                raise ValueError(
                    f"`mesh` has an axis {name!r} that no rule in `rules` names; they name "
                    f"{', '.join(map(repr, known))}. Name the mesh's axes so, or add a rule: "
                    f"`rules.replace(batch={name!r})`, for instance."
                )


DEFAULT_RULES = ShardingRules(
    axes={
        "batch": ("data", "fsdp"),
        "seq": "context",
        "embed": "fsdp",
        "vocab": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "experts": "expert",
    },
    parameters={
        "gate.kernel": "embed mlp",
        "up.kernel": "embed mlp",
        "down.kernel": "mlp embed",
        "projection_layer.kernel": "embed _",
        "router.kernel": "embed _",
        "router.bias": "_",
        "shared_gate.kernel": "embed _",
        "scale": "_",
    },
)
"""Those of this library's own modules.

Rows are split over `data` and `fsdp`, positions over `context`; parameters over `fsdp` along their
features, over `tensor` along heads, feed-forward features and token ids, and over `expert` along
experts. The tables are
`DEFAULT_RULES.axes` and `DEFAULT_RULES.parameters`.
"""


@checked
def make_mesh(sizes: Mapping[str, int], *, axis_type: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of all devices with these axes, outermost first: `make_mesh({"data": 2, "fsdp": 4})`.

    The axes are of `Auto` type, where XLA sees to what the rules leave open; `jax.make_mesh` makes
    `Explicit` ones. Put the axis that communicates most, `tensor`, last: neighbours in the order of
    devices are close.

    >>> mesh = emtp.sharding.make_mesh({"data": 1, "fsdp": 8})
    >>> dict(mesh.shape)
    {'data': 1, 'fsdp': 8}

    **Raises:** `ValueError` if the sizes are not positive, or their product is not the number of
    devices.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`sizes` must be positive; got {size} for {name!r}.")
    total, devices = math.prod(sizes.values()), jax.device_count()
    if total != devices:
        shown = " · ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"`sizes` must multiply to the {devices} device(s) there are; got {shown} = {total}."
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))
