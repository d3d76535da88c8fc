"""Models and batches on many devices: rules, placement, and orders of positions.

The examples are for eight devices:

>>> mesh = emtp.sharding.make_mesh({"data": 2, "fsdp": 4})
>>> rows = emtp.make_batch(np.arange(72).reshape(8, 9) % 32)
"""

from ._context import (
    constrain_hidden_states as constrain_hidden_states,
    current_head_sharding as current_head_sharding,
    use_rules as use_rules,
)
from ._explicit_axes import automatic as automatic
from ._head_sharding import (
    HeadSharding as HeadSharding,
    MeshAxes as MeshAxes,
    constrain as constrain,
)
from ._placement import (
    batch_sharding as batch_sharding,
    constrain_model as constrain_model,
    parameter_shardings as parameter_shardings,
    shard_batch as shard_batch,
    shard_model as shard_model,
)
from ._rules import (
    DEFAULT_RULES as DEFAULT_RULES,
    ShardingRules as ShardingRules,
    make_mesh as make_mesh,
)
from ._zigzag import (
    reorder as reorder,
    restore as restore,
    zigzag_order as zigzag_order,
)
