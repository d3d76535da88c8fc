"""The modules that a configuration describes, with shapes in place of arrays."""

import math
from collections.abc import Collection
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._block import MultiTokenPredictionBlock
from .._config import MTPConfig
from .._layer import MultiTokenPredictionLayer
from .._types import module_of
from ..nn import GatedDeltaNet, RMSNorm, TransformerDecoder
from ._folder import CheckpointFolder
from ._settings import Settings
from ._tables import Family

Tree = TypeVar("Tree")


def decoder_shapes(
    settings: Settings, family: Family, names: Collection[str], compute_dtype: str | None
) -> TransformerDecoder:
    """The decoder that a configuration describes, with shapes in place of arrays."""
    head, is_tied = family.decoder["head"].name, _is_tied(settings, family, names)
    if is_tied and head in names and isinstance(names, CheckpointFolder):
        mend = "and `tie_word_embeddings` is true. Set it to false in config.json to use this head."
        check_same(names, family.decoder["embedding"].name, head, mend)

    make = partial(make_decoder, settings, family, names, compute_dtype, jax.random.key(0))
    return eqx.filter_eval_shape(make)


def make_decoder(
    settings: Settings,
    family: Family,
    names: Collection[str],
    compute_dtype: str | None,
    key: PRNGKeyArray,
) -> TransformerDecoder:
    """A decoder with new parameters; `names` are the tensors that there are, or would be."""
    num_layers, embed_size = (settings.integer(x) for x in ("num_hidden_layers", "hidden_size"))
    shape = (settings.integer("vocab_size"), embed_size)
    embedding_key, head_key, layers_key = jax.random.split(key, 3)
    layers = [
        family.make_layer(settings, index, names, key=layer_key)
        for index, layer_key in enumerate(jax.random.split(layers_key, num_layers))
    ]
    is_tied = _is_tied(settings, family, names)
    decoder = TransformerDecoder.of(
        layers,
        embedding=_fresh_rows(embedding_key, shape),
        norm=RMSNorm(embed_size, epsilon=settings.number("rms_norm_eps", 1e-6)),
        head=None if is_tied else _fresh_rows(head_key, shape),
        dtype=settings.compute_dtype if compute_dtype is None else compute_dtype,
    )
    return _with_scale_offset(decoder, family.scale_offset)


def _fresh_rows(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
    """A vector for each token id, as `nn.TransformerDecoder` begins with."""
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[1])


def _is_tied(settings: Settings, family: Family, names: Collection[str]) -> bool:
    """Not said: as the weights are. Said otherwise than they are: a tensor is missing."""
    return settings.flag("tie_word_embeddings", family.decoder["head"].name not in names)


def check_same(folder: CheckpointFolder, name: str, copy: str, mend: str) -> None:
    """**Raises:** `ValueError` if a tensor that is there again is another one."""
    one, other = folder.view(name), folder.view(copy)
    is_same = one.shape == other.shape
    step = max(1, 2**24 // max(one[:1].nbytes, 1))
    for start in range(0, len(one) if is_same else 0, step):
        piece = slice(start, start + step)
        is_same = is_same and np.array_equal(one[piece], other[piece])
        folder.forget(name)
        folder.forget(copy)
    if not is_same:
        what = "the embedding" if "embed" in name else f"`{name}`"
        raise ValueError(f"{folder.where(copy)}: it differs from {what}, {mend}")


def depth_shapes(
    settings: Settings, family: Family, names: Collection[str], config: MTPConfig
) -> MultiTokenPredictionLayer:
    """The stacked layers of all depths, with shapes in place of arrays."""

    def make() -> MultiTokenPredictionBlock:
        return make_block(settings, family, names, config, jax.random.key(0))

    return eqx.filter_eval_shape(make).layers


def make_block(
    settings: Settings, family: Family, names: Collection[str], config: MTPConfig, key: PRNGKeyArray
) -> MultiTokenPredictionBlock:
    """A block with fresh layers."""
    num_layers = settings.integer("num_hidden_layers")
    block = MultiTokenPredictionBlock(
        config,
        lambda key: family.make_layer(settings, num_layers, names, key=key),
        embed_size=settings.integer("hidden_size"),
        norm_epsilon=settings.number("rms_norm_eps", 1e-6),
        key=key,
    )
    return _with_scale_offset(block, family.scale_offset)


def _with_scale_offset(tree: Tree, offset: float) -> Tree:
    """The same function by norms that store their scale less `offset`."""

    def change(x: Any) -> Any:
        if not isinstance(x, RMSNorm):
            return x
        scale = x.scale + (x.scale_offset - offset)
        return module_of(RMSNorm, scale=scale, epsilon=x.epsilon, scale_offset=offset)

    # What a `GatedDeltaNet` reads has a norm of its own kind.
    is_leaf = lambda x: isinstance(x, RMSNorm | GatedDeltaNet)  # noqa: E731
    return jax.tree.map(change, tree, is_leaf=is_leaf)
