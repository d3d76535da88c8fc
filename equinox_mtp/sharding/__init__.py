"""Models and batches on many devices: rules, placement, and orders of positions.

The examples are for eight devices:

>>> mesh = emtp.sharding.make_mesh({"data": 2, "fsdp": 4})
>>> rows = emtp.make_batch(np.arange(72).reshape(8, 9) % 32)
"""

from ._context import constrain_hidden_states, current_head_sharding, current_spec, use_rules
from ._explicit_axes import automatic, with_auto_axes
from ._head_sharding import HeadSharding, MeshAxes, constrain, mesh_axis_names
from ._placement import (
    batch_sharding,
    constrain_model,
    parameter_shardings,
    shard_batch,
    shard_model,
)
from ._rules import DEFAULT_RULES, ShardingRules, make_mesh
from ._zigzag import reorder, restore, zigzag_order

__all__ = [
    "DEFAULT_RULES",
    "HeadSharding",
    "MeshAxes",
    "ShardingRules",
    "automatic",
    "batch_sharding",
    "constrain",
    "constrain_hidden_states",
    "constrain_model",
    "current_head_sharding",
    "current_spec",
    "make_mesh",
    "mesh_axis_names",
    "parameter_shardings",
    "reorder",
    "restore",
    "shard_batch",
    "shard_model",
    "use_rules",
    "with_auto_axes",
    "zigzag_order",
]
