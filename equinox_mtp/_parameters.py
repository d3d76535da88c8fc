"""What an optimizer must know of a model's parameters: how many, and which of them are matrices.

The shape does not tell. Layers are stacked over a leading axis, so that the scales of their norms
have two axes, and their kernels three. The axis words of the annotations tell.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from ._annotations import AnnotatedLeaf, annotated_leaf, annotated_words, names_last_axes
from ._types import checked, is_array_or_shape

# Equinox's own layers have annotations without axis words.
_VECTORS = ((eqx.nn.LayerNorm, "weight"), (eqx.nn.RMSNorm, "weight"))
_NO_MATRIX = {"vocab", "width"}
_MATRICES_OUTPUT_FIRST = ((eqx.nn.Linear, "weight"),)


@checked
def count_parameters(tree: PyTree[Any]) -> int:
    """The number of trainable numbers: the sizes of all arrays of floating point.

    For a report at the start of training.

    >>> emtp.count_parameters(emtp.nn.Linear(3, 5, key=jax.random.key(0)))
    15

    **Arguments:**

    - `tree`: a model, or any other pytree. Arrays may be `jax.ShapeDtypeStruct`s, as
        `equinox.filter_eval_shape` makes them.

    **Returns:** an integer. A matrix that embedding and output head share counts once.
    """
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree) if _is_parameter(x))


@checked
def weight_decay_mask(tree: PyTree[Any]) -> PyTree[bool]:
    """Which parameters weight decay should act on: all but biases and the scales of norms.

    For `optax.adamw(..., mask=weight_decay_mask)`, as `python -m equinox_mtp train` does, and for
    `optax.contrib.muon(..., weight_decay_mask=weight_decay_mask)`.

    >>> emtp.weight_decay_mask(emtp.nn.RMSNorm(8)).scale
    False
    >>> emtp.weight_decay_mask(emtp.nn.Linear(3, 5, key=jax.random.key(0))).kernel
    True

    A parameter decays if its annotation has two axis words or more, `Float[Array, "vocab embed"]`
    for instance, however many axes its layers are stacked over. Without axis words it decays if it
    has two axes or more in its layer. What is named `bias`, or `…_bias`, and norms of `equinox.nn`
    never do.

    **Arguments:**

    - `tree`: a model, its parameters, or their gradients.

    **Returns:** the tree with `True` or `False` in place of each leaf.
    """

    def decays(path: Any, x: Any) -> bool:
        if not _is_parameter(x):
            return False
        leaf = annotated_leaf(tree, path)
        if _is_vector(leaf):
            return False
        if names_last_axes(leaf.words, x.shape) and leaf.words:
            return len(leaf.words) >= 2
        return len(x.shape) - leaf.num_stacked >= 2

    return jax.tree_util.tree_map_with_path(decays, tree)


@checked
def muon_dimension_numbers(tree: PyTree[Any]) -> PyTree[Any]:
    """Which parameters are matrices, and along which axes, for the optimizer Muon.

    For `optax.contrib.muon(..., muon_weight_dimension_numbers=muon_dimension_numbers)`. Each layer
    of a stack, and each prediction depth, is orthogonalised by itself: Muon treats leading axes as
    a batch. AdamW updates the other parameters.

    >>> linear = emtp.nn.Linear(3, 5, key=jax.random.key(0))
    >>> emtp.muon_dimension_numbers(linear).kernel
    MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,))
    >>> print(emtp.muon_dimension_numbers(emtp.nn.RMSNorm(8)).scale)
    None

    The last two axis words of a parameter's annotation name the matrix, `x @ kernel`; `heads` (or
    `kv_heads`) and `head_dim`, or a word that ends so, are one axis of it. So `"embed heads
    head_dim"` is a matrix from `embed` to `heads · head_dim`. No matrices are: what has the axis
    word `vocab`, that is embeddings and output heads, or `width`, convolutions of single features;
    biases and the scales of norms, which have one word; and what has no axis words.
    `equinox.nn.Linear` is known, and its `weight` a matrix. Muon is described in
    <https://kellerjordan.github.io/posts/muon>, for language models in arXiv 2502.16982.

    **Arguments:**

    - `tree`: a model, its parameters, or their gradients.

    **Returns:** the tree with an `optax.contrib.MuonDimensionNumbers` in place of each matrix, and
    `None` in place of any other leaf. For an output head that is an `equinox.nn.Linear`, replace
    its own by `None`: `equinox.tree_at(lambda m: m.head.weight, numbers, None)`.
    """

    def numbers(path: Any, x: Any) -> MuonDimensionNumbers | None:
        if not _is_parameter(x):
            return None
        leaf = annotated_leaf(tree, path)
        if _is_field(leaf, _MATRICES_OUTPUT_FIRST):
            return MuonDimensionNumbers(reduction_axis=(-1,), output_axis=(-2,))
        is_named = names_last_axes(leaf.words, x.shape)
        if _NO_MATRIX & set(leaf.words) or not is_named or _is_vector(leaf):
            return None
        features = _feature_axes(leaf.words)
        return MuonDimensionNumbers(*features[-2:]) if len(features) >= 2 else None

    return jax.tree_util.tree_map_with_path(numbers, tree)


def matrix_axes(owner: type, field: str) -> tuple[int, int]:
    """How many axes of a matrix are its inputs, and its outputs, by the words of its annotation."""
    inputs, outputs = _feature_axes(annotated_words(owner)[field])
    return len(inputs), len(outputs)


def matrix_flops(tree: PyTree[Any], *, except_axis_size: int | None = None) -> float:
    """The operations of one product of a vector with every matrix: two for each number.

    Matrices are what weight decay acts on; those that have an axis of `except_axis_size` are left
    out.
    """
    leaves, mask = jax.tree.leaves(tree), jax.tree.leaves(weight_decay_mask(tree))
    matrices = (x for x, is_matrix in zip(leaves, mask, strict=True) if is_matrix)
    return float(sum(2 * math.prod(x.shape) for x in matrices if except_axis_size not in x.shape))


def _feature_axes(words: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The axes of each feature, counted from the last; a head's number and features are one."""
    axes: list[tuple[int, ...]] = []
    for index, word in enumerate(words):
        axis = index - len(words)
        if word.endswith("head_dim") and index and words[index - 1] in ("heads", "kv_heads"):
            axes[-1] = (*axes[-1], axis)
        else:
            axes.append((axis,))
    return axes


def _is_parameter(x: Any) -> bool:
    return is_array_or_shape(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _is_vector(leaf: AnnotatedLeaf) -> bool:
    # A bias of attention has two axes, heads and their features.
    return (
        leaf.name.endswith((".bias", "_bias")) or leaf.name == "bias" or _is_field(leaf, _VECTORS)
    )


def _is_field(leaf: AnnotatedLeaf, fields: tuple[tuple[type, str], ...]) -> bool:
    name = leaf.name.rpartition(".")[2]
    return any(leaf.owner is owner and name == field for owner, field in fields)
