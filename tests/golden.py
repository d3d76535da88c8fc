"""MaxText system's numbers in `tests/data`, loaded into this library's modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from equinox_mtp import (
    AbstractDecoder,
    MTPConfig,
    MTPTargets,
    MultiTokenPredictionBlock,
    MultiTokenPredictionLayer,
    align_targets,
    nn,
)

_DATA = Path(__file__).parent / "data"
_TRANSFORMER = nn.TransformerConfig(
    vocab_size=256, embed_size=64, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=128
)

# Where MaxText's parameters stand in ours. The decoder's head is transposed.
_LAYER_PARAMETERS: dict[str, Callable[[MultiTokenPredictionLayer], Any]] = {
    "embedding_norm.scale": lambda m: m.embedding_norm.scale,
    "hidden_state_norm.scale": lambda m: m.hidden_state_norm.scale,
    "projection.kernel": lambda m: m.projection_layer.kernel,
    **{
        f"transformer_layer.{name}": lambda m, where=where: where(m.transformer_layer)
        for name, where in {
            "pre_self_attention_layer_norm.scale": lambda m: m.attention_norm.scale,
            "self_attention.query.kernel": lambda m: m.attention.query_kernel,
            "self_attention.key.kernel": lambda m: m.attention.key_kernel,
            "self_attention.value.kernel": lambda m: m.attention.value_kernel,
            "self_attention.out.kernel": lambda m: m.attention.out_kernel,
            "post_self_attention_layer_norm.scale": lambda m: m.feed_forward_norm.scale,
            "mlp.wi_0.kernel": lambda m: m.feed_forward.gate.kernel,
            "mlp.wi_1.kernel": lambda m: m.feed_forward.up.kernel,
            "mlp.wo.kernel": lambda m: m.feed_forward.down.kernel,
        }.items()
    },
}


class GoldenDecoder(AbstractDecoder):
    """What the block borrows: embedding, final norm, untied head."""

    embedding: Float[Array, "vocab embed"]
    norm: nn.RMSNorm
    head: Float[Array, "vocab embed"]

    def embed(
        self, input_ids: Integer[Array, "batch seq"], position_ids: Integer[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        return self.embedding[input_ids]

    def __call__(self, input_ids: Integer[Array, "batch seq"], **kwargs: Any) -> Array:
        raise NotImplementedError("the main model's hidden states are recorded")

    def final_norm(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        return self.norm(hidden_states)

    def output_head(self) -> Float[Array, "vocab embed"]:
        return self.head


def load_numbers(name: str) -> dict[str, np.ndarray]:
    """`"params"`, `"a"` (one document a row) or `"c"` (packed rows)."""
    with np.load(_DATA / f"llama_{name}.npz") as numbers:
        return {key: numbers[key] for key in numbers.files}


def load_decoder() -> GoldenDecoder:
    params = load_numbers("params")
    norm = eqx.tree_at(
        lambda m: m.scale, nn.RMSNorm(64), jnp.asarray(params["decoder.decoder_norm.scale"])
    )
    return GoldenDecoder(
        embedding=jnp.asarray(params["token_embedder.embedding"]),
        norm=norm,
        head=jnp.asarray(params["decoder.head"].T),
    )


def load_block(num_depths: int) -> MultiTokenPredictionBlock:
    config = MTPConfig.preset("maxtext", num_depths)
    layers = [_load_layer(config, depth) for depth in range(1, num_depths + 1)]
    return MultiTokenPredictionBlock.from_layers(config, layers)


def load_targets(numbers: dict[str, np.ndarray], num_depths: int) -> MTPTargets:
    return align_targets(
        numbers["in/input_ids"],
        numbers["in/target_ids"],
        numbers["in/target_mask"],
        num_depths=num_depths,
        segment_ids=numbers["in/decoder_segment_ids"],
        position_ids=numbers["in/position_ids"],
    )


def named_gradients(
    decoder: GoldenDecoder, block: MultiTokenPredictionBlock, main_hidden_state: Array
) -> dict[str, np.ndarray]:
    """Gradients of the three, under MaxText's names and in its layouts."""
    gradients = {
        "token_embedder.embedding": decoder.embedding,
        "decoder.decoder_norm.scale": decoder.norm.scale,
        "decoder.head": decoder.head.T,
        "main_hidden_state": main_hidden_state,
    }
    for depth in range(1, block.config.num_depths + 1):
        for name, where in _LAYER_PARAMETERS.items():
            gradients[_original_name(depth, name)] = where(block.layer(depth))
    return {name: np.asarray(gradient) for name, gradient in gradients.items()}


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`eqx.filter_jit` that compiles in half the time: for values, not for speed."""
    return eqx.filter_jit(function, compiler_options={"xla_backend_optimization_level": 0})  # pyright: ignore[reportCallIssue]


def relative_error(actual: Any, expected: Any) -> float:
    """max |actual - expected| / max |expected|."""
    expected = np.asarray(expected, np.float64)
    return float(np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.abs(expected).max())


def build(make: Callable[..., Any], seed: int = 0) -> Any:
    """`make(key=key)` with parameters drawn by NumPy, norms' scales too: nothing compiles."""
    rng = np.random.default_rng(seed)
    skeleton = eqx.filter_eval_shape(lambda key: make(key=key), jax.random.key(0))

    def fill(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        values = 0.25 * rng.normal(size=leaf.shape)
        if jax.tree_util.keystr(path).endswith(".scale"):
            values += 1
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, skeleton)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    """|actual - expected| <= rtol · max |expected|, as a whole and element by element.

    The first measure is `relative_error`. The second adds `rtol · |expected|` of leeway to each
    element, and names those that are off.
    """
    expected = np.asarray(expected, np.float64)
    atol = rtol * float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=atol)
    if expected.any():
        assert relative_error(actual, expected) <= rtol
    else:
        np.testing.assert_array_equal(actual, expected)


def _original_name(depth: int, name: str) -> str:
    return f"mtp_block.mtp_layer_{depth}.mtp_{depth}_{name}"


def _make_layer(*, key: PRNGKeyArray) -> nn.TransformerDecoderLayer:
    # MaxText folds 1/sqrt(head_dim) into the query's initial values.
    layer = nn.TransformerDecoderLayer(_TRANSFORMER, key=key)
    attention = nn.GroupedQueryAttention(64, 4, 2, 16, scale=1.0, key=key)
    return eqx.tree_at(lambda m: m.attention, layer, attention)


def _load_layer(config: MTPConfig, depth: int) -> MultiTokenPredictionLayer:
    params = load_numbers("params")
    layer = build(
        lambda key: MultiTokenPredictionLayer(config, _make_layer, embed_size=64, key=key)
    )
    for name, where in _LAYER_PARAMETERS.items():
        value = jnp.asarray(params[_original_name(depth, name)])
        assert where(layer).shape == value.shape
        layer = eqx.tree_at(where, layer, value)
    return layer
