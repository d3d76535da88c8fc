"""One MTP layer, around a transformer layer that can be restated in a line."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from jaxtyping import Array, PRNGKeyArray

from equinox_mtp import (
    AbstractDecoderLayer,
    MTPConfig,
    MultiTokenPredictionLayer,
    nn,
)

_BATCH, _SEQ, _EMBED, _EPSILON = 2, 5, 8, 0.3


class _ToyLayer(AbstractDecoderLayer):
    """tanh(x · gain) + position + 10 · segment."""

    gain: Array

    def __init__(self, *, key: PRNGKeyArray):
        self.gain = jax.random.normal(key, (_EMBED,))

    def __call__(
        self, hidden_states: Array, *, position_ids: Array, segment_ids: Array | None = None, **_
    ) -> Array:
        assert segment_ids is not None
        return jnp.tanh(hidden_states * self.gain) + (position_ids + 10 * segment_ids)[..., None]


class _EchoLayer(AbstractDecoderLayer):
    """Returns its input, and as auxiliary output everything else it was given."""

    def __init__(self, *, key: PRNGKeyArray):
        del key

    def __call__(self, hidden_states: Array, **arguments: Any) -> tuple[Array, dict[str, Any]]:
        return hidden_states, arguments


def _make(make_layer: Callable[..., Any], seed: int = 0, **fields: Any) -> Any:
    def make(key: PRNGKeyArray) -> MultiTokenPredictionLayer:
        return MultiTokenPredictionLayer(
            MTPConfig(1, **fields), make_layer, embed_size=_EMBED, norm_epsilon=_EPSILON, key=key
        )

    return build(make, seed)


@pytest.fixture
def inputs() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shape = (_BATCH, _SEQ, _EMBED)
    return {
        "hidden_states": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "token_embeddings": jnp.asarray(3 * rng.normal(size=shape), jnp.float32),
        "position_ids": jnp.asarray([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
        "segment_ids": jnp.asarray([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]),
    }


def _norm(x: np.ndarray, scale: Any) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + _EPSILON) * np.asarray(scale)


@pytest.mark.parametrize("concat_order", ["embedding_first", "hidden_first"])
@pytest.mark.parametrize("output_norm", ["shared", "own"])
def test_formula(inputs: dict[str, Array], concat_order: str, output_norm: str):
    layer = _make(_ToyLayer, concat_order=concat_order, output_norm=output_norm)
    with jax.default_matmul_precision("highest"):
        actual, auxiliary = layer(**inputs)
    float64 = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    embedding = _norm(float64["token_embeddings"], layer.embedding_norm.scale)
    hidden = _norm(float64["hidden_states"], layer.hidden_state_norm.scale)
    parts = [embedding, hidden] if concat_order == "embedding_first" else [hidden, embedding]
    kernel = np.asarray(layer.projection_layer.kernel, np.float64)
    projected = parts[0] @ kernel[:_EMBED] + parts[1] @ kernel[_EMBED:]
    row = float64["position_ids"] + 10 * float64["segment_ids"]
    expected = np.tanh(projected * np.asarray(layer.transformer_layer.gain)) + row[..., None]
    assert_close(actual, expected)
    assert auxiliary is None


def test_concat_orders_differ_by_a_swap_of_the_kernel(inputs: dict[str, Array]):
    first = _make(_ToyLayer, concat_order="embedding_first")
    other = _make(_ToyLayer, 1, concat_order="hidden_first")
    swapped = jnp.roll(first.projection_layer.kernel, _EMBED, axis=0)
    where = lambda m: (  # noqa: E731
        m.embedding_norm,
        m.hidden_state_norm,
        m.transformer_layer,
        m.projection_layer.kernel,
    )
    other = eqx.tree_at(where, other, (*where(first)[:3], swapped))
    assert_close(other(**inputs)[0], first(**inputs)[0], rtol=1e-6)
    unswapped = eqx.tree_at(lambda m: m.projection_layer.kernel, other, where(first)[3])
    assert float(jnp.abs(unswapped(**inputs)[0] - first(**inputs)[0]).max()) > 0.1


def test_own_output_norm_is_held_but_not_applied(inputs: dict[str, Array]):
    assert _make(_ToyLayer).output_norm is None
    layer = _make(_ToyLayer, output_norm="own")
    assert isinstance(layer.output_norm, nn.RMSNorm)
    assert layer.output_norm.epsilon == _EPSILON
    scaled = eqx.tree_at(lambda m: m.output_norm.scale, layer, jnp.full(_EMBED, 7.0))
    np.testing.assert_array_equal(scaled(**inputs)[0], layer(**inputs)[0])


def test_passes_everything_on_and_returns_auxiliary_outputs(
    getkey: Callable[[], PRNGKeyArray], inputs: dict[str, Array]
):
    layer = _make(_EchoLayer)
    key = getkey()
    projected, auxiliary = layer(**inputs, key=key, inference=True)
    assert projected.shape == (_BATCH, _SEQ, _EMBED)
    assert auxiliary["position_ids"] is inputs["position_ids"]
    assert auxiliary["segment_ids"] is inputs["segment_ids"]
    assert auxiliary["key"] is key
    assert auxiliary["inference"] is True
    del inputs["segment_ids"]
    _, auxiliary = layer(**inputs)
    assert (auxiliary["segment_ids"], auxiliary["key"], auxiliary["inference"]) == (None,) * 3


def test_initial_values(getkey: Callable[[], PRNGKeyArray]):
    config = MTPConfig(output_norm="own")
    make = partial(MultiTokenPredictionLayer, config, _ToyLayer, embed_size=256)
    layer = quick_jit(make)(key=getkey())
    for norm in (layer.embedding_norm, layer.hidden_state_norm, layer.output_norm):
        assert norm is not None
        np.testing.assert_array_equal(norm.scale, np.ones(256))
        assert norm.epsilon == 1e-5
    kernel = layer.projection_layer.kernel
    assert kernel.shape == (512, 256)
    assert abs(float(jnp.std(kernel)) * 512**0.5 - 1) < 0.02


def test_make_layer_must_make_a_decoder_layer(getkey: Callable[[], PRNGKeyArray]):
    def make_layer(*, key: PRNGKeyArray) -> eqx.nn.Linear:
        return eqx.nn.Linear(_EMBED, _EMBED, key=key)

    with pytest.raises(TypeError, match=r"`make_layer` must return an `AbstractDecoderLayer`.*got"):
        MultiTokenPredictionLayer(MTPConfig(), make_layer, embed_size=_EMBED, key=getkey())
