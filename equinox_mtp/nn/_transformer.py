"""The reference decoder: a pre-norm transformer of the Llama family."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from .._checks import check_checkpoint_policy, check_choice, check_integer
from .._decoder import (
    AbstractCachedDecoder,
    AbstractCachedDecoderLayer,
    Cache,
    HiddenStates,
    if_taken,
)
from .._types import checked, module_of
from ._embedding import embed_tokens
from ._init import fan_in_normal
from ._kernels import cast_matrices
from ._layer_runs import (
    LayerRun,
    Layers,
    as_runs,
    in_runs,
    num_layers_of,
    stacked_auxiliary,
)
from ._norm import RMSNorm
from ._transformer_layer import TransformerConfig, TransformerDecoderLayer


class TransformerDecoder(AbstractCachedDecoder):
    """A small, complete language model: embedding, layers, norm and head.

    `layers` are stacked over a leading axis and scanned, so compile time does not grow with their
    number. Where they are not all alike they are a tuple of `LayerRun`s, and after `for_decoding` a
    tuple of single layers. `TransformerDecoder(config, key=key)` has the layers that `config`
    describes; `TransformerDecoder.of` takes any.

    >>> input_ids, position_ids = jnp.asarray([[5, 6, 7]]), jnp.asarray([[0, 1, 2]])
    >>> hidden_states = eqx.filter_jit(decoder)(input_ids, position_ids=position_ids)
    >>> logits = decoder.final_norm(hidden_states) @ decoder.output_head().T
    >>> logits.shape
    (1, 3, 32)
    """

    STACKED: ClassVar = ("layers",)
    takes_rollback: ClassVar[bool] = True

    embedding: Float[Array, "vocab embed"]
    layers: Layers
    norm: RMSNorm
    head: Float[Array, "vocab embed"] | None
    dtype: str = eqx.field(static=True)
    checkpoint_policy: Callable[..., Any] | None = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: sizes and choices.
        - `key`: for the initial values.
        """
        embedding_key, layers_key, head_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.embed_size)
        self.embedding = fan_in_normal(embedding_key, shape, config.embed_size)
        make_layer = partial(TransformerDecoderLayer, config)
        self.layers = eqx.filter_vmap(lambda layer_key: make_layer(key=layer_key))(
            jax.random.split(layers_key, config.num_layers)
        )
        self.norm = RMSNorm(config.embed_size, epsilon=config.norm_epsilon)
        self.head = (
            None if config.tie_embeddings else fan_in_normal(head_key, shape, config.embed_size)
        )
        self.dtype = config.dtype
        self.checkpoint_policy = config.checkpoint_policy

    @classmethod
    @checked
    def of(
        cls,
        layers: Sequence[AbstractCachedDecoderLayer],
        *,
        embedding: Float[Array, "vocab embed"],
        norm: RMSNorm,
        head: Float[Array, "vocab embed"] | None = None,
        dtype: str = "float32",
        checkpoint_policy: Callable[..., Any] | None = jax.checkpoint_policies.everything_saveable,
    ) -> "TransformerDecoder":
        """A decoder of given layers; neighbours that are alike are stacked, and scanned as one run.

        >>> layers = [decoder.layer(0), decoder.layer(0)]
        >>> embedding, norm = decoder.embedding, decoder.norm
        >>> deeper = emtp.nn.TransformerDecoder.of(layers, embedding=embedding, norm=norm)
        >>> deeper.num_layers
        2

        **Arguments:**

        - `layers`: the first one first.
        - `embedding`, `norm`: the embedding, and the norm before the head.
        - `head`: `None` if it is the embedding.
        - `dtype`: the compute dtype, `float32` or `bfloat16`; parameters may have others.
        - `checkpoint_policy`: see `TransformerConfig`.

        **Raises:** `ValueError` without layers, for an unknown `dtype`, or for a norm of another
        size than the embedding.
        """
        check_choice("dtype", dtype, ("float32", "bfloat16"))
        check_checkpoint_policy(checkpoint_policy)
        if not layers:
            raise ValueError("`layers` must hold at least one layer; got none.")
        if norm.scale.shape != embedding.shape[1:]:
            raise ValueError(
                f"`norm` must be of the {embedding.shape[1]} features of `embedding`; got one of "
                f"{norm.scale.shape[0]}. Make it by `nn.RMSNorm({embedding.shape[1]})`."
            )
        return module_of(
            cls,
            embedding=embedding,
            layers=in_runs(layers),
            norm=norm,
            head=head,
            dtype=dtype,
            checkpoint_policy=checkpoint_policy,
        )

    @property
    def num_layers(self) -> int:
        """Of all runs."""
        return sum(map(num_layers_of, as_runs(self.layers)))

    @checked
    def embed(
        self, input_ids: Integer[Array, "batch seq"], position_ids: Integer[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        """Looks tokens up, in the compute dtype; positions enter in the attention."""
        return embed_tokens(self.embedding, input_ids, dtype=self.dtype)

    @checked
    def __call__(
        self,
        input_ids: Integer[Array, "batch seq"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> HiddenStates:
        """Runs all layers; see `AbstractDecoder`.

        Auxiliary outputs, if layers have some, are stacked over these layers. Those of layers of
        different kinds are a tuple, with a stack for each run of layers that are alike.
        """
        keys = None if key is None else jax.random.split(key, self.num_layers)
        token_mask = None if segment_ids is None else segment_ids != 0
        hidden_states, first = self.embed(input_ids, position_ids), 0
        of_runs = []
        for run in as_runs(self.layers):
            run = run if isinstance(run, LayerRun) else LayerRun(_stacked_alone(run))
            hidden_states, auxiliary = run(
                hidden_states,
                token_mask=token_mask,
                keys=None if keys is None else keys[first : first + run.num_layers],
                checkpoint_policy=self.checkpoint_policy,
                position_ids=position_ids,
                segment_ids=segment_ids,
                inference=inference,
            )
            first += run.num_layers
            of_runs.append(auxiliary)
        auxiliary = stacked_auxiliary(of_runs)
        return hidden_states if auxiliary is None else (hidden_states, auxiliary)

    def flops_per_token(self, seq_len: int) -> float:
        """Of all layers; see `AbstractDecoder`."""
        return sum(run.flops_per_token(seq_len) for run in as_runs(self.layers))

    def init_cache(
        self, batch_size: int, max_length: int, *, rollback: int = 0
    ) -> tuple[Cache, ...]:
        """A cache for each layer; see `AbstractCachedDecoder`."""
        layers = [self.layer(index) for index in range(self.num_layers)]
        return tuple(
            layer.init_cache(
                batch_size, max_length, self.dtype, **if_taken(layer, rollback=rollback)
            )
            for layer in layers
        )

    @checked
    def decode(
        self,
        input_ids: Integer[Array, "batch seq"],
        cache: tuple[Cache, ...],
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], tuple[Cache, ...]]:
        """Runs a few tokens; see `AbstractCachedDecoder`."""
        return self._run_cached("decode", input_ids, cache, position_ids)

    @checked
    def prefill(
        self,
        input_ids: Integer[Array, "batch seq"],
        cache: tuple[Cache, ...],
        *,
        position_ids: Integer[Array, "batch seq"],
        lengths: Integer[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], tuple[Cache, ...]]:
        """Runs the first tokens of rows; see `AbstractCachedDecoder`."""
        return self._run_cached("prefill", input_ids, cache, position_ids, lengths=lengths)

    def _run_cached(
        self,
        method: Literal["decode", "prefill"],
        input_ids: Array,
        cache: tuple[Cache, ...],
        position_ids: Array,
        **for_rollback: Any,
    ) -> tuple[Array, tuple[Cache, ...]]:
        hidden_states = self.embed(input_ids, position_ids)
        caches = []
        # Layer by layer: a scan would copy every cache and parameter.
        for index, layer_cache in enumerate(cache):
            layer = self.layer(index)
            hidden_states, layer_cache = getattr(layer, method)(
                hidden_states,
                layer_cache,
                position_ids=position_ids,
                **if_taken(layer, **for_rollback),
            )
            caches.append(layer_cache)
        return hidden_states, tuple(caches)

    def for_decoding(self) -> "TransformerDecoder":
        """With one array for each layer's matrix, in the compute dtype and laid out."""
        dtype = self.dtype
        layers = tuple(self.layer(index).for_decoding(dtype) for index in range(self.num_layers))
        return eqx.tree_at(
            lambda decoder: (decoder.embedding, decoder.head, decoder.layers),
            self,
            (*cast_matrices((self.embedding, self.head), dtype), layers),
            is_leaf=lambda x: x is None,
        )

    def layer(self, index: int) -> AbstractCachedDecoderLayer:
        """One layer; they count from 0.

        **Raises:** `ValueError` if there is no such layer.
        """
        index = check_integer("index", index, at_least=0, at_most=self.num_layers - 1)
        for run in as_runs(self.layers):
            if index < num_layers_of(run):
                return run.layer(index) if isinstance(run, LayerRun) else run
            index -= num_layers_of(run)
        raise AssertionError

    @checked
    def final_norm(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """The norm before the head."""
        return self.norm(hidden_states)

    def output_head(self) -> Float[Array, "vocab embed"]:
        """The embedding if tied, the head's own matrix otherwise."""
        return self.embedding if self.head is None else self.head


def _stacked_alone(layer: AbstractCachedDecoderLayer) -> AbstractCachedDecoderLayer:
    return jax.tree.map(lambda x: x[None] if eqx.is_array(x) else x, layer)
