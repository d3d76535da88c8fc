"""MaxText's construction, collections and parameter names over the library's modules.

For people who come from MaxText: nothing of Flax is needed, and nothing is computed here.

The examples of this package begin with these:

>>> from types import SimpleNamespace
>>> from equinox_mtp import linen
>>> settings = SimpleNamespace(  # any object with MaxText's attributes
...     mtp_num_layers=2, mtp_loss_scaling_factor=0.1, mtp_eval_target_module=1,
...     emb_dim=16, mlp_dim=32, num_query_heads=2, num_kv_heads=2, head_dim=8,
...     normalization_layer_epsilon=1e-5, dtype="float32", weight_dtype="float32",
... )
>>> linen_block = linen.multi_token_prediction_block_as_linen(
...     config=settings, mesh=None, transformer_layer_module=emtp.nn.TransformerDecoderLayer,
...     decoder=decoder, rngs=None, name="mtp_block",
... )
>>> variables = linen_block.init(jax.random.key(0))
>>> ids = jnp.arange(18).reshape(2, 9)
>>> arguments = {
...     "shared_embedding": None, "main_hidden_state": jnp.ones((2, 8, 16)),
...     "input_ids": ids[:, :-1], "target_ids": ids[:, 1:], "target_mask": None,
...     "position_ids": jnp.tile(jnp.arange(8), (2, 1)), "decoder_segment_ids": None,
...     "model_mode": "train", "deterministic": True,
... }
>>> _, collections = linen_block.apply(variables, **arguments, mutable=True)
"""

from ._collections import (
    calculate_mtp_acceptance_rate,
    calculate_mtp_loss,
    mtp_acceptance,
    mtp_losses,
)
from ._linen_block import BoundBlock, LinenBlock, multi_token_prediction_block_as_linen
from ._modules import MultiTokenPredictionBlock, MultiTokenPredictionLayer
from ._params import decoder_params, from_linen_params, to_linen_params, with_decoder_params
from ._shift import roll_and_mask, roll_and_mask_by_segment

__all__ = [
    "BoundBlock",
    "LinenBlock",
    "MultiTokenPredictionBlock",
    "MultiTokenPredictionLayer",
    "calculate_mtp_acceptance_rate",
    "calculate_mtp_loss",
    "decoder_params",
    "from_linen_params",
    "mtp_acceptance",
    "mtp_losses",
    "multi_token_prediction_block_as_linen",
    "roll_and_mask",
    "roll_and_mask_by_segment",
    "to_linen_params",
    "with_decoder_params",
]
