"""Parameters under MaxText's names, and back."""

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._block import MultiTokenPredictionBlock
from .._decoder import AbstractDecoderLayer
from .._types import checked
from ..nn import TransformerDecoderLayer
from ._layers import CallableLayer
from ._trees import (
    Path,
    as_exact_array,
    flatten,
    joined,
    map_parameters,
    nest,
    problems_of,
    without_prefix,
)

_Decoder = TypeVar("_Decoder")

DECODER = "decoder"
"""The key of the decoder's parameters, beside those of the block."""

# The reference layer is MaxText's Llama layer, which has names of its own.
_LLAMA_NAMES: dict[Path, Path] = {
    ("attention_norm", "scale"): ("pre_self_attention_layer_norm", "scale"),
    ("attention", "query_kernel"): ("self_attention", "query", "kernel"),
    ("attention", "key_kernel"): ("self_attention", "key", "kernel"),
    ("attention", "value_kernel"): ("self_attention", "value", "kernel"),
    ("attention", "out_kernel"): ("self_attention", "out", "kernel"),
    ("feed_forward_norm", "scale"): ("post_self_attention_layer_norm", "scale"),
    ("feed_forward", "gate", "kernel"): ("mlp", "wi_0", "kernel"),
    ("feed_forward", "up", "kernel"): ("mlp", "wi_1", "kernel"),
    ("feed_forward", "down", "kernel"): ("mlp", "wo", "kernel"),
}
_MODULE_NAMES = {"projection_layer": "projection", "output_norm": "final_norm"}


@checked
def to_linen_params(block: MultiTokenPredictionBlock) -> dict[str, Any]:
    """A block's parameters as MaxText's tree, bit for bit.

    >>> params = linen.to_linen_params(block)
    >>> params["mtp_layer_1"]["mtp_1_projection"]["kernel"].shape
    (32, 16)

        mtp_layer_1/mtp_1_embedding_norm/scale        [embed]
        mtp_layer_1/mtp_1_hidden_state_norm/scale     [embed]
        mtp_layer_1/mtp_1_projection/kernel           [2 embed, embed]
        mtp_layer_1/mtp_1_transformer_layer/…
        mtp_layer_1/mtp_1_final_norm/scale            [embed], if depths have their own norm
        mtp_layer_2/…

    The reference layer has the names of MaxText's Llama layer (`self_attention/query/kernel`
    `[embed, heads, head_dim]`, `mlp/wi_0/kernel`, …); the arrays of other layers have the names of
    their attributes.

    **Returns:** a nested dictionary, for `variables["params"]`.
    """
    flat: dict[Path, Any] = {}

    def take(names: Path, stacked: Any) -> Any:
        for index in range(stacked.shape[0]):
            one = jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)
            if not isinstance(stacked, jax.ShapeDtypeStruct):
                one = stacked[index]
            flat[_original_path(names, index + 1, _layer(block))] = one
        return stacked

    map_parameters(take, block.layers)
    return nest(dict(sorted(flat.items(), key=lambda item: _depth_of(item[0]))))


@checked
def from_linen_params(
    params: Mapping[str, Any], like: MultiTokenPredictionBlock
) -> MultiTokenPredictionBlock:
    """A block with the parameters of MaxText's tree, bit for bit.

    >>> params = linen.to_linen_params(block)
    >>> again = linen.from_linen_params(params, like=block)
    >>> bool(eqx.tree_equal(again, block))
    True

    **Arguments:**

    - `params`: the tree of `to_linen_params`, of NumPy or JAX arrays, boxed by Flax or not; under
        `"params"` or `"mtp_block"`, too, and with keys joined by `/` or `.`.
    - `like`: a block of the same structure, for instance `model.block`. Its arrays' values do not
        matter: one made by `equinox.filter_eval_shape` will do. For MaxText's own checkpoints
        its attention has `scale=1.0` (`TransformerConfig(attention_scale=1.0)`).

    **Raises:** `ValueError` that lists entries which are unknown, missing, there twice or of
    another shape; and if values would be rounded.
    """
    given = without_prefix(without_prefix(flatten(params), "params"), "mtp_block")
    of_block = {path[1:]: x for path, x in given.items() if path[0] == "mtp_block"}
    wanted: dict[Path, tuple[int, ...]] = {}

    def want(names: Path, stacked: Any) -> Any:
        for index in range(stacked.shape[0]):
            wanted[_original_path(names, index + 1, _layer(like))] = stacked.shape[1:]
        return stacked

    map_parameters(want, like.layers)
    if of_block:
        others = sorted({path[0] for path in given} - {"mtp_block"})
        raise ValueError(
            f"`params` must hold the arrays of the block alone; got {others} beside 'mtp_block'. "
            "Pass `params['mtp_block']`."
        )
    problems = problems_of(given, wanted)
    problems += [f"{joined(path)}: missing" for path in wanted if path not in given]
    if problems:
        raise ValueError(
            "`params` must hold the arrays of the block, no more and no less; got\n  "
            + "\n  ".join(sorted(problems))
        )

    def stack(names: Path, stacked: Any) -> Array:
        paths = [
            _original_path(names, index + 1, _layer(like)) for index in range(stacked.shape[0])
        ]
        arrays = [as_exact_array(path, given[path]) for path in paths]
        for path, array in zip(paths, arrays, strict=True):
            if array.dtype != arrays[0].dtype:
                raise ValueError(
                    f"`params` must hold one dtype for all depths; {joined(path)} is "
                    f"{array.dtype}, and {joined(paths[0])} is {arrays[0].dtype}."
                )
        return jnp.stack(arrays)

    return eqx.tree_at(
        lambda block: block.layers,
        like,
        map_parameters(stack, like.layers),
        is_leaf=lambda x: x is None,
    )


def decoder_params(decoder: Any) -> dict[str, Any]:
    """A decoder's arrays by the names of their attributes, for `params["decoder"]`.

    For any pytree whose leaves are arrays, such as an `AbstractDecoder`.

    >>> sorted(linen.decoder_params(decoder))
    ['embedding', 'layers', 'norm']
    """
    flat: dict[Path, Any] = {}

    def take(names: Path, array: Any) -> Any:
        flat[names] = array
        return array

    map_parameters(take, decoder)
    return nest(flat)


def with_decoder_params(decoder: _Decoder, params: Mapping[str, Any]) -> _Decoder:
    """A decoder with some of its arrays replaced, as they are; the inverse of `decoder_params`.

    >>> params = {"embedding": jnp.zeros((32, 16))}
    >>> float(linen.with_decoder_params(decoder, params).embedding.sum())
    0.0

    **Raises:** `ValueError` for entries that the decoder does not have, or of another shape.
    """
    given = flatten(params)
    shapes = {path: leaf.shape for path, leaf in flatten(decoder_params(decoder)).items()}
    problems = problems_of(given, shapes, prefix=(DECODER,))
    if problems:
        name = type(decoder).__name__
        known = ", ".join(map(joined, shapes)) or "none, as it is no pytree of arrays"
        raise ValueError(
            f"`params['{DECODER}']` must hold arrays of the decoder, a `{name}`, by their names: "
            f"{known}. Got\n  " + "\n  ".join(sorted(problems))
        )
    return map_parameters(
        lambda names, array: as_exact_array(names, given[names]) if names in given else array,
        decoder,
    )


def _layer(block: MultiTokenPredictionBlock) -> AbstractDecoderLayer | None:
    return None if block.layers is None else block.layers.transformer_layer


def _original_path(names: Path, depth: int, layer: AbstractDecoderLayer | None) -> Path:
    """Where MaxText has an array of `MultiTokenPredictionLayer` at some depth."""
    module, *inner = names
    if module == "transformer_layer":
        if isinstance(layer, TransformerDecoderLayer):
            inner = _LLAMA_NAMES[tuple(inner)]
        elif isinstance(layer, CallableLayer):
            inner = inner[1:] or inner
    return (f"mtp_layer_{depth}", f"mtp_{depth}_{_MODULE_NAMES.get(module, module)}", *inner)


def _depth_of(path: Path) -> int:
    return int(path[0].rpartition("_")[2])
