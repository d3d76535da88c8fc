"""Pictures of the alignment, of losses and of acceptance; needs the extra `train`.

    from equinox_mtp import plot
    plot.alignment(batch.align(num_depths=2), to_text=chr)

Each function draws into `ax=`, or into a new figure, and returns the axes: titles, limits and
labels can be changed afterwards as in any picture of matplotlib.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "`equinox_mtp.plot` needs matplotlib. Install the extra `train`, in the repository by: "
        "pip install -e '.[train]'",
        name=error.name,
    ) from error

from ._acceptance import (
    acceptance as acceptance,
    joint_acceptance as joint_acceptance,
)
from ._alignment import alignment as alignment
from ._losses import losses as losses
from ._routers import router_load as router_load
