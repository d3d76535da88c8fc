"""A mixture of experts, its router, and what keeps the experts balanced."""

from ._balancing import router_statistics_in, update_router_biases
from ._mixture import Experts, MixtureOfExperts
from ._router import Router, Routing
from ._statistics import RouterStatistics, router_statistics, update_router_bias

__all__ = [
    "Experts",
    "MixtureOfExperts",
    "Router",
    "RouterStatistics",
    "Routing",
    "router_statistics",
    "router_statistics_in",
    "update_router_bias",
    "update_router_biases",
]
