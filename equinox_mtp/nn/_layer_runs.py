"""The layers of a decoder, in runs of layers that are alike."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._checks import check_integer
from .._decoder import AbstractCachedDecoderLayer, split_auxiliary
from .._types import is_array_or_shape
from ..stacking import are_alike, layer_shapes, stack_layers


class LayerRun(eqx.Module):
    """Layers that are alike, stacked over a leading axis: one scan runs them.

    >>> run = emtp.nn.LayerRun(decoder.layers)
    >>> run.num_layers, run.layer(0).attention_norm.scale.shape
    (1, (16,))
    """

    STACKED: ClassVar = ("layers",)

    layers: AbstractCachedDecoderLayer

    @property
    def num_layers(self) -> int:
        """The size of the leading axis."""
        return jax.tree.leaves(eqx.filter(self.layers, is_array_or_shape))[0].shape[0]

    def layer(self, index: int) -> AbstractCachedDecoderLayer:
        """One layer; they count from 0.

        **Raises:** `ValueError` if there is no such layer.
        """
        index = check_integer("index", index, at_least=0, at_most=self.num_layers - 1)
        return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, self.layers)

    def flops_per_token(self, seq_len: int) -> float:
        """Of all layers; see `AbstractDecoderLayer`."""
        return self.num_layers * layer_shapes(self.layers).flops_per_token(seq_len)

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        token_mask: Array | None,
        keys: Array | None,
        checkpoint_policy: Callable[..., Any] | None,
        **context: Any,
    ) -> tuple[Float[Array, "batch seq embed"], Any]:
        """Runs all layers.

        **Arguments:**

        - `hidden_states`: see `AbstractDecoderLayer`, as for `context`.
        - `token_mask`: where there is a token, for layers that take it.
        - `keys`: a key for each layer, or `None`.
        - `checkpoint_policy`: see `TransformerConfig`.

        **Returns:** hidden states, and the layers' auxiliary outputs, stacked, or `None`.
        """
        if self.layers.takes_token_mask:
            context["token_mask"] = token_mask
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def run_layer(hidden_states: Array, inputs: tuple[Any, Array | None]) -> tuple[Array, Any]:
            layer_arrays, key = inputs
            layer = eqx.combine(layer_arrays, static)
            return split_auxiliary(layer(hidden_states, key=key, **context))

        if checkpoint_policy is not jax.checkpoint_policies.everything_saveable:
            # In a scan nothing is merged across iterations: `prevent_cse` would only cost.
            run_layer = jax.checkpoint(run_layer, policy=checkpoint_policy, prevent_cse=False)
        return lax.scan(run_layer, hidden_states, (arrays, keys))


Layers = AbstractCachedDecoderLayer | tuple[AbstractCachedDecoderLayer | LayerRun, ...]
"""One run of layers, stacked; or several runs, and single layers."""


def in_runs(layers: Sequence[AbstractCachedDecoderLayer]) -> Layers:
    """Neighbours that are alike as one run."""
    groups: list[list[AbstractCachedDecoderLayer]] = []
    for layer in layers:
        if groups and are_alike(groups[-1][0], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    stacked = [stack_layers(group) for group in groups]
    runs = tuple(LayerRun(layers) for layers in stacked if layers is not None)
    return runs[0].layers if len(runs) == 1 else runs


def as_runs(layers: Layers) -> tuple[AbstractCachedDecoderLayer | LayerRun, ...]:
    """The runs and single layers, one after the other."""
    return layers if isinstance(layers, tuple) else (LayerRun(layers),)


def stacked_auxiliary(of_runs: Sequence[Any]) -> Any:
    """The auxiliary outputs of several runs, stacked over all of their layers.

    Runs without any have no place there. `None` if no run has some; a tuple with those of each run
    if they are of different kinds or shapes.
    """
    found = [auxiliary for auxiliary in of_runs if auxiliary is not None]
    if len(found) < 2:
        return found[0] if found else None
    kinds = {
        (jax.tree.structure(x), *((leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(x)))
        for x in found
    }
    if len(kinds) > 1:
        return tuple(found)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)


def num_layers_of(run: AbstractCachedDecoderLayer | LayerRun) -> int:
    """1 for a single layer."""
    return run.num_layers if isinstance(run, LayerRun) else 1
