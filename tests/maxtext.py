"""A model in MaxText's style around the shim: its configuration, decoder and golden parameters."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import golden
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from equinox_mtp import nn
from equinox_mtp.linen import LinenBlock, multi_token_prediction_block_as_linen

LAMBDA = 0.1


def make_config(num_depths: int = 1, eval_depth: int = 0, **overrides: Any) -> SimpleNamespace:
    """The attributes of the original's configuration, with the golden model's sizes."""
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
    """The two methods that the original's block calls."""

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


def make_block(config: Any, decoder: Any = None, **arguments: Any) -> LinenBlock:
    return multi_token_prediction_block_as_linen(
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
    """The arguments of the original's block in one recorded case."""
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
