"""Each array of a tree with its name, and the axis words in the annotation of its field."""

import dataclasses
import functools
import typing
from typing import Any, NamedTuple

import equinox as eqx
from jax.tree_util import DictKey, GetAttrKey, SequenceKey


class AnnotatedLeaf(NamedTuple):
    """What a path says of the leaf that it leads to.

    **Fields:**

    - `name`: as `"decoder.layers.attention.query_kernel"`.
    - `words`: the axis words of the field's annotation: those of the last axes, since layers may be
        stacked over leading ones. Empty without an annotation.
    - `owner`: the class that has the field; `None` in a list, tuple or dictionary.
    - `num_stacked`: over how many leading axes layers are stacked, as classes say that hold such
        layers: by the names in their `STACKED`.
    - `is_state`: whether the leaf is part of an optimizer's state, whose arrays may have other
        shapes than the parameters they are named after: these states are named tuples.
    """

    name: str
    words: tuple[str, ...]
    owner: type | None
    num_stacked: int
    is_state: bool


def annotated_leaf(tree: Any, path: Any) -> AnnotatedLeaf:
    """The leaf at a path of `jax.tree_util.tree_map_with_path`."""
    node, names, words, owner, is_state, num_stacked = tree, [], (), None, False, 0
    for key in path:
        is_state |= hasattr(node, "_fields")
        if isinstance(key, GetAttrKey):
            names.append(key.name)
            owner = type(node)
            words = annotated_words(owner).get(key.name, ())
            node = getattr(node, key.name)
            is_stacked = key.name in getattr(owner, "STACKED", ()) and not isinstance(node, tuple)
            num_stacked += is_stacked
        elif isinstance(key, SequenceKey):
            names.append(str(key.idx))
            words, owner, node = (), None, node[key.idx]
        elif isinstance(key, DictKey):
            names.append(str(key.key))
            words, owner, node = (), None, node[key.key]
        else:
            return AnnotatedLeaf(".".join([*names, str(key)]), (), None, num_stacked, is_state)
    return AnnotatedLeaf(".".join(names), words, owner, num_stacked, is_state)


def names_last_axes(words: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Whether axis words name each its own axis of an array of this shape, from the last on."""
    is_plain = all(word[0] not in "*#" and word != "..." for word in words)
    return is_plain and len(words) <= len(shape)


@functools.cache
def annotated_words(cls: type) -> dict[str, tuple[str, ...]]:
    """The axis words in the annotations of a class, by field."""
    if not issubclass(cls, eqx.Module):
        return {}
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # of names that exist for type checkers alone
        hints = {field.name: field.type for field in dataclasses.fields(cls)}
    found = {}
    for name, hint in hints.items():
        for part in (hint, *typing.get_args(hint)):
            dims = getattr(part, "dim_str", None)
            if isinstance(dims, str):
                found[name] = tuple(dims.split())
                break
    return found
