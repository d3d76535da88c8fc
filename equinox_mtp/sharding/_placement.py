"""Where the arrays of a tree lie on a mesh, and putting them there."""

import math
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .._annotations import annotated_leaf, names_last_axes
from .._types import AXIS_WORDS, checked, is_array_or_shape
from ._head_sharding import constrain
from ._rules import DEFAULT_RULES, UNSPLIT, ShardingRules

Tree = TypeVar("Tree")


@checked
def parameter_shardings(tree: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """The sharding of every array of a model, of an optimizer's state, or of both.

    >>> shardings = emtp.sharding.parameter_shardings(model, mesh)
    >>> spec = shardings.decoder.layers.attention.query_kernel.spec
    >>> spec == jax.P(None, "fsdp", None, None)  # a leading axis for the layers
    True

    **Arguments:**

    - `tree`: a pytree with `equinox.Module`s in it: their annotations tell the axes. Arrays may be
        `jax.ShapeDtypeStruct`s.
    - `mesh`, `rules`: where parameters go.

    **Returns:** the tree with a `NamedSharding` in place of each array, and `None` in place of
    anything else.

    **Raises:** `ValueError` as `ShardingRules` says.
    """
    # The defaults are for more than one kind of model.
    defaults = DEFAULT_RULES.parameters
    own = {rule for rule, words in rules.parameters.items() if defaults.get(rule) != words}
    unused = set(own)

    has_parameters: list[bool] = []
    new_words = set(rules.axes) - set(DEFAULT_RULES.axes) - AXIS_WORDS
    known = set(rules.axes) | AXIS_WORDS | {UNSPLIT}

    def place(path: Any, leaf: Any) -> NamedSharding | None:
        if not is_array_or_shape(leaf):
            return None
        name, words, _, _, is_state = annotated_leaf(tree, path)
        rule = _longest_fitting(rules, name)
        if rule is not None:
            unused.discard(rule)
            words = tuple(rules.parameters[rule].split())
            if rule in own:
                _check_rule(rule, words, known, name, leaf.shape)
        new_words.difference_update(words)
        has_parameters.append(bool(words))
        spec = _spec(name, words, leaf.shape, mesh, rules, may_be_whole=is_state)
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    if not any(has_parameters):
        return shardings  # such as the state of an optimizer that keeps none
    if unused:
        names = [annotated_leaf(tree, path).name for path, _ in _leaves_with_path(tree)]
        raise ValueError(
            f"`rules` has parameter rules that fit no parameter: "
            f"{', '.join(map(repr, sorted(unused)))}. The parameters are {', '.join(names)}. Leave "
            "the rules out, or mend their names."
        )
    if new_words:
        raise ValueError(
            f"`rules` has axis words that no parameter has: {', '.join(sorted(new_words))}. Those "
            f"of the library are {', '.join(sorted(AXIS_WORDS))}."
        )
    return shardings


@checked
def shard_model(model: Tree, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Tree:
    """Puts a model, an optimizer's state, or a tree of both on a mesh.

    On several hosts too: each hands in the same values. A model too large for one device is better
    made where it shall lie, with `constrain_model` inside `jit`.

    See `parameter_shardings` for the arguments. Run the model in `jax.set_mesh(mesh)` and
    `use_rules(rules)`, so that hidden states and the loss are split accordingly.

    >>> sharded = emtp.sharding.shard_model(model, mesh)
    >>> embedding = sharded.decoder.embedding
    >>> embedding.shape, embedding.sharding.shard_shape(embedding.shape)
    ((32, 16), (32, 4))
    """
    shardings = parameter_shardings(model, mesh, rules)
    return jax.tree.map(
        lambda x, sharding: x if sharding is None else jax.device_put(x, sharding),
        model,
        shardings,
        is_leaf=lambda x: x is None,
    )


@checked
def constrain_model(model: Tree, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Tree:
    """`shard_model` within `jit`: the arrays are made, or kept, where the rules say.

    >>> make_head = lambda: emtp.LinearHead(jnp.ones((32, 16)))
    >>> head = eqx.filter_jit(lambda: emtp.sharding.constrain_model(make_head(), mesh))()
    >>> head.weight.sharding.shard_shape((32, 16))
    (32, 4)
    """
    shardings = parameter_shardings(model, mesh, rules)
    return jax.tree.map(
        lambda x, sharding: x if sharding is None else constrain(x, sharding),
        model,
        shardings,
        is_leaf=lambda x: x is None,
    )


@checked
def batch_sharding(
    mesh: Mesh, rules: ShardingRules = DEFAULT_RULES, axis_words: str = "batch seq"
) -> NamedSharding:
    """Where a batch lies.

    >>> emtp.sharding.batch_sharding(mesh).shard_shape((8, 128))
    (1, 128)
    """
    return NamedSharding(mesh, rules.spec(axis_words, mesh))


@checked
def shard_batch(
    batch: Tree, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES, *, split_seq: bool = True
) -> Tree:
    """Puts arrays `[… batch seq]` on a mesh; each host gives its own rows.

    >>> sharded = emtp.sharding.shard_batch(rows, mesh)
    >>> sharded.input_ids.sharding.shard_shape((8, 8))
    (1, 8)

    **Arguments:**

    - `batch`: a pytree of arrays with `batch` and `seq` as their last axes: the rows of this host's
        devices, with all their positions.
    - `split_seq`: whether to split `seq`, too. A row of `seq + 1` tokens cannot be, before inputs
        and targets are cut from it.

    **Returns:** the arrays of all hosts' rows.

    **Raises:** `ValueError` if an axis is no multiple of the devices that share it.
    """
    num_rows = rules.num_shards("batch", mesh)
    num_local = _num_local_parts(batch_sharding(mesh, rules, "batch"), num_rows)

    def place(x: Any) -> Any:
        if np.ndim(x) < 2:
            raise ValueError(
                "`batch` must hold arrays whose last axes are `batch` and `seq`; got one of shape "
                f"{np.shape(x)}."
            )
        words = [UNSPLIT] * (x.ndim - 2) + ["batch", "seq" if split_seq else UNSPLIT]
        spec = rules.spec(" ".join(words), mesh)
        for word, size, parts in (
            ("batch", x.shape[-2], num_local),
            ("seq", x.shape[-1], rules.num_shards("seq", mesh) if split_seq else 1),
        ):
            if size % parts:
                raise ValueError(
                    f"`{word}` must be a multiple of the {parts} device(s) that share it by the "
                    f"rule {word!r}: {rules.axes[word]!r}; got {size}."
                )
        sharding = NamedSharding(mesh, spec)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        shape = (*x.shape[:-2], x.shape[-2] * num_rows // num_local, x.shape[-1])
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree.map(place, batch)


# Names and axis words


def _leaves_with_path(tree: Any) -> list[tuple[Any, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, x) for path, x in leaves if is_array_or_shape(x)]


def _longest_fitting(rules: ShardingRules, name: str) -> str | None:
    fitting = [rule for rule in rules.parameters if f".{name}".endswith(f".{rule}")]
    return max(fitting, key=len, default=None)


def _spec(
    name: str,
    words: tuple[str, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: ShardingRules,
    *,
    may_be_whole: bool,
) -> P:
    if not names_last_axes(words, shape):
        words = ()
    padded = [UNSPLIT] * (len(shape) - len(words)) + list(words)
    spec = rules.spec(" ".join(padded), mesh)
    for word, size, axes in zip(padded, shape, spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts and may_be_whole:
            return P()
        if size % parts:
            raise ValueError(
                f"`{name}` cannot be split by the rule {word!r}: {rules.axes[word]!r}: its axis "
                f"`{word}` of size {size} is no multiple of the {parts} devices of "
                f"{' · '.join(map(repr, names))}. Choose other sizes, or "
                f"`rules.replace({word}=None)`."
            )
    return spec


def _num_local_parts(sharding: NamedSharding, num_parts: int) -> int:
    """How many parts of a split axis this host's devices hold."""
    where = sharding.addressable_devices_indices_map((num_parts,)).values()
    return len({index[0].indices(num_parts)[0] for index in where if index is not None})


def _check_rule(
    rule: str, words: tuple[str, ...], known: set[str], name: str, shape: tuple[int, ...]
) -> None:
    unknown = [word for word in words if word not in known]
    if unknown or len(words) > len(shape):
        raise ValueError(
            f"the parameter rule {rule!r} of `rules` must name the last axes of `{name}`, which "
            f"has shape {shape}, each by one of {', '.join(sorted(known))}; got "
            f"{' '.join(words)!r}."
        )
