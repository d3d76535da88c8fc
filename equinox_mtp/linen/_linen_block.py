"""A block with Linen's construction and use, and nothing of Flax."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PRNGKeyArray

from .._types import checked, is_array_or_shape
from ._collections import BLOCK_NAME
from ._modules import ALL_COLLECTIONS, Collections, MultiTokenPredictionBlock
from ._params import DECODER, from_linen_params, to_linen_params, with_decoder_params
from ._rngs import initial_key, key_for
from ._trees import flatten, is_parameter, joined, nest, without_prefix

Variables = Mapping[str, Any]
"""Collections by name; the parameters are `variables["params"]`."""

_PARAMS = "params"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class LinenBlock:
    """The block of `multi_token_prediction_block_as_linen`: frozen, and without arrays of its own.

    `init` draws parameters, `apply` runs the block with them. Both are pure functions.

    >>> sorted(linen_block.init(jax.random.key(0))["params"])
    ['mtp_layer_1', 'mtp_layer_2']
    """

    config: Any
    mesh: Mesh | AbstractMesh | None
    transformer_layer_module: Any
    decoder: Any
    rngs: Any
    name: str | None = None
    _skeleton: MultiTokenPredictionBlock = dataclasses.field(init=False)
    _key: PRNGKeyArray | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        skeleton = eqx.filter_eval_shape(self._make, jax.random.key(0))
        block = _with_constants(skeleton.block, lambda key: self._make(key).block)
        object.__setattr__(self, "_skeleton", eqx.tree_at(lambda m: m.block, skeleton, block))
        # Once: asked again, Flax's `Rngs` would give another one.
        object.__setattr__(self, "_key", key_for(self.rngs, "params"))

    def _make(self, key: jax.Array) -> MultiTokenPredictionBlock:
        return MultiTokenPredictionBlock(
            self.config, self.mesh, self.transformer_layer_module, self.decoder, rngs=key
        )

    def init(
        self, rngs: Any = None, *args: Any, mutable: Any = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Fresh parameters.

        **Arguments:**

        - `rngs`: a key, or something that holds one for the stream `"params"`. `None` takes
            the one given at construction.
        - `args`, `kwargs`: as in `apply`. They are checked, and otherwise not needed.
        - `mutable`: there for Linen's sake; parameters are all that a block has.

        **Returns:** `{"params": {"mtp_layer_1": …}}`, with the names of `to_linen_params`. The
        decoder's parameters are not among them.
        """
        return self.init_with_output(rngs, *args, mutable=mutable, **kwargs)[1]

    def init_with_output(
        self, rngs: Any = None, *args: Any, mutable: Any = True, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`(output, variables)`; the output is the `{}` of MaxText."""
        del mutable
        key = initial_key(self._key if rngs is None else rngs)
        variables = {_PARAMS: to_linen_params(self._make(key).block)}
        if args or kwargs:
            jax.eval_shape(lambda: self.apply(variables, *args, mutable=True, rngs=key, **kwargs))
        return {}, variables

    @checked
    def apply(
        self,
        variables: Variables,
        *args: Any,
        mutable: Any = False,
        rngs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the block.

        **Arguments:**

        - `variables`: `{"params": …}` of `init`, or of MaxText. `params["decoder"]` may hold
            parameters of the decoder, by the names of `decoder_params`: they take the place of its
            own, so that they have gradients.
        - `args`, `kwargs`: the arguments of MaxText's block, as in `MultiTokenPredictionBlock`:
            `(shared_embedding, main_hidden_state, input_ids, target_ids, target_mask, *,
            position_ids, decoder_segment_ids, model_mode, deterministic)`.
        - `mutable`: the collections to return: `False`, `True` for all, one name or several, or
            Flax's `DenyList`.
        - `rngs`: a key, or something that holds one for the stream `"dropout"`.

        **Returns:** as Linen does, the output, or `(output, collections)` if `mutable` is not
        `False`. The output is the `{}` of MaxText: see `calculate_mtp_loss` and
        `calculate_mtp_acceptance_rate` for the collections.

        **Raises:** `ValueError` for parameters that are unknown, missing, twice there or misshapen.
        """
        module = self._module(variables)
        wanted = frozenset(name for name in ALL_COLLECTIONS if _is_mutable(name, mutable))
        collected: Collections = module(*args, collections=wanted, rngs=rngs, **kwargs)
        if mutable is False:
            return {}
        given = {name: value for name, value in variables.items() if _is_mutable(name, mutable)}
        return {}, {**given, **collected}

    def bind(self, variables: Variables, *, rngs: Any = None, mutable: Any = False) -> "BoundBlock":
        """This block with its variables: `block.bind(variables)(...)` is `apply`.

        With `mutable` it returns collections, as `apply` does: nothing is stored.
        """
        return BoundBlock(self, variables, rngs, mutable)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A block without variables cannot run."""
        raise TypeError(
            "this block holds no parameters, and cannot be called; use "
            "`block.apply(variables, ...)`, or `block.bind(variables)(...)`, with "
            "`variables = block.init(jax.random.key(0))`."
        )

    def tabulate(self, rngs: Any = None, *args: Any, **kwargs: Any) -> str:
        """A table of all parameters: path, shape, dtype and number. Nothing is computed."""
        del rngs, args, kwargs
        shapes = flatten(jax.eval_shape(lambda: self.init(jax.random.key(0)))[_PARAMS])
        rows = [
            (joined(path), str(list(x.shape)), str(x.dtype), f"{x.size:,}")
            for path, x in shapes.items()
        ]
        rows.append(("total", "", "", f"{sum(x.size for x in shapes.values()):,}"))
        rows.insert(0, ("path", "shape", "dtype", "parameters"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{path:{widths[0]}}  {shape:{widths[1]}}  {dtype:{widths[2]}}  {number:>{widths[3]}}"
            for path, shape, dtype, number in rows
        ]
        return "\n".join((repr(self), lines[0], "-" * len(lines[0]), *lines[1:]))

    def __repr__(self) -> str:
        settings = self._skeleton.settings
        layer = self.transformer_layer_module
        return (
            f"LinenBlock(name={self.name!r}, mtp_num_layers={settings.conventions.num_depths}, "
            f"emb_dim={settings.embed_size}, dtype={settings.dtype.name}, "
            f"transformer_layer_module={getattr(layer, '__name__', type(layer).__name__)}, "
            f"decoder={type(self.decoder).__name__}, "
            f"mesh={None if self.mesh is None else dict(self.mesh.shape)})"
        )

    def _module(self, variables: Variables) -> MultiTokenPredictionBlock:
        if _PARAMS not in variables:
            raise ValueError(
                "`variables` must hold the collection 'params', as `init` returns it; got "
                f"{sorted(variables)}."
            )
        if not isinstance(variables[_PARAMS], Mapping):
            raise TypeError(
                "`variables['params']` must be a mapping; got a "
                f"`{type(variables[_PARAMS]).__name__}`."
            )
        flat = without_prefix(flatten(variables[_PARAMS]), BLOCK_NAME)
        of_decoder = {path[1:]: x for path, x in flat.items() if path[0] == DECODER}
        of_block = {path: x for path, x in flat.items() if path[0] != DECODER}
        decoder = self.decoder
        if of_decoder:
            decoder = with_decoder_params(decoder, nest(of_decoder))
        block = from_linen_params(nest(of_block), self._skeleton.block)
        return eqx.tree_at(
            lambda module: (module.block, module.decoder),
            self._skeleton,
            (block, decoder),
            is_leaf=lambda x: x is None,
        )


@dataclasses.dataclass(frozen=True)
class BoundBlock:
    """A block and its variables.

    >>> _, collections = linen_block.bind(variables, mutable=True)(**arguments)
    >>> sorted(collections)
    ['mtp_acceptance', 'mtp_losses', 'params']
    """

    module: LinenBlock
    variables: Variables
    rngs: Any
    mutable: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`module.apply` with the variables."""
        return self.module.apply(
            self.variables, *args, mutable=self.mutable, rngs=self.rngs, **kwargs
        )

    def unbind(self) -> tuple[LinenBlock, Variables]:
        """The block and its variables."""
        return self.module, self.variables


def multi_token_prediction_block_as_linen(
    *,
    config: Any,
    mesh: Mesh | AbstractMesh | None,
    transformer_layer_module: Any,
    decoder: Any,
    rngs: Any,
    name: str | None = None,
) -> LinenBlock:
    """A Multi-Token Prediction block with MaxText's construction, and Linen's use.

    >>> linen_block = linen.multi_token_prediction_block_as_linen(
    ...     config=settings, mesh=None, decoder=decoder, rngs=None, name="mtp_block",
    ...     transformer_layer_module=emtp.nn.TransformerDecoderLayer,
    ... )
    >>> variables = linen_block.init(jax.random.key(0))

    **Arguments:**

    - `config`: an object with MaxText's attributes: `mtp_num_layers`,
        `mtp_eval_target_module`, `emb_dim`, `normalization_layer_epsilon`, `dtype` and
        `weight_dtype`; `mtp_final_norm` for depths with their own output norm, and
        `logical_axis_rules` for meshes, if it has them.
    - `mesh`: over which embeddings are laid out, or `None`.
    - `transformer_layer_module`: the class `nn.TransformerDecoderLayer`, which takes its sizes from
        `config` (`num_query_heads`, `num_kv_heads`, `head_dim`, `mlp_dim`) and is MaxText's
        Llama layer; a class or factory of an `AbstractDecoderLayer`, or of an object with the
        original's call convention; or a function that is such a layer, without parameters. Of
        `config`, `mesh`, `model_mode`, `rngs` and `key` a class or factory is given those that it
        has arguments for; `rngs` and `key` are a key.
    - `decoder`: lends embedding, final norm and output head: an `AbstractDecoder`, or an object
        with MaxText's `_apply_embedding` and `apply_output_head`, which must be pure.
    - `rngs`: for `init` without one: a key, a mapping with one for `"params"`, or Flax's `Rngs`.
    - `name`: shown by `repr`; the collections are always named `mtp_block`.

    **Returns:** `LinenBlock`.

    **Raises:** `ValueError` that names what `config` lacks; `TypeError` for a decoder or layer that
    cannot be used.
    """
    return LinenBlock(config, mesh, transformer_layer_module, decoder, rngs, name)


def _is_mutable(name: str, mutable: Any) -> bool:
    """Whether Linen's filter for mutable collections holds a name."""
    if isinstance(mutable, (bool, np.bool_)):
        return bool(mutable)
    if isinstance(mutable, str):
        return name == mutable
    if hasattr(mutable, "deny"):
        return not _is_mutable(name, mutable.deny)
    if not isinstance(mutable, Collection):
        raise TypeError(
            "`mutable` must be True, False, a collection's name or several of them; got "
            f"{mutable!r}."
        )
    return name in mutable


def _with_constants(skeleton: Any, make: Callable[[PRNGKeyArray], Any]) -> Any:
    """Fills in the arrays that are no parameters, such as tables of integers."""

    def is_constant(x: Any) -> bool:
        return is_array_or_shape(x) and not is_parameter(x)

    leaves, structure = jax.tree.flatten(skeleton)
    if not any(map(is_constant, leaves)):
        return skeleton
    # Without their structure: another instance's need not be equal.
    constants = iter(
        jax.jit(lambda key: [x for x in jax.tree.leaves(make(key)) if is_constant(x)])(
            jax.random.key(0)
        )
    )
    return structure.unflatten(next(constants) if is_constant(x) else x for x in leaves)
