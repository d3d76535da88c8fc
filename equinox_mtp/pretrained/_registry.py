"""All families, and the one that a configuration names."""

from collections.abc import Collection, Sequence

from ._deepseek import DEEPSEEK_V3
from ._dense import LLAMA, MIMO, QWEN2, QWEN3
from ._ernie import ERNIE4_5
from ._exaone import EXAONE_MOE
from ._hybrid import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from ._ling import BAILING_MOE_V2
from ._moe import GLM4_MOE, QWEN3_MOE
from ._settings import Settings
from ._tables import Family

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, QWEN2, QWEN3, ERNIE4_5, MIMO, QWEN3_MOE, GLM4_MOE),
    *(DEEPSEEK_V3, BAILING_MOE_V2, EXAONE_MOE, QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT),
)
"""What `load` and `save` know."""


def family_of(settings: Settings, families: Sequence[Family], names: Collection[str]) -> Family:
    """The first family that has one of a configuration's architectures, named as in its folder.

    `names` are the tensors that there are.

    **Raises:** `ValueError` if there is none.
    """
    named = settings.get("architectures", [])
    named = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for family in families:
        if set(family.architectures) & set(named):
            return family.named_as(names)
    # Of the names of a family, the usual one.
    known = ", ".join(family.architectures[0] for family in families)
    raise ValueError(
        f"{settings.path}: `architectures` must hold one of {known}; got {named!r:.80}. A family "
        "is one table: see `equinox_mtp.pretrained.Family`, and pass it in `families=`."
    )
