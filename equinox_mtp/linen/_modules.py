"""MaxText's modules: its constructors and call conventions over the library's."""

from collections.abc import Collection
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float, Integer, Shaped

from .. import _block, _layer
from .._acceptance import MTPAcceptance
from .._alignment import align_targets
from .._losses import MTPLosses
from .._types import HostOrDeviceArray, checked, module_of
from ..nn import Linear, RMSNorm
from ._collections import BLOCK_NAME, mtp_acceptance, mtp_losses
from ._config import Settings, read_settings
from ._decoders import borrow_decoder, check_decoder, sharding_of_embeddings
from ._layers import TRAIN, CallableLayer, layer_maker
from ._nnx import hold_as_data
from ._rngs import initial_key, key_for

Collections = dict[str, dict[str, dict[str, Array]]]
"""`{"mtp_losses": {"mtp_block": {"losses": …, "weights": …}}, …}`"""

_MODES = (TRAIN, "eval", "prefill", "autoregressive")

ALL_COLLECTIONS = frozenset({mtp_losses.__name__, mtp_acceptance.__name__})


class MultiTokenPredictionLayer(eqx.Module):
    """`equinox_mtp.MultiTokenPredictionLayer`, constructed and called as MaxText's.

    >>> layer = linen.MultiTokenPredictionLayer(
    ...     settings, None, 1, emtp.nn.TransformerDecoderLayer, rngs=jax.random.key(0)
    ... )
    >>> layer.projection_layer.kernel.shape
    (32, 16)
    """

    layer: _layer.MultiTokenPredictionLayer
    layer_number: int = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)

    @checked
    def __init__(
        self,
        config: Any,
        mesh: Mesh | AbstractMesh | None,
        layer_number: int,
        transformer_layer_module: Any,
        *,
        rngs: Any,
    ):
        """**Arguments:**

        - `config`: an object with MaxText's attributes.
        - `mesh`: passed on to `transformer_layer_module`, if that takes one.
        - `layer_number`: the depth, from 1 on.
        - `transformer_layer_module`: as in `multi_token_prediction_block_as_linen`.
        - `rngs`: a key, or something that holds one for the stream `"params"`.
        """
        if layer_number < 1:
            raise ValueError(
                f"`layer_number` must be at least 1, as depths count from 1; got {layer_number}."
            )
        settings = read_settings(config)
        make_layer = layer_maker(transformer_layer_module, config=config, mesh=mesh)
        layer = _layer.MultiTokenPredictionLayer(
            settings.conventions,
            make_layer,
            embed_size=settings.embed_size,
            norm_epsilon=settings.norm_epsilon,
            key=initial_key(rngs),
        )
        hold_as_data(MultiTokenPredictionBlock, MultiTokenPredictionLayer)
        self.layer = in_weight_dtype(layer, settings)
        self.layer_number = layer_number
        self.dtype = settings.dtype

    @property
    def embedding_norm(self) -> RMSNorm:
        """The norm of the embedding."""
        return self.layer.embedding_norm

    @property
    def hidden_state_norm(self) -> RMSNorm:
        """The norm of the hidden state."""
        return self.layer.hidden_state_norm

    @property
    def projection_layer(self) -> Linear:
        """From both, side by side, to one hidden state."""
        return self.layer.projection_layer

    @property
    def transformer_layer(self) -> Any:
        """The transformer layer, as `transformer_layer_module` made it."""
        layer = self.layer.transformer_layer
        return layer.function if isinstance(layer, CallableLayer) else layer

    @checked
    def __call__(
        self,
        prev_hidden_state: Float[HostOrDeviceArray, "batch seq embed"],
        target_token_embedding: Float[HostOrDeviceArray, "batch seq embed"],
        *,
        position_ids: Integer[HostOrDeviceArray, "batch seq"],
        decoder_segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None,
        deterministic: bool,
        model_mode: str = TRAIN,
        rngs: Any = None,
    ) -> Float[Array, "batch seq embed"]:
        """One depth's hidden states, before its output norm if it has one.

        `rngs` may hold a key for the stream `"dropout"`.
        """
        output, _ = in_mode(self.layer, model_mode)(
            jnp.asarray(prev_hidden_state, self.dtype),
            jnp.asarray(target_token_embedding, self.dtype),
            position_ids=jnp.asarray(position_ids),
            segment_ids=None if decoder_segment_ids is None else jnp.asarray(decoder_segment_ids),
            key=key_for(rngs, "dropout"),
            inference=deterministic,
        )
        return output


class MultiTokenPredictionBlock(eqx.Module):
    """`equinox_mtp.MultiTokenPredictionBlock`, constructed and called as MaxText's.

    MaxText stores what it collects in itself; here a call returns it.

    >>> linen_block = linen.MultiTokenPredictionBlock(
    ...     settings, None, emtp.nn.TransformerDecoderLayer, decoder, rngs=jax.random.key(0)
    ... )
    >>> sorted(linen_block(**arguments))
    ['mtp_acceptance', 'mtp_losses']
    """

    block: _block.MultiTokenPredictionBlock
    decoder: Any
    settings: Settings = eqx.field(static=True)
    embedding_sharding: NamedSharding | None = eqx.field(static=True)

    @checked
    def __init__(
        self,
        config: Any,
        mesh: Mesh | AbstractMesh | None,
        transformer_layer_module: Any,
        decoder: Any,
        rngs: Any,
    ):
        """See `multi_token_prediction_block_as_linen` for the arguments."""
        settings = read_settings(config)
        check_decoder(decoder, own_norm=settings.own_norm)
        make_layer = layer_maker(transformer_layer_module, config=config, mesh=mesh)
        block = _block.MultiTokenPredictionBlock(
            settings.conventions,
            make_layer,
            embed_size=settings.embed_size,
            norm_epsilon=settings.norm_epsilon,
            key=initial_key(rngs),
        )
        hold_as_data(MultiTokenPredictionBlock, MultiTokenPredictionLayer)
        self.block = in_weight_dtype(block, settings)
        self.decoder = decoder
        self.settings = settings
        self.embedding_sharding = sharding_of_embeddings(mesh, config)

    def __getattr__(self, name: str) -> MultiTokenPredictionLayer:
        # MaxText has an attribute for each depth.
        prefix, _, depth = name.rpartition("_")
        if prefix != "mtp_layer" or not depth.isdigit():
            raise AttributeError(f"`{type(self).__name__}` has no attribute `{name}`.")
        try:
            inner = self.block.layer(int(depth))
        except ValueError as error:
            raise AttributeError(f"there is no `{name}`: {error}") from None
        return module_of(
            MultiTokenPredictionLayer,
            layer=inner,
            layer_number=int(depth),
            dtype=self.settings.dtype,
        )

    @checked
    def __call__(
        self,
        shared_embedding: Any,
        main_hidden_state: Float[HostOrDeviceArray, "batch seq embed"],
        input_ids: Integer[HostOrDeviceArray, "batch seq"],
        target_ids: Integer[HostOrDeviceArray, "batch seq"] | None,
        target_mask: Shaped[HostOrDeviceArray, "batch seq"] | None,
        *,
        position_ids: Integer[HostOrDeviceArray, "batch seq"] | None,
        decoder_segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None,
        model_mode: str,
        deterministic: bool,
        collections: Collection[str] = ALL_COLLECTIONS,
        rngs: Any = None,
    ) -> Collections:
        """Runs all depths.

        **Arguments:**

        - `shared_embedding`: what the decoder's methods take for it. For an `AbstractDecoder` it is
            the array `[vocab embed]` of its field `embedding`, or `None` for the one it has.
        - `main_hidden_state`: the main model's, before its final norm.
        - `input_ids`, `target_ids`: tokens and their successors. Without targets there are no
            losses, but predictions all the same.
        - `target_mask`: which targets count: boolean, 0/1 or segment ids; `None` counts all.
        - `position_ids`, `decoder_segment_ids`: of the batch, not shifted; 0 is padding.
        - `model_mode`: losses are collected in the mode `"train"`.
        - `deterministic`: no dropout.
        - `collections`: which to fill.
        - `rngs`: a key, or something that holds one for the stream `"dropout"`.

        **Returns:** what MaxText collects, by collection:
        `{"mtp_losses": {"mtp_block": {"losses": [depth], "weights": [depth]}},
        "mtp_acceptance": {"mtp_block": {"mtp_preds": [1 batch seq], "mtp_mask": [1 batch seq]}}}`.
        """
        settings = self.settings
        _check_mode(model_mode)
        position_ids = None if position_ids is None else jnp.asarray(position_ids)
        segment_ids = None if decoder_segment_ids is None else jnp.asarray(decoder_segment_ids)
        targets = align_targets(
            input_ids,
            jnp.zeros_like(input_ids) if target_ids is None else target_ids,
            None if target_mask is None else jnp.asarray(target_mask) != 0,
            num_depths=settings.conventions.num_depths,
            segment_ids=segment_ids,
            position_ids=position_ids,
        )
        decoder = borrow_decoder(
            self.decoder,
            shared_embedding,
            settings,
            self.embedding_sharding,
            deterministic=deterministic,
            model_mode=model_mode,
        )
        with_acceptance = mtp_acceptance.__name__ in collections and settings.eval_depth > 0
        output = in_mode(self.block, model_mode)(
            decoder,
            jnp.asarray(main_hidden_state, settings.dtype),
            targets,
            position_ids=position_ids,
            segment_ids=segment_ids,
            predictions=with_acceptance,
            key=key_for(rngs, "dropout"),
            inference=deterministic,
        )
        is_training = model_mode == TRAIN and target_ids is not None
        with_losses = mtp_losses.__name__ in collections and is_training
        mask_dtype = jnp.int32 if target_mask is None else target_mask.dtype
        return {
            **(_collected_losses(output.losses) if with_losses else {}),
            **_collected_acceptance(output.acceptance, settings.eval_depth, mask_dtype),
        }


def _check_mode(model_mode: str) -> None:
    if model_mode not in _MODES:
        raise ValueError(
            f"`model_mode` must be one of {', '.join(map(repr, _MODES))}; got {model_mode!r}. "
            f"Losses are collected in {TRAIN!r}."
        )


def _collected_losses(losses: MTPLosses) -> Collections:
    """The collection of losses; empty without depths."""
    if losses.losses.shape[0] == 0:
        return {}
    entries = {"losses": jnp.asarray(losses.losses), "weights": jnp.asarray(losses.weights)}
    return {mtp_losses.__name__: {BLOCK_NAME: entries}}


def _collected_acceptance(
    acceptance: MTPAcceptance | None, eval_depth: int, mask_dtype: Any
) -> Collections:
    """The collection of one depth's predictions; empty if they were not asked for."""
    if acceptance is None:
        return {}
    depth = slice(eval_depth - 1, eval_depth)
    entries = {
        "mtp_preds": acceptance.predictions[depth].astype(jnp.float32),
        "mtp_mask": acceptance.mask[depth].astype(mask_dtype),
    }
    return {mtp_acceptance.__name__: {BLOCK_NAME: entries}}


def in_weight_dtype(module: Any, settings: Settings) -> Any:
    """Parameters in the configuration's `weight_dtype`."""
    return jax.tree.map(
        lambda x: x.astype(settings.weight_dtype) if eqx.is_inexact_array(x) else x, module
    )


def in_mode(module: Any, model_mode: str) -> Any:
    """Tells callable layers the mode."""

    def is_callable_layer(x: Any) -> bool:
        return isinstance(x, CallableLayer)

    return jax.tree.map(
        lambda x: CallableLayer(x.function, model_mode) if is_callable_layer(x) else x,
        module,
        is_leaf=is_callable_layer,
    )
