"""A model in MaxText's style around the shim: its configuration, decoder and golden parameters."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import golden
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

import equinox_mtp as emtp
from equinox_mtp import linen, nn

LAMBDA = 0.1


def make_config(num_depths: int = 1, eval_depth: int = 0, **overrides: Any) -> SimpleNamespace:
    """The attributes of MaxText's configuration, with the golden model's sizes."""
    return SimpleNamespace(
        **{
            "mtp_num_layers": num_depths,
            "mtp_loss_scaling_factor": LAMBDA,
            "mtp_eval_target_module": eval_depth,
            "emb_dim": 64,
            "mlp_dim": 128,
            "num_query_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "vocab_size": 256,
            "rope_max_timescale": 10_000,
            "normalization_layer_epsilon": 1e-5,
            "dtype": "float32",
            "weight_dtype": "float32",
            **overrides,
        }
    )


class Decoder(eqx.Module):
    """The two methods that MaxText's block calls."""

    decoder_norm: nn.RMSNorm
    head: Array

    def _apply_embedding(
        self,
        shared_embedding: Array,
        input_ids: Array,
        position_ids: Array,
        deterministic: bool,
        *,
        model_mode: str,
    ) -> Array:
        assert input_ids.shape == position_ids.shape
        assert isinstance(deterministic, bool)
        assert model_mode in ("train", "eval", "prefill")
        return shared_embedding[input_ids]

    def apply_output_head(
        self, shared_embedding: Array, hidden_states: Array, deterministic: bool, model_mode: str
    ) -> Array:
        return self.decoder_norm(hidden_states) @ self.head

    def apply_output_projection(
        self, shared_embedding: Array, hidden_states: Array, deterministic: bool, model_mode: str
    ) -> Array:
        return hidden_states @ self.head


def make_decoder() -> Decoder:
    """With arrays of ones, to be replaced by parameters."""
    return Decoder(nn.RMSNorm(64), jnp.ones((64, 256)))


def make_block(config: Any, decoder: Any = None, **arguments: Any) -> linen.LinenBlock:
    return linen.multi_token_prediction_block_as_linen(
        **{
            "config": config,
            "mesh": None,
            "transformer_layer_module": nn.TransformerDecoderLayer,
            "decoder": make_decoder() if decoder is None else decoder,
            "rngs": None,
            "name": "mtp_block",
            **arguments,
        }
    )


def golden_params(num_depths: int) -> dict[str, np.ndarray]:
    """The golden parameters of block and decoder, as they are named in the recording."""
    params = golden.load_numbers("params")
    depths = tuple(f"mtp_block.mtp_layer_{k}." for k in range(1, num_depths + 1))
    return {
        name.removeprefix("mtp_block."): value
        for name, value in params.items()
        if name.startswith((*depths, "decoder."))
    }


def golden_inputs(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of MaxText's block in one recorded case."""
    numbers = golden.load_numbers(name)
    embedding = jnp.asarray(golden.load_numbers("params")["token_embedder.embedding"])
    names = ("main_hidden_state", "input_ids", "target_ids", "target_mask")
    args = (embedding, *(jnp.asarray(numbers[f"in/{name}"]) for name in names))
    return args, {
        "position_ids": jnp.asarray(numbers["in/position_ids"]),
        "decoder_segment_ids": jnp.asarray(numbers["in/decoder_segment_ids"]),
        "model_mode": "train",
        "deterministic": True,
    }


# A model that compiles quickly

VOCAB, EMBED, BATCH, SEQ = 11, 8, 2, 7


class ToyLayer(emtp.AbstractDecoderLayer):
    """Quick to compile; tells positions, documents and dropout apart."""

    gain: Array

    def __init__(self, *, key: PRNGKeyArray):
        self.gain = jax.random.normal(key, (EMBED,))

    def __call__(
        self,
        hidden_states: Array,
        *,
        position_ids: Array,
        segment_ids: Array | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Array:
        x = hidden_states * self.gain.astype(hidden_states.dtype)
        x += 0.1 * position_ids[..., None].astype(x.dtype)
        if segment_ids is not None:
            x += 0.01 * segment_ids[..., None].astype(x.dtype)
        if not inference:
            assert key is not None
            x += jax.random.normal(key, x.shape, x.dtype)
        return jnp.tanh(x)


class MaxTextLayer(eqx.Module):
    """The same with MaxText's constructor and call."""

    inner: ToyLayer

    def __init__(self, config: Any, mesh: Any, model_mode: str, rngs: PRNGKeyArray):
        assert config.emb_dim == EMBED
        self.inner = ToyLayer(key=rngs)

    def __call__(
        self,
        inputs: Array,
        decoder_segment_ids: Array | None,
        decoder_positions: Array,
        deterministic: bool,
        model_mode: str,
    ) -> tuple[Array, None]:
        assert model_mode in ("train", "eval")
        outputs = self.inner(
            inputs,
            position_ids=decoder_positions,
            segment_ids=decoder_segment_ids,
            inference=deterministic,
        )
        return outputs, None


class ToyDecoder(emtp.AbstractDecoder):
    """Tied embeddings, with a norm before the head."""

    embedding: Array
    norm: nn.RMSNorm

    def embed(self, input_ids: Array, position_ids: Array) -> Array:
        return self.embedding[input_ids]

    def __call__(self, input_ids: Array, **arguments: Any) -> Array:
        return self.embedding[input_ids]

    def final_norm(self, hidden_states: Array) -> Array:
        return self.norm(hidden_states)

    def output_head(self) -> Array:
        return self.embedding


def toy_config(num_depths: int = 2, eval_depth: int = 2, **overrides: Any) -> Any:
    return make_config(num_depths, eval_depth, **{"emb_dim": EMBED, **overrides})


def toy_decoder() -> ToyDecoder:
    embedding = np.random.default_rng(7).normal(size=(VOCAB, EMBED))
    return ToyDecoder(jnp.asarray(embedding, jnp.float32), nn.RMSNorm(EMBED))


def toy_block(config: Any = None, **arguments: Any) -> linen.LinenBlock:
    return make_block(
        toy_config() if config is None else config,
        **{"decoder": toy_decoder(), "transformer_layer_module": ToyLayer, **arguments},
    )


SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)


def toy_inputs(**overrides: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (BATCH, SEQ + 1)).astype(np.int32)
    return {
        "shared_embedding": None,
        "main_hidden_state": jnp.asarray(rng.normal(size=(BATCH, SEQ, EMBED)), jnp.float32),
        "input_ids": jnp.asarray(tokens[:, :-1]),
        "target_ids": jnp.asarray(tokens[:, 1:]),
        "target_mask": jnp.asarray(SEGMENTS),
        "position_ids": jnp.asarray(np.tile(np.arange(SEQ, dtype=np.int32), (BATCH, 1))),
        "decoder_segment_ids": jnp.asarray(SEGMENTS),
        "model_mode": "train",
        "deterministic": True,
        **overrides,
    }


def library_output(block: linen.LinenBlock, variables: Any, inputs: dict[str, Any]) -> Any:
    """What the library's own block says of the same."""
    like = eqx.filter_eval_shape(
        lambda key: emtp.MultiTokenPredictionBlock(
            emtp.MTPConfig.preset("maxtext", block.config.mtp_num_layers),
            ToyLayer,
            embed_size=EMBED,
            key=key,
        ),
        jax.random.key(0),
    )
    rows = {"segment_ids": inputs["decoder_segment_ids"], "position_ids": inputs["position_ids"]}
    targets = emtp.align_targets(
        *(inputs[name] for name in ("input_ids", "target_ids", "target_mask")),
        num_depths=block.config.mtp_num_layers,
        **rows,
    )
    module = linen.from_linen_params(variables, like)
    return eqx.filter_jit(module)(
        toy_decoder(), inputs["main_hidden_state"], targets, inference=True, **rows
    )


def get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
