"""Draft heads for a model that has none, trained for acceptance.

freeze_model  ─► the depths' parameters, which train │ the main model, which does not
draft_losses  ─► DraftOutput: each depth's divergence from the main model, and how often its
                 drafts are accepted
"""

from ._draft_losses import DraftDivergence, DraftOutput, draft_losses
from ._freeze import freeze_model
from ._start_from_trunk import start_from_trunk

__all__ = [
    "DraftDivergence",
    "DraftOutput",
    "draft_losses",
    "freeze_model",
    "start_from_trunk",
]
