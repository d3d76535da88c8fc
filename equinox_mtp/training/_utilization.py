"""How much of what its devices promise a run makes use of."""

import equinox_mtp as emtp

from .._platform import peak_flops
from ._config import TrainConfig
from ._placement import Placement


def full_speed(config: TrainConfig, placement: Placement, model: emtp.MTPModel) -> float | None:
    """Tokens a second if the devices did nothing but the model's operations, at their peak.

    A run's speed over this one is its model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
    `None` where no peak is given or known, as on a CPU and in float32; over a frozen model, most of
    which has no backward pass; and with a draft vocabulary, for which a part of the head is enough.
    """
    peak = config.peak_flops
    if peak is None and config.dtype == "bfloat16":
        peak = peak_flops()
    if peak is None or config.freeze_model or config.draft_vocab is not None:
        return None
    devices = 1 if placement.mesh is None else placement.mesh.size
    return devices * peak / emtp.flops_per_token(model, seq_len=config.seq_len).training


def utilization(tokens_per_second: float | None, full_speed: float | None) -> float | None:
    """The part of the full speed; `None` if one of them is not known."""
    if tokens_per_second is None or full_speed is None:
        return None
    return tokens_per_second / full_speed
