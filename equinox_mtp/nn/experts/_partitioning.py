"""Where tokens and experts lie on a mesh, as the rules in force say."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ..._types import module_of
from ...sharding import current_head_sharding, current_spec, mesh_axis_names


class ExpertSpecs(NamedTuple):
    """The mesh axes over which rows, positions, experts and their inner features are split."""

    batch: tuple[str, ...]
    seq: tuple[str, ...]
    experts: tuple[str, ...]
    mlp: tuple[str, ...]

    @classmethod
    def in_force(cls, x: Array, num_experts: int, mlp_size: int) -> "ExpertSpecs | None":
        """Those of the rules and the mesh; `None` where there are none, or inside a `shard_map`.

        Tokens that the rules split over devices of different experts come together there.

        **Raises:** `ValueError` if a size is no multiple of the devices that share it.
        """
        sharding = current_head_sharding()
        if sharding is None:
            return None
        mesh = jax.sharding.get_abstract_mesh()
        sharding.check_sizes(mesh, dict(zip(("batch", "seq"), x.shape[:2], strict=True)))
        batch, seq, *_ = current_spec("batch seq embed") or (None, None)
        experts, _, mlp = current_spec("experts _ mlp") or (None,) * 3
        experts, mlp = mesh_axis_names(experts), mesh_axis_names(mlp)
        for word, axes, size in (("experts", experts, num_experts), ("mlp", mlp, mlp_size)):
            devices = math.prod(mesh.shape[name] for name in axes)
            if size % devices:
                raise ValueError(
                    f"`{word}` of a mixture of experts must be a multiple of the {devices} devices "
                    f"over which the mesh splits it, by {' · '.join(map(repr, axes))}; got {size}. "
                    f"Choose other sizes, or `rules.replace({word}=None)`."
                )
        taken = {*experts, *mlp}
        batch, seq = (
            tuple(name for name in mesh_axis_names(axes) if name not in taken)
            for axes in (batch, seq)
        )
        return cls(batch, seq, experts, mlp)

    @property
    def summed(self) -> tuple[str, ...]:
        """The axes over which each device has a part of every token's output."""
        return (*self.experts, *self.mlp)

    def shard_map(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(x, router, experts)` on each device's tokens and its part of the experts."""
        tokens = P(self.batch or None, self.seq or None)
        inner, outer = (
            P(self.experts or None, None, self.mlp or None),
            P(self.experts or None, self.mlp or None),
        )

        def run(x: Array, router: Any, experts: Any) -> Any:
            of_router = jax.tree.map(lambda _: P(), router)
            of_experts = module_of(type(experts), gate=inner, up=inner, down=outer)
            mapped = jax.shard_map(
                function, in_specs=(tokens, of_router, of_experts), out_specs=tokens
            )
            return mapped(x, router, experts)

        return run
