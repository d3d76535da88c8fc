"""Prediction depths of dense models as the library transformers has them: `num_mtp_layers`."""

from typing import Any

from ._steps import Kernel
from ._tables import MTPTable, Tensor

COUNT_KEY = "num_mtp_layers"

_CONFIG: dict[str, Any] = {
    "concat_order": "embedding_first",
    "input_hidden_state": "after_norm",
    "carried_hidden_state": "after_norm",
    "output_norm": "own",
}


def transformers_table(num_depths: int) -> MTPTable:
    """A single depth has names of its own; several count on from the main model's layers."""
    if num_depths == 1:
        return MTPTable(
            prefix="mtp.",
            table={
                "embedding_norm.scale": Tensor("pre_fc_norm_embedding.weight"),
                "hidden_state_norm.scale": Tensor("pre_fc_norm_hidden.weight"),
                "projection_layer.kernel": Tensor("fc.weight", Kernel()),
                "output_norm.scale": Tensor("norm.weight"),
            },
            config=_CONFIG,
            count_key=COUNT_KEY,
            layer_prefix="layers.{depth}.",
        )
    return MTPTable(
        prefix="model.layers.{layer}.",
        table={
            "embedding_norm.scale": Tensor("enorm.weight"),
            "hidden_state_norm.scale": Tensor("hnorm.weight"),
            "projection_layer.kernel": Tensor("eh_proj.weight", Kernel()),
            "output_norm.scale": Tensor("shared_head.norm.weight"),
        },
        config=_CONFIG,
        count_key=COUNT_KEY,
    )
