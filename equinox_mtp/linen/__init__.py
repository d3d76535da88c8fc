"""MaxText's construction, collections and parameter names over the library's modules.

For people who come from MaxText: nothing of Flax is needed, and nothing is computed here.
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
