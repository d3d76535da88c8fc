"""MaxText's construction, collections and parameter names over the library's modules.

For people who come from MaxText: nothing of Flax is needed, and nothing is computed here.
"""

from ._collections import (
    calculate_mtp_acceptance_rate as calculate_mtp_acceptance_rate,
    calculate_mtp_loss as calculate_mtp_loss,
    mtp_acceptance as mtp_acceptance,
    mtp_losses as mtp_losses,
)
from ._linen_block import (
    BoundBlock as BoundBlock,
    LinenBlock as LinenBlock,
    multi_token_prediction_block_as_linen as multi_token_prediction_block_as_linen,
)
from ._modules import (
    MultiTokenPredictionBlock as MultiTokenPredictionBlock,
    MultiTokenPredictionLayer as MultiTokenPredictionLayer,
)
from ._params import (
    decoder_params as decoder_params,
    from_linen_params as from_linen_params,
    to_linen_params as to_linen_params,
    with_decoder_params as with_decoder_params,
)
from ._shift import (
    roll_and_mask as roll_and_mask,
    roll_and_mask_by_segment as roll_and_mask_by_segment,
)
