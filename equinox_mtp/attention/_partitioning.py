"""Where attention's arrays lie on a mesh, as the rules in force say."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ..sharding import current_head_sharding, current_spec, mesh_axis_names
from ._tiles import Places


class AttentionSpecs(NamedTuple):
    """The partition spec of queries, keys and values, and the axes over which positions lie."""

    rows: P
    ring: tuple[str, ...]

    @classmethod
    def in_force(cls, query: Array, key: Array) -> "AttentionSpecs | None":
        """Those of the rules and the mesh; `None` where there are none, or inside a `shard_map`.

        Heads are split if a device then has the keys of its queries.

        **Raises:** `ValueError` if rows or positions are no multiple of the devices they are for.
        """
        sharding = current_head_sharding()
        if sharding is None:
            return None
        mesh = jax.sharding.get_abstract_mesh()
        sharding.check_sizes(mesh, dict(zip(("batch", "seq"), query.shape[:2], strict=True)))
        batch, seq, heads, _ = current_spec("batch seq heads head_dim") or (None,) * 4
        *_, kv_heads, _ = current_spec("batch seq kv_heads head_dim") or (None,) * 4
        shards = math.prod(mesh.shape[name] for name in mesh_axis_names(heads))
        if heads != kv_heads or key.shape[2] % shards:
            heads = None
        ring = tuple(name for name in mesh_axis_names(seq) if mesh.shape[name] > 1)
        return cls(P(batch, seq, heads, None), ring)

    def shard_map(self, function: Callable[..., Array], *, check_vma: bool) -> Callable[..., Array]:
        """`function(query, key, value, places)` on each device's part."""
        batch, seq, *_ = self.rows

        def run(query: Array, key: Array, value: Array, places: Places) -> Array:
            def spec(ids: Array) -> P:
                return P(None if ids.shape[0] == 1 else batch, seq)

            of_places = jax.tree.map(spec, places)
            in_specs: Any = (self.rows, self.rows, self.rows, of_places)
            mapped = jax.shard_map(
                function, in_specs=in_specs, out_specs=self.rows, check_vma=check_vma
            )
            return mapped(query, key, value, places)

        return run
