"""Flax's NNX, if the user has loaded it; it is never imported here."""

import sys
from typing import Any


def loaded_nnx() -> Any:
    """The module `flax.nnx`, or `None`."""
    return sys.modules.get("flax.nnx")


def is_nnx_module(kind: Any) -> bool:
    """Whether a class is one of NNX's modules."""
    nnx = loaded_nnx()
    return nnx is not None and isinstance(kind, type) and issubclass(kind, nnx.Module)


def hold_as_data(*kinds: type) -> None:
    """Lets modules of NNX have attributes of these classes, as of their own kind.

    NNX takes an attribute for static unless its class is registered, and refuses arrays in it.
    """
    nnx = loaded_nnx()
    # While Flax is being imported its functions may not be there yet.
    register = getattr(nnx, "register_data_type", None)
    if register is not None:
        for kind in kinds:
            register(kind)
