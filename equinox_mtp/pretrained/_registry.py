"""All families, in one list."""

from ._dense import LLAMA, MIMO, QWEN2, QWEN3
from ._settings import Settings
from ._tables import Family

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, MIMO)


def family_of(settings: Settings) -> Family:
    """The family that a configuration names.

    **Raises:** `ValueError` for one that is not known.
    """
    named = settings.get("architectures", [])
    named = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for family in FAMILIES:
        if set(family.architectures) & set(named):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ValueError(
        f"{settings.path}: `architectures` must hold one of {known}; got {named!r:.80}. A family "
        "is one table: see `equinox_mtp.pretrained.Family`."
    )


def family_named(name: str) -> Family | None:
    """The family of a name as `layout=` takes it; `None` if there is none."""
    return next((family for family in FAMILIES if family.name == name), None)
