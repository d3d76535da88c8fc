"""The rules in force, as a context: like the mesh, they are no part of a model."""

from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

from .._types import checked
from ._head_sharding import HeadSharding, constrain
from ._rules import DEFAULT_RULES, ShardingRules

# A part of the key under which `jit` keeps compiled functions: other rules trace again.
_RULES: Any = jax.make_user_context(None)


@checked
def use_rules(rules: ShardingRules | None = DEFAULT_RULES) -> AbstractContextManager[Any]:
    """Says how hidden states, embedding lookup and loss are split over the mesh that is set.

    `nn.TransformerDecoder`, `nn.embed_tokens` and the loss follow the rules; a model is built,
    saved and loaded without them. Without rules results are the same, and XLA decides what moves
    between devices; `HeadSharding` tells what that costs. Compiled functions are traced again under
    other rules. Inside a `shard_map`, or where no mesh is set, rules do nothing.

    >>> rules = emtp.sharding.DEFAULT_RULES.replace(vocab=None)
    >>> with jax.set_mesh(mesh), emtp.sharding.use_rules(rules):
    ...     embedded = jax.jit(emtp.nn.embed_tokens)(decoder.embedding, rows.input_ids)
    >>> embedded.shape, embedded.sharding.shard_shape(embedded.shape)
    ((8, 8, 16), (1, 8, 16))

    **Arguments:**

    - `rules`: which axis of an array lies on which axis of the mesh; `None` for no rules.
    """
    return _RULES(rules)


def current_head_sharding() -> HeadSharding | None:
    """What the rules in force say of the mesh that is set.

    `None` if no rules are in force, no mesh is set, or inside a `shard_map`.

    >>> with jax.set_mesh(mesh), emtp.sharding.use_rules():
    ...     emtp.sharding.current_head_sharding().batch
    ('data', 'fsdp')
    """
    rules, mesh = _RULES.value, jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or mesh.manual_axes:
        return None
    return rules.head_sharding(mesh)


def current_spec(axis_words: str) -> P | None:
    """How the rules in force lay an array with these axis words on the mesh that is set.

    >>> with jax.set_mesh(mesh), emtp.sharding.use_rules():
    ...     spec = emtp.sharding.current_spec("batch seq heads head_dim")
    >>> spec == jax.P(("data", "fsdp"), None, None, None)
    True

    **Arguments:**

    - `axis_words`: one for each axis of the array, with spaces between them; those that no rule
        names are not split.

    **Returns:** the partition spec; `None` where `current_head_sharding` gives `None`.

    **Raises:** `ValueError` if the mesh and the rules do not know each other's axes.
    """
    rules, mesh = _RULES.value, jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or mesh.manual_axes:
        return None
    return rules.spec(axis_words, mesh)


@checked
def constrain_hidden_states(
    hidden_states: Float[Array, "batch seq embed"],
) -> Float[Array, "batch seq embed"]:
    """Lays hidden states on the mesh as the rules in force say; for the layers of a decoder.

    Without it XLA would choose from how the parameters are split, and choose differently from layer
    to layer. Hidden states stay as they are where `use_rules` does nothing.

    >>> with jax.set_mesh(mesh), emtp.sharding.use_rules():
    ...     laid_out = jax.jit(emtp.sharding.constrain_hidden_states)(jnp.ones((8, 4, 16)))
    >>> laid_out.sharding.shard_shape(laid_out.shape)
    (1, 4, 16)
    """
    sharding = current_head_sharding()
    if sharding is None:
        return hidden_states
    mesh = jax.sharding.get_abstract_mesh()
    return constrain(hidden_states, NamedSharding(mesh, sharding.spec("batch seq embed")))
