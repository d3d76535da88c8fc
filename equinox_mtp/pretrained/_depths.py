"""Which prediction depths a folder has: its own, or fresh ones in their place."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from .._block import MultiTokenPredictionBlock
from .._checks import check_choice, check_integer
from .._config import MTPConfig, Preset
from ._places import conventions
from ._settings import COMPUTE_DTYPE, HINTS, Settings, errors_of
from ._shapes import make_block
from ._tables import Family, MTPTable
from ._transformers import COUNT_KEY, transformers_table

Tree = TypeVar("Tree")

_DTYPES = ("float32", "bfloat16", "float16")
_MOST_DEPTHS = 1000


def check_options(
    dtype: str | None, compute_dtype: str | None, preset: Preset | None, num_depths: int | None
) -> None:
    if dtype is not None:
        check_choice("dtype", dtype, _DTYPES)
    if compute_dtype is not None:
        check_choice("compute_dtype", compute_dtype, ("float32", "bfloat16"))
    if preset is not None and not num_depths:
        raise ValueError(
            f"`preset` is for fresh depths, and needs `num_depths` of at least 1; got {preset!r} "
            f"and {num_depths}. Say how many to make, or leave `preset` out for its own."
        )


def own_depths(
    settings: Settings, family: Family, names: Collection[str]
) -> tuple[MTPTable, MTPConfig]:
    """The tables and conventions of a folder's own depths; `names` are the tensors there are."""
    mtp = family.mtp
    if mtp is None:
        num_depths = settings.integer(COUNT_KEY, 0, at_least=0)
        mtp = transformers_table(num_depths)
    num_depths = _count(settings, mtp, names)
    if mtp.is_single and num_depths > 1:
        raise settings.error(mtp.count_key, "0 or 1: this layout holds one depth", num_depths)
    if not num_depths:
        return mtp, MTPConfig(num_depths=0)
    hints = {name: x for name, x in settings.hints.items() if name != COMPUTE_DTYPE}
    with errors_of(settings):
        config = conventions(mtp, **{"num_depths": num_depths, **hints})
        num_layers = 1 if config.repeated_layer else config.num_depths
        if num_layers != num_depths or config.num_depths > _MOST_DEPTHS:
            raise settings.error(HINTS, f"of {num_depths} layer(s)", hints)
        return mtp, config


def depth_prefixes(settings: Settings, mtp: MTPTable, names: Collection[str]) -> list[str]:
    """What the names of a folder's own depths begin with."""
    num_layers = settings.integer("num_hidden_layers")
    depths = range(_count(settings, mtp, names))
    return [mtp.prefix.format(depth=k, layer=num_layers + k) for k in depths]


def _count(settings: Settings, mtp: MTPTable, names: Collection[str]) -> int:
    is_there = mtp.is_implied and any(name.startswith(mtp.prefix) for name in names)
    return settings.integer(mtp.count_key, int(is_there), at_least=0)


def copied_tensors(
    settings: Settings, family: Family, mtp: MTPTable, names: Collection[str]
) -> dict[str, str]:
    """Tensors of a folder's own depths that are there again: from their names to the decoder's."""
    # A head that is tied is the embedding.
    decoder = {part: tensor.name for part, tensor in family.decoder.items()}
    if decoder["head"] not in names:
        decoder["head"] = decoder["embedding"]
    return {
        prefix + name: decoder[part]
        for prefix in depth_prefixes(settings, mtp, names)
        for name, part in mtp.copies.items()
        if prefix + name in names
    }


def fresh_config(
    num_depths: int | None, preset: Preset | None, key: PRNGKeyArray | None
) -> MTPConfig:
    num_depths = check_integer("num_depths", 1 if num_depths is None else num_depths, at_least=0)
    if num_depths == 0:
        return MTPConfig(num_depths=0)
    if key is None:
        raise ValueError(
            f"`key` must be given for the initial values of {num_depths} fresh depth(s); got "
            "`None`. Pass `key=jax.random.key(0)`."
        )
    return MTPConfig.preset("deepseek_v3" if preset is None else preset, num_depths)


def fresh_block(
    settings: Settings,
    family: Family,
    names: Collection[str],
    config: MTPConfig,
    dtype: str | None,
    key: PRNGKeyArray | None,
) -> MultiTokenPredictionBlock:
    """A block with new layers, in the dtype that is wanted."""
    assert key is not None
    block = make_block(settings, family, names, config, key)
    return jax.tree.map(
        lambda x: x.astype(dtype) if dtype is not None and eqx.is_inexact_array(x) else x, block
    )


def made_there(
    make: Callable[[PRNGKeyArray | None], Tree], key: PRNGKeyArray | None, shardings: Any
) -> Tree:
    """What `make(key)` gives, each array made part by part on the devices of its sharding."""
    one = jax.tree.leaves(shardings)[0]
    if isinstance(one, NamedSharding):
        key = jax.device_put(key, NamedSharding(one.mesh, PartitionSpec()))
        where: Any = {"out_shardings": shardings}
    else:
        where = {}
    arrays = jax.jit(lambda key: eqx.filter(make(key), eqx.is_array), **where)(key)
    return eqx.combine(arrays, eqx.filter_eval_shape(make, key))
