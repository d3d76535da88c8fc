"""Gated DeltaNet: linear attention by a state that decays and is corrected."""

from ._cache import GatedDeltaCache, GatedDeltaInputs
from ._gated_delta_net import GatedDeltaNet
from ._rule import gated_delta_rule

__all__ = ["GatedDeltaCache", "GatedDeltaInputs", "GatedDeltaNet", "gated_delta_rule"]
