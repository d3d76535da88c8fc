"""What optimizers are told of parameters: stacked layers are updated as if they stood alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close
from jaxtyping import PRNGKeyArray

import equinox_mtp as emtp

SIZES = emtp.nn.TransformerConfig(
    vocab_size=11, embed_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=10
)
LEARNING_RATE = 0.05

# Written by hand: kernels and how their axes form a matrix, from inputs to outputs.
MATRICES = {
    "projection_layer.kernel": (16, 8),
    "attention.query_kernel": (8, 4 * 6),
    "attention.key_kernel": (8, 2 * 6),
    "attention.value_kernel": (8, 2 * 6),
    "attention.out_kernel": (4 * 6, 8),
    "feed_forward.gate.kernel": (8, 10),
    "feed_forward.up.kernel": (8, 10),
    "feed_forward.down.kernel": (10, 8),
}


def make_model(*, tie_embeddings: bool, key: PRNGKeyArray) -> emtp.MTPModel:
    config = emtp.nn.TransformerConfig(**{**vars(SIZES), "tie_embeddings": tie_embeddings})
    keys = jax.random.split(key)
    return emtp.MTPModel(
        emtp.nn.TransformerDecoder(config, key=keys[0]),
        emtp.MultiTokenPredictionBlock(
            emtp.MTPConfig.preset("deepseek_v3", 3),
            partial(emtp.nn.TransformerDecoderLayer, config),
            embed_size=8,
            key=keys[1],
        ),
    )


def named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def normal_like(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


@eqx.filter_jit
def two_updates(optimizer: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    """The second step's, so that momenta count."""
    state = optimizer.init(params)
    _, state = optimizer.update(grads[0], state, params)
    return optimizer.update(grads[1], state, params)[0]


def matrix_shape(name: str) -> tuple[int, int] | None:
    return next((shape for end, shape in MATRICES.items() if name.endswith(end)), None)


def as_matrices(tree: dict[str, Any]) -> dict[str, Any]:
    return {n: x.reshape(s) if (s := matrix_shape(n)) else x for n, x in tree.items()}


def layers_of(model: emtp.MTPModel) -> list[Any]:
    depths = range(1, model.block.config.num_depths + 1)
    decoder: Any = model.decoder
    return [
        *(model.block.layer(depth) for depth in depths),
        *(decoder.layer(index) for index in range(decoder.num_layers)),
    ]


def muon(**options: Any) -> optax.GradientTransformation:
    # Its scale goes by √(outputs / inputs): it tells the one from the other.
    return optax.contrib.muon(LEARNING_RATE, weight_decay=0.1, adam_weight_decay=0.0, **options)


def adamw(mask: Any) -> optax.GradientTransformation:
    return optax.adamw(LEARNING_RATE, weight_decay=0.1, mask=mask)


def vectors_and_vocab(model: Any) -> dict[str, Any]:
    decoder = model.decoder
    return {"embedding": decoder.embedding, "head": decoder.head, "scale": decoder.norm.scale}


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize(
    ("optimizer", "optimizer_of_a_layer", "optimizer_of_vocab"),
    [
        # Of its own accord Muon takes arrays of two axes for matrices, and nothing else.
        (
            muon(muon_weight_dimension_numbers=emtp.muon_dimension_numbers),
            muon(),
            optax.nadamw(LEARNING_RATE, weight_decay=0.0),
        ),
        (
            adamw(emtp.weight_decay_mask),
            adamw(lambda tree: {name: x.ndim == 2 for name, x in tree.items()}),
            adamw(lambda tree: {name: name != "scale" for name in tree}),
        ),
    ],
    ids=["muon", "adamw"],
)
def test_a_stack_is_updated_layer_by_layer(
    optimizer: optax.GradientTransformation,
    optimizer_of_a_layer: optax.GradientTransformation,
    optimizer_of_vocab: optax.GradientTransformation,
    tie_embeddings: bool,
    getkey: Callable[[], PRNGKeyArray],
) -> None:
    model = make_model(tie_embeddings=tie_embeddings, key=getkey())
    params = eqx.filter(model, eqx.is_inexact_array)
    grads = [normal_like(params, seed) for seed in range(2)]
    trees = (params, *grads, two_updates(optimizer, params, grads))

    for layer in zip(*map(layers_of, trees), strict=True):
        *inputs, update = (as_matrices(named(tree)) for tree in layer)
        expected = two_updates(optimizer_of_a_layer, inputs[0], inputs[1:])
        assert set(update) == set(expected)
        assert sum(x.ndim == 2 for x in update.values()) >= 7
        for name, x in expected.items():
            assert_close(update[name], x, rtol=2e-4, atol=2e-6)

    *inputs, update = map(vectors_and_vocab, trees)
    expected = two_updates(optimizer_of_vocab, inputs[0], inputs[1:])
    assert (expected["head"] is None) == tie_embeddings
    jax.tree.map(assert_close, update, expected)


def test_weight_decay_spares_vectors() -> None:
    model = eqx.filter_eval_shape(partial(make_model, tie_embeddings=False), key=jax.random.key(0))
    mask = named(emtp.weight_decay_mask(eqx.filter(model, lambda x: hasattr(x, "shape"))))
    spared = {name for name, decays in mask.items() if not decays}
    assert spared == {
        "decoder.norm.scale",
        *(f"decoder.layers.{part}_norm.scale" for part in ("attention", "feed_forward")),
        *(f"block.layers.{part}_norm.scale" for part in ("embedding", "hidden_state", "output")),
        *(
            f"block.layers.transformer_layer.{part}_norm.scale"
            for part in ("attention", "feed_forward")
        ),
    }
    assert len(mask) - len(spared) == 2 + 7 + 8


def test_layers_of_equinox_are_known(getkey: Callable[[], PRNGKeyArray]) -> None:
    def make(key: PRNGKeyArray) -> list[Any]:
        linear = eqx.nn.Linear(3, 5, key=key)
        return [linear, eqx.nn.LayerNorm(3), eqx.nn.RMSNorm(3), eqx.nn.Embedding(7, 3, key=key)]

    stacked = eqx.filter_vmap(make)(jax.random.split(getkey(), 2))
    decays = [[*named(part).values()] for part in emtp.weight_decay_mask(stacked)]
    assert decays == [[True, False], [False, False], [False, False], [True]]

    numbers = emtp.muon_dimension_numbers(stacked)
    assert numbers[0].weight == optax.contrib.MuonDimensionNumbers((-1,), (-2,))
    others = [numbers[0].bias, numbers[1].weight, numbers[1].bias, numbers[2].weight]
    assert [*others, numbers[3].weight] == [None] * 5


def test_what_is_no_parameter(getkey: Callable[[], PRNGKeyArray]) -> None:
    head = emtp.LinearHead(jnp.ones((3, 2)), bias=jnp.ones(3))
    tree = {"head": head, "ids": jnp.ones((4, 4), jnp.int32), "function": jnp.tanh, "none": None}
    assert emtp.count_parameters(tree) == 9
    mask, numbers = emtp.weight_decay_mask(tree), emtp.muon_dimension_numbers(tree)
    assert (mask["head"].weight, mask["head"].bias) == (True, False)
    assert (mask["ids"], mask["function"], mask["none"]) == (False, False, None)
    assert jax.tree.leaves(numbers) == []


@pytest.mark.parametrize(("tie_embeddings", "matrices_of_vocab"), [(True, 1), (False, 2)])
def test_count_parameters(tie_embeddings: bool, matrices_of_vocab: int) -> None:
    model = eqx.filter_eval_shape(
        partial(make_model, tie_embeddings=tie_embeddings), key=jax.random.key(0)
    )
    projection, *layer = (int(np.prod(shape)) for shape in MATRICES.values())
    layer = sum(layer) + 2 * 8
    expected = matrices_of_vocab * 11 * 8 + 8 + 2 * layer + 3 * (layer + projection + 3 * 8)
    assert emtp.count_parameters(model) == expected


class LayerScale(emtp.AbstractDecoderLayer):
    """Parameters without axis words."""

    scale: jax.Array
    kernel: jax.Array

    def __call__(self, hidden_states: Any, **unused: Any) -> Any:
        return hidden_states @ self.kernel * self.scale


def test_vectors_without_axis_words_are_vectors_in_a_stack() -> None:
    block = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig(2),
        lambda key: LayerScale(jnp.ones(8), jax.random.normal(key, (8, 8))),
        embed_size=8,
        key=jax.random.key(0),
    )
    assert block.layers is not None
    layer: Any = emtp.weight_decay_mask(block).layers.transformer_layer
    assert (layer.scale, layer.kernel) == (False, True)
