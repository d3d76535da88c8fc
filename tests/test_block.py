"""The block against an explicit loop over depths, with full logits and optax."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import assert_close, build, quick_jit
from helpers import align_oracle
from jaxtyping import Array, PRNGKeyArray, PyTree

from equinox_mtp import (
    AbstractDecoder,
    AbstractDecoderLayer,
    LinearHead,
    MTPConfig,
    MTPLosses,
    MTPModel,
    MTPOutput,
    MultiTokenPredictionBlock,
    MultiTokenPredictionLayer,
    align_targets,
    calculate_mtp_acceptance_rate,
    calculate_mtp_loss,
    linear_cross_entropy,
    nn,
)
from equinox_mtp._losses import Objective
from equinox_mtp._types import MakeLayer
from equinox_mtp.cross_entropy import _weighted_losses

_VOCAB, _EMBED, _SEQ = 29, 16, 12
_TRANSFORMER = nn.TransformerConfig(
    vocab_size=_VOCAB,
    embed_size=_EMBED,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    mlp_size=24,
    tie_embeddings=False,
)
_SEGMENTS = np.asarray([[1] * 5 + [2] * 4 + [3] * 3, [1] * 4 + [2] * 6 + [0] * 2])
_POSITIONS = np.asarray([[*range(5), *range(4), *range(3)], [*range(4), *range(6), 0, 0]])


class _Batch(NamedTuple):
    input_ids: np.ndarray
    target_ids: np.ndarray
    target_mask: np.ndarray

    def targets(self, num_depths: int):
        return align_targets(
            *self, num_depths=num_depths, segment_ids=_SEGMENTS, position_ids=_POSITIONS
        )


class _Parts(NamedTuple):
    """Whatever takes a gradient."""

    decoder: nn.TransformerDecoder
    block: MultiTokenPredictionBlock
    hidden_states: Array


@pytest.fixture
def batch() -> _Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, _VOCAB, (2, _SEQ + 1))
    following = np.concatenate([_SEGMENTS[:, 1:], np.zeros((2, 1), int)], axis=1)
    mask = (following == _SEGMENTS) & (rng.random((2, _SEQ)) < 0.8)
    return _Batch(tokens[:, :-1], tokens[:, 1:], mask)


class _ToyLayer(AbstractDecoderLayer):
    """Quick to compile, for where the transformer layer does not matter."""

    gain: Array

    def __init__(self, *, key: PRNGKeyArray):
        self.gain = jax.random.normal(key, (_EMBED,))

    def __call__(self, hidden_states: Array, **_: Any) -> Array:
        return hidden_states + jnp.tanh(hidden_states * self.gain.astype(hidden_states.dtype))


_transformer_layer = partial(nn.TransformerDecoderLayer, _TRANSFORMER)


def _make_block(
    config: MTPConfig, seed: int = 0, make_layer: MakeLayer = _transformer_layer
) -> MultiTokenPredictionBlock:
    return build(
        lambda key: MultiTokenPredictionBlock(config, make_layer, embed_size=_EMBED, key=key), seed
    )


def _make_parts(config: MTPConfig, make_layer: MakeLayer = _transformer_layer) -> _Parts:
    hidden_states = 2 * np.random.default_rng(0).normal(size=(2, _SEQ, _EMBED))
    return _Parts(
        decoder=build(lambda key: nn.TransformerDecoder(_TRANSFORMER, key=key)),
        block=_make_block(config, make_layer=make_layer),
        hidden_states=jnp.asarray(hidden_states, jnp.float32),
    )


def _run(parts: _Parts, targets: Any, **arguments: Any) -> MTPOutput:
    rows = {"position_ids": jnp.asarray(_POSITIONS), "segment_ids": jnp.asarray(_SEGMENTS)}
    return parts.block(parts.decoder, parts.hidden_states, targets, **{**rows, **arguments})


def _total(losses: MTPLosses) -> Array:
    """A scalar in which every depth has a weight of its own."""
    return jnp.sum(losses.losses * jnp.arange(1, losses.losses.size + 1)) / 10


@quick_jit
def _forward(parts: _Parts, targets: Any, **arguments: Any) -> MTPOutput:
    return _run(parts, targets, **arguments)


@quick_jit
@partial(eqx.filter_value_and_grad, has_aux=True)
def _fast(
    parts: _Parts, targets: Any, total: Objective = _total, **arguments: Any
) -> tuple[Array, MTPOutput]:
    output = _run(parts, targets, **arguments)
    return total(output.losses), output


@quick_jit
@partial(eqx.filter_value_and_grad, has_aux=True)
def _oracle(
    parts: _Parts,
    aligned: dict[str, Array],
    total: Objective = _total,
    z_loss_weight: float | Array = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Restates all but norms and the transformer layer: one depth a time, with full logits."""
    decoder, block, hidden = parts
    config, layers = block.config, block.layers
    assert layers is not None
    if config.input_hidden_state == "after_norm":
        hidden = decoder.norm(hidden)
    names = ("losses", "weights", "z_losses", "hidden", "ids")
    results: dict[str, list[Array]] = {name: [] for name in names}
    for depth in range(1, config.num_depths + 1):
        ids, labels, mask = (aligned[name][depth - 1] for name in _ALIGNED)
        index = 0 if config.repeated_layer else depth - 1
        layer = jax.tree.map(lambda x, index=index: x[index] if eqx.is_array(x) else x, layers)
        concatenated = [
            layer.embedding_norm(decoder.embedding[ids]),
            layer.hidden_state_norm(hidden),
        ]
        if config.concat_order == "hidden_first":
            concatenated.reverse()
        hidden = layer.transformer_layer(
            jnp.concatenate(concatenated, -1) @ layer.projection_layer.kernel,
            position_ids=jnp.asarray(_POSITIONS),
            segment_ids=jnp.asarray(_SEGMENTS),
        )
        normed = (decoder.norm if config.output_norm == "shared" else layer.output_norm)(hidden)
        logits = _all_logits(decoder, normed)
        token_losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        z_losses = z_loss_weight * jax.nn.logsumexp(logits, axis=-1) ** 2
        results["hidden"].append(hidden)
        results["ids"].append(jnp.argmax(logits, -1))
        results["losses"].append(jnp.sum((token_losses + z_losses) * mask))
        results["z_losses"].append(jnp.sum(z_losses * mask))
        results["weights"].append(jnp.sum(mask, dtype=jnp.float32))
        if config.carried_hidden_state == "after_norm":
            hidden = normed
    stacked = {name: jnp.stack(values) for name, values in results.items()}
    return total(MTPLosses(stacked["losses"], stacked["weights"])), stacked


def _all_logits(decoder: Any, normed: Array) -> Array:
    logits = normed @ decoder.head.T
    if isinstance(decoder, _SoftCappedDecoder):
        logits = 3 * jnp.tanh((logits + decoder.bias) / 3)
    return logits


_ALIGNED = ("input_ids", "target_ids", "mask")


def _align(batch: _Batch, num_depths: int) -> dict[str, Array]:
    aligned = align_oracle(
        *batch, num_depths=num_depths, segment_ids=_SEGMENTS, position_ids=_POSITIONS
    )
    return {name: jnp.asarray(aligned[name]) for name in _ALIGNED}


def _assert_trees_close(actual: PyTree, expected: PyTree, rtol: float = 1e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, rtol)


_CONVENTIONS = {
    "paper": MTPConfig.preset("paper", 2),
    "maxtext": MTPConfig.preset("maxtext", 2),
    "deepseek_v3": MTPConfig.preset("deepseek_v3", 2),
    "megatron": MTPConfig.preset("megatron", 2),
    "fast_mtp": MTPConfig.preset("fast_mtp", 3),
    "shared-carried": MTPConfig(2, carried_hidden_state="after_norm", concat_order="hidden_first"),
    "shared-input": MTPConfig(1, input_hidden_state="after_norm", repeated_layer=True),
}


@pytest.mark.parametrize("name", _CONVENTIONS)
def test_conventions(batch: _Batch, name: str):
    config = _CONVENTIONS[name]
    # One case shows that positions and segments reach the layer; the rest compile quickly.
    parts = _make_parts(config, _transformer_layer if name == "paper" else _ToyLayer)
    with jax.default_matmul_precision("highest"):
        (loss, output), gradients = _fast(parts, batch.targets(config.num_depths))
        (expected_loss, expected), expected_gradients = _oracle(
            parts, _align(batch, config.num_depths)
        )
    assert_close(loss, expected_loss)
    assert_close(output.losses.losses, expected["losses"])
    np.testing.assert_array_equal(output.losses.weights, expected["weights"])
    assert_close(output.hidden_states, expected["hidden"])
    np.testing.assert_array_equal(output.acceptance.predictions, expected["ids"])
    assert output.auxiliary is None
    _assert_trees_close(gradients, expected_gradients)
    # The main model's own layers take no part; everything else does.
    for gradient in jax.tree.leaves(_by_name(gradients)):
        assert np.abs(np.asarray(gradient)).max() > 1e-4


def test_conventions_differ(batch: _Batch):
    """No field is without effect on the same parameters: else the oracle would show nothing."""
    fields = {
        "concat_order": "hidden_first",
        "input_hidden_state": "after_norm",
        "carried_hidden_state": "after_norm",
    }
    configs = [MTPConfig(2)]
    configs += [dataclasses.replace(configs[0], **{name: fields[name]}) for name in fields]
    losses = [
        _forward(_make_parts(config, _ToyLayer), batch.targets(2)).losses.losses.sum()
        for config in configs
    ]
    assert len({round(float(loss), 2) for loss in losses}) == 4


def test_no_depths(batch: _Batch):
    parts = _make_parts(MTPConfig(0))
    assert parts.block.layers is None
    assert jax.tree.leaves(parts.block) == []
    (loss, output), gradients = _fast(parts, batch.targets(0))
    assert output.losses.losses.shape == output.losses.weights.shape == (0,)
    assert output.hidden_states.shape == (0, 2, _SEQ, _EMBED)
    assert output.acceptance.predictions.shape == (0, 2, _SEQ)
    assert output.auxiliary is None
    assert float(loss) == float(calculate_mtp_loss(output.losses)) == 0
    assert all(not x.any() for x in jax.tree.leaves(gradients))


def test_repeated_layer_is_one_layer(batch: _Batch):
    parts = _make_parts(MTPConfig(3, repeated_layer=True), _ToyLayer)
    layer = parts.block.layer(1)
    assert _shapes(parts.block) == _shapes(_make_block(MTPConfig(1), make_layer=_ToyLayer))
    for depth in (2, 3):
        assert bool(eqx.tree_equal(parts.block.layer(depth), layer))
    stacked = MultiTokenPredictionBlock.from_layers(MTPConfig(3), [layer] * 3)
    (loss, _), gradients = _fast(parts, batch.targets(3))
    (stacked_loss, _), stacked_gradients = _fast(parts._replace(block=stacked), batch.targets(3))
    assert_close(loss, stacked_loss)
    summed = jax.tree.map(lambda x: x.sum(0, keepdims=True), stacked_gradients.block.layers)
    _assert_trees_close(gradients.block.layers, summed)
    _assert_trees_close(gradients.decoder, stacked_gradients.decoder)


def _shapes(block: MultiTokenPredictionBlock) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(eqx.filter(block, eqx.is_array))]


@pytest.mark.parametrize("num_depths", [1, 3])
def test_from_layers_and_layer_are_inverse(num_depths: int):
    config = MTPConfig(num_depths)
    layers = [_make_block(MTPConfig(1), seed).layer(1) for seed in range(num_depths)]
    block = MultiTokenPredictionBlock.from_layers(config, layers)
    assert block.config == config
    taken = [block.layer(depth) for depth in range(1, num_depths + 1)]
    assert bool(eqx.tree_equal(taken, layers))
    assert bool(eqx.tree_equal(MultiTokenPredictionBlock.from_layers(config, taken), block))
    assert num_depths == 1 or not eqx.tree_equal(taken[0], taken[1])
    assert {shape[0] for shape in _shapes(block)} == {num_depths}


def test_from_layers_repeated():
    layer = _make_block(MTPConfig(1)).layer(1)
    config = MTPConfig(4, repeated_layer=True)
    block = MultiTokenPredictionBlock.from_layers(config, [layer])
    assert bool(eqx.tree_equal(block.layer(4), layer))


def _layer(config: MTPConfig | None = None, **transformer: Any) -> MultiTokenPredictionLayer:
    changed = dataclasses.replace(_TRANSFORMER, **transformer)
    make_layer = partial(nn.TransformerDecoderLayer, changed)
    return _make_block(config or MTPConfig(1), make_layer=make_layer).layer(1)


@pytest.mark.parametrize(
    ("config", "make_layers", "message"),
    [
        (MTPConfig(3), lambda: [_layer()] * 2, r"`layers` must hold 3 layer\(s\).*got 2"),
        (MTPConfig(0), lambda: [_layer()], r"`layers` must hold 0 layer\(s\).*got 1"),
        (
            MTPConfig(2, repeated_layer=True),
            lambda: [_layer()] * 2,
            r"`layers` must hold 1 layer\(s\).*repeated_layer=True.*got 2",
        ),
        (
            MTPConfig(2),
            lambda: [_layer(), _layer(MTPConfig(concat_order="hidden_first"))],
            "`concat_order` is 'embedding_first' there, and 'hidden_first' in the layer of depth 2",
        ),
        (
            MTPConfig(1),
            lambda: [_layer(MTPConfig(output_norm="own"))],
            "`output_norm` is 'shared' there, and 'own' in the layer of depth 1",
        ),
        (MTPConfig(2), lambda: [_layer(), _layer(mlp_size=32)], r"depth 2 differs.*gate\.kernel"),
        (MTPConfig(2), lambda: [_layer(), _layer(dropout_rate=0.5)], r"depth 2 differs"),
        (MTPConfig(2), lambda: [_layer(), _layer(rope_theta=5.0)], r"depth 2 differs.*static"),
    ],
    ids=["count", "no-depths", "repeated", "concat", "output-norm", "shape", "rate", "static"],
)
def test_from_layers_errors(
    config: MTPConfig, make_layers: Callable[[], list[MultiTokenPredictionLayer]], message: str
):
    layers = make_layers()
    with pytest.raises(ValueError, match=message):
        MultiTokenPredictionBlock.from_layers(config, layers)


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        (MTPConfig(2), 0),
        (MTPConfig(2), 3),
        (MTPConfig(2), -1),
        (MTPConfig(2, repeated_layer=True), 3),
        (MTPConfig(0), 1),
    ],
)
def test_layer_out_of_range(config: MTPConfig, depth: int):
    block = _make_block(config)
    with pytest.raises(ValueError, match=rf"`depth` must lie in 1 … {config.num_depths}.*{depth}"):
        block.layer(depth)


# Which gradients each switch puts to zero.
_STOPPED = {
    "stop_gradient_hidden": {"hidden_states"},
    "stop_gradient_embedding": {"embedding"},
    "stop_gradient_head": {"norm", "head"},
}


def _by_name(gradients: _Parts) -> dict[str, PyTree]:
    decoder = gradients.decoder
    return {
        "embedding": decoder.embedding,
        "norm": decoder.norm,
        "head": decoder.head,
        "layers": gradients.block.layers,
        "hidden_states": gradients.hidden_states,
    }


@pytest.mark.parametrize(
    ("preset", "field"),
    [*(("maxtext", field) for field in _STOPPED), ("megatron", "stop_gradient_hidden")],
)
def test_stop_gradient(batch: _Batch, preset: Any, field: str):
    targets = batch.targets(2)
    (loss, _), flowing = _fast(_make_parts(MTPConfig.preset(preset, 2), _ToyLayer), targets)
    config = MTPConfig.preset(preset, 2, **{field: True})
    (stopped_loss, _), stopped = _fast(_make_parts(config, _ToyLayer), targets)
    assert_close(stopped_loss, loss, 1e-6)
    stopped_names = set(_STOPPED[field])
    if preset == "megatron":
        # Its main norm is applied to nothing but the main model's hidden states.
        stopped_names.add("norm")
    for name, gradient in _by_name(stopped).items():
        expected = jax.tree.leaves(_by_name(flowing)[name])
        assert all(x.any() for x in expected)
        for x, y in zip(jax.tree.leaves(gradient), expected, strict=True):
            assert_close(x, jnp.zeros_like(y) if name in stopped_names else y, 2e-6)


def test_stop_gradient_with_tied_embeddings(batch: _Batch):
    """Each switch stops one of the two ways into a tied embedding."""

    def embedding_gradient(**fields: Any) -> Array:
        parts = _make_parts(MTPConfig(2, **fields), _ToyLayer)
        head = parts.decoder.head
        tied = eqx.tree_at(lambda m: m.head, parts.decoder, None, is_leaf=lambda x: x is head)
        return _fast(parts._replace(decoder=tied), batch.targets(2))[1].decoder.embedding

    both = embedding_gradient()
    of_head = embedding_gradient(stop_gradient_embedding=True)
    of_embedding = embedding_gradient(stop_gradient_head=True)
    assert float(jnp.abs(of_head).max()) > 1e-3
    assert float(jnp.abs(of_embedding).max()) > 1e-3
    assert_close(of_head + of_embedding, both)


class _SoftCappedDecoder(AbstractDecoder):
    """A head with a bias, and logits between -3 and 3."""

    embedding: Array
    norm: nn.RMSNorm
    head: Any
    bias: Array
    is_callable: bool

    def embed(self, input_ids: Array, position_ids: Array) -> Array:
        return self.embedding[input_ids]

    def __call__(self, input_ids: Array, **_: Any) -> Array:
        return self.embedding[input_ids]

    def final_norm(self, hidden_states: Array) -> Array:
        return self.norm(hidden_states)

    def output_head(self) -> Any:
        if self.is_callable:
            return lambda hidden: 3 * jnp.tanh((hidden @ self.head.T + self.bias) / 3)
        return LinearHead(self.head, self.bias, soft_cap=3, token_tile=8, vocab_tile=10)


def _make_soft_capped(is_callable: bool, *, key: PRNGKeyArray) -> _SoftCappedDecoder:
    decoder = nn.TransformerDecoder(_TRANSFORMER, key=key)
    bias = jnp.zeros(_VOCAB)
    return _SoftCappedDecoder(
        decoder.embedding, decoder.norm, decoder.head, bias, is_callable=is_callable
    )


@pytest.mark.parametrize("is_callable", [True, False])
def test_head_with_bias_and_soft_cap(batch: _Batch, is_callable: bool):
    decoder = build(partial(_make_soft_capped, is_callable))
    targets = batch.targets(2)
    parts = _make_parts(MTPConfig(2), _ToyLayer)._replace(decoder=decoder)
    (loss, output), gradients = _fast(parts, targets)
    (expected_loss, expected), expected_gradients = _oracle(parts, _align(batch, 2))
    assert_close(loss, expected_loss)
    assert_close(output.losses.losses, expected["losses"])
    np.testing.assert_array_equal(output.acceptance.predictions, expected["ids"])
    _assert_trees_close(gradients, expected_gradients)
    assert float(jnp.abs(gradients.decoder.bias).min()) > 1e-4
    stopping = _make_parts(MTPConfig(2, stop_gradient_head=True), _ToyLayer)
    _, gradients = _fast(stopping._replace(decoder=decoder), targets)
    assert not gradients.decoder.head.any()
    assert not gradients.decoder.bias.any()


def _sum_of_squares(losses: MTPLosses) -> Array:
    """Has no slope at losses of 0, where the block asks for the depths' weights."""
    return jnp.sum(jnp.square(losses.losses)) / 100


_mean_of_depths = partial(calculate_mtp_loss, reduction="mean_of_depths")


@pytest.mark.parametrize(
    ("num_depths", "objective", "total"),
    [
        (2, _total, _total),
        (2, _mean_of_depths, _mean_of_depths),
        (2, calculate_mtp_loss, _mean_of_depths),
        (2, _total, _sum_of_squares),
        (2, _sum_of_squares, _sum_of_squares),
        (1, _sum_of_squares, _sum_of_squares),
    ],
    ids=["own", "named", "another", "nonlinear", "expected-zero", "one-depth"],
)
def test_objective_is_for_speed_alone(
    batch: _Batch, num_depths: int, objective: Objective, total: Objective
):
    parts = _make_parts(MTPConfig(num_depths), _ToyLayer)
    (loss, _), gradients = _fast(parts, batch.targets(num_depths), total, objective=objective)
    (expected_loss, _), expected_gradients = _oracle(parts, _align(batch, num_depths), total)
    assert_close(loss, expected_loss)
    _assert_trees_close(gradients, expected_gradients)


@pytest.mark.parametrize("objective", [calculate_mtp_loss, _mean_of_depths, _total])
@pytest.mark.parametrize("num_depths", [0, 3])
def test_loss_is_the_objective_of_the_losses(
    batch: _Batch, objective: Objective, num_depths: int
) -> None:
    parts = _make_parts(MTPConfig(num_depths), _ToyLayer)
    output = _forward(parts, batch.targets(num_depths), objective=objective)
    assert_close(output.loss, objective(output.losses))


@pytest.mark.parametrize("objective", [calculate_mtp_loss, _mean_of_depths, _total])
def test_the_gradient_of_the_loss_takes_no_further_products(
    batch: _Batch, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    def marked(head: LinearHead, hidden_states: Array, *_: Any, **__: Any) -> Any:
        return hidden_states, jax.tree.map(lambda x: jnp.full_like(x, 7.0), head)

    monkeypatch.setattr(_weighted_losses, "token_gradients", marked)
    parts = _make_parts(MTPConfig(3), _ToyLayer)
    gradients = quick_jit(
        eqx.filter_grad(lambda parts, targets: _run(parts, targets, objective=objective).loss)
    )(parts, batch.targets(3))
    head: Any = gradients.decoder.head
    assert not bool(jnp.any(head == 7))


@pytest.mark.parametrize(
    ("objective", "is_computed_anew"), [(calculate_mtp_loss, True), (_mean_of_depths, False)]
)
def test_a_known_objective_takes_no_further_products(
    batch: _Batch, objective: Objective, is_computed_anew: bool, monkeypatch: pytest.MonkeyPatch
):
    def marked(head: LinearHead, hidden_states: Array, *_: Any, **__: Any) -> Any:
        return hidden_states, jax.tree.map(lambda x: jnp.full_like(x, 7.0), head)

    monkeypatch.setattr(_weighted_losses, "token_gradients", marked)

    def loss(parts: _Parts, targets: Any) -> Array:
        return 0.3 * _mean_of_depths(_run(parts, targets, objective=objective).losses)

    parts = _make_parts(MTPConfig(3), _ToyLayer)
    gradients = quick_jit(eqx.filter_grad(loss))(parts, batch.targets(3))
    head: Any = gradients.decoder.head
    assert bool(jnp.all(head == 7)) == is_computed_anew


def test_z_loss(batch: _Batch):
    parts, z = _make_parts(MTPConfig(2), _ToyLayer), jnp.asarray(0.3)
    (loss, output), gradients = _fast(parts, batch.targets(2), z_loss_weight=z)
    (expected_loss, expected), expected_gradients = _oracle(
        parts, _align(batch, 2), z_loss_weight=z
    )
    assert_close(loss, expected_loss)
    assert_close(output.losses.losses, expected["losses"])
    assert_close(output.losses.z_losses, expected["z_losses"])
    _assert_trees_close(gradients, expected_gradients)
    without = _forward(parts, batch.targets(2)).losses
    np.testing.assert_array_equal(without.z_losses, [0, 0])
    assert_close(output.losses.losses - output.losses.z_losses, without.losses)


@pytest.mark.parametrize("num_depths", [0, 2])
def test_no_predictions(batch: _Batch, num_depths: int):
    parts, targets = _make_parts(MTPConfig(num_depths), _ToyLayer), batch.targets(num_depths)
    with_best, without = (
        _forward(parts, targets, predictions=predictions) for predictions in (True, False)
    )
    assert without.acceptance is None
    assert with_best.acceptance.predictions.shape == (num_depths, 2, _SEQ)
    np.testing.assert_array_equal(without.losses.losses, with_best.losses.losses)
    with pytest.raises(ValueError, match="was called with `predictions=False`"):
        calculate_mtp_acceptance_rate(without.acceptance, None)


@pytest.mark.parametrize(
    ("policy", "num_tanh"),
    [
        (None, 2),
        (jax.checkpoint_policies.nothing_saveable, 2),
        (jax.checkpoint_policies.everything_saveable, 1),
    ],
)
def test_checkpoint_policy(batch: _Batch, policy: Any, num_tanh: int):
    """The layer's tanh is computed again in the backward pass, or kept; nothing else changes."""
    parts = _make_parts(MTPConfig(2, checkpoint_policy=policy), _ToyLayer)
    (loss, output), gradients = _fast(parts, batch.targets(2))
    plain = _make_parts(MTPConfig(2), _ToyLayer)
    (expected_loss, expected), expected_gradients = _fast(plain, batch.targets(2))
    assert_close(loss, expected_loss, 1e-6)
    assert_close(output.hidden_states, expected.hidden_states, 1e-6)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert_close(x, y, 1e-6)
    static = eqx.filter(parts, eqx.is_array, inverse=True)

    def gradient(parts: Any, targets: Any) -> Any:
        def loss(parts: Any) -> Array:
            return _total(_run(eqx.combine(parts, static), targets).losses)

        return jax.grad(loss)(parts)

    jaxpr = jax.make_jaxpr(gradient)(eqx.filter(parts, eqx.is_array), batch.targets(2))
    assert str(jaxpr).count(" tanh ") == num_tanh


def test_memory_does_not_grow_with_depths():
    """Of all temporaries the logits of one tile, of 256 tokens, are the most."""
    vocab, shape = 20_000, (2, 1024)
    decoder = build(
        lambda key: nn.TransformerDecoder(
            dataclasses.replace(_TRANSFORMER, vocab_size=vocab), key=key
        )
    )
    ids, hidden_states = jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, _EMBED))

    def temporaries(num_depths: int, loss: Callable[[_Parts, Any], Array]) -> int:
        block = _make_block(MTPConfig(num_depths), make_layer=_ToyLayer)
        parts = _Parts(decoder, block, hidden_states)
        targets = quick_jit(partial(align_targets, num_depths=num_depths))(ids, ids)
        step: Any = quick_jit(eqx.filter_value_and_grad(loss))
        compiled = step.lower(parts, targets).compile().compiled
        return compiled.memory_analysis().temp_size_in_bytes

    def fused(parts: _Parts, targets: Any) -> Array:
        output = parts.block(parts.decoder, parts.hidden_states, targets)
        return calculate_mtp_loss(output.losses)

    def head_of_one_depth(parts: _Parts, targets: Any) -> Array:
        logits = _all_logits(parts.decoder, parts.hidden_states)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets.target_ids[0]).sum()

    tile_logits = 4 * 256 * vocab
    one, eight = temporaries(1, fused), temporaries(8, fused)
    # Beside them, of 4000 ids: their softmax and its cotangent.
    assert tile_logits <= one < 1.5 * tile_logits
    assert eight < 1.3 * one
    assert temporaries(1, head_of_one_depth) > 2 * eight


class _RoutedLayer(AbstractDecoderLayer):
    """Returns auxiliary outputs: the means of its input, and a number drawn from its key."""

    bias: Array

    def __init__(self, *, key: PRNGKeyArray):
        self.bias = jax.random.normal(key, (_EMBED,))

    def __call__(
        self, hidden_states: Array, *, key: PRNGKeyArray | None = None, **_: Any
    ) -> tuple[Array, dict[str, Array]]:
        drawn = jnp.zeros(()) if key is None else jax.random.uniform(key)
        return hidden_states + self.bias, {"means": hidden_states.mean(-1), "drawn": drawn}


@pytest.mark.parametrize("repeated_layer", [False, True])
def test_auxiliary_outputs(batch: _Batch, repeated_layer: bool):
    parts = _make_parts(MTPConfig(3, repeated_layer=repeated_layer), _RoutedLayer)
    output = _forward(parts, batch.targets(3), key=jax.random.key(1))
    assert output.auxiliary["means"].shape == (3, 2, _SEQ)
    for depth in range(3):
        layer: Any = parts.block.layer(depth + 1)
        bias = layer.transformer_layer.bias
        expected = (output.hidden_states[depth] - bias).mean(-1)
        assert_close(output.auxiliary["means"][depth], expected)
    # Every depth has a key of its own.
    assert len(set(output.auxiliary["drawn"].tolist())) == 3
    assert output.auxiliary["drawn"].min() > 0


@pytest.mark.parametrize(("num_depths", "seq"), [(1, _SEQ), (3, _SEQ), (2, _SEQ - 1)])
def test_targets_of_another_shape(batch: _Batch, num_depths: int, seq: int):
    parts = _make_parts(MTPConfig(2), _ToyLayer)
    targets = align_targets(
        batch.input_ids[:, :seq], batch.target_ids[:, :seq], num_depths=num_depths
    )
    with pytest.raises(
        ValueError, match=rf"`targets` must have shape \(2, 2, {_SEQ}\).*num_depths=2"
    ):
        _run(parts, targets)


def test_hidden_states_of_another_dtype_than_the_embedding(batch: _Batch):
    parts = _make_parts(MTPConfig(2), _ToyLayer)
    parts = parts._replace(hidden_states=parts.hidden_states.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"`main_hidden_state` is bfloat16, .* made float32"):
        _run(parts, batch.targets(2))


def test_hidden_states_of_another_size(batch: _Batch):
    parts = _make_parts(MTPConfig(2), _ToyLayer)
    parts = parts._replace(hidden_states=parts.hidden_states[..., :-1])
    with pytest.raises(ValueError, match=f"`main_hidden_state` must have the {_EMBED} features"):
        _run(parts, batch.targets(2))


def test_layer_instead_of_a_function_that_makes_one():
    with pytest.raises(TypeError, match=r"`make_layer` must be a function.*got a layer"):
        _make_block(MTPConfig(2), make_layer=_ToyLayer(key=jax.random.key(0)))


def test_positions_count_from_zero_by_default(batch: _Batch):
    parts = _make_parts(MTPConfig(1))
    targets = align_targets(*batch, num_depths=1)
    counting = jnp.broadcast_to(jnp.arange(_SEQ), (2, _SEQ))
    default, given, shifted = (
        _forward(parts, targets, position_ids=position_ids, segment_ids=None).losses.losses
        for position_ids in (None, counting, 2 * counting)
    )
    np.testing.assert_array_equal(default, given)
    assert abs(float(shifted[0] - given[0])) > 1e-3


@quick_jit
def _run_model(
    model: MTPModel, batch: _Batch, segment_ids: Any, position_ids: Any
) -> tuple[MTPOutput, Array, Array]:
    """The MTP output, and per-token losses `[depth batch seq]` with their mask."""
    output = model(*map(jnp.asarray, batch), segment_ids=segment_ids, position_ids=position_ids)
    targets = align_targets(
        *batch, num_depths=3, segment_ids=segment_ids, position_ids=position_ids
    )
    token = jax.vmap(linear_cross_entropy, in_axes=(0, None, 0))(
        jax.vmap(model.decoder.final_norm)(output.mtp.hidden_states),
        model.decoder.output_head(),
        targets.target_ids,
    )
    return output.mtp, token.negative_log_likelihood, targets.mask


def _make_model() -> MTPModel:
    parts = _make_parts(MTPConfig(3))
    return MTPModel(parts.decoder, parts.block)


@pytest.mark.parametrize(("row", "segment"), [(0, 1), (0, 2), (0, 3), (1, 1), (1, 0)])
def test_nothing_leaks_across_documents(batch: _Batch, row: int, segment: int):
    """Other tokens in one document leave the others as they are, bit for bit, at every depth."""
    model = _make_model()
    changed = np.zeros((2, _SEQ), bool)
    changed[row] = _SEGMENTS[row] == segment
    following = np.roll(changed, -1, axis=1)  # Of the targets, which are one token ahead.
    others = _Batch(
        np.where(changed, (batch.input_ids + 7) % _VOCAB, batch.input_ids),
        np.where(following, (batch.target_ids + 7) % _VOCAB, batch.target_ids),
        batch.target_mask,
    )
    output, losses, mask = _run_model(model, batch, _SEGMENTS, _POSITIONS)
    other_output, other_losses, other_mask = _run_model(model, others, _SEGMENTS, _POSITIONS)
    losses, mask, other_losses, other_mask = map(
        np.asarray, (losses, mask, other_losses, other_mask)
    )
    np.testing.assert_array_equal(mask, other_mask)
    kept = np.broadcast_to(~changed, mask.shape)
    assert (mask & kept).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(losses[mask & kept], other_losses[mask & kept])
    for name in ("hidden_states", "predictions"):
        before, after = (
            np.asarray(getattr(o if name == "hidden_states" else o.acceptance, name))
            for o in (output, other_output)
        )
        np.testing.assert_array_equal(before[kept], after[kept])
        assert (before[~kept] != after[~kept]).any()


def test_causality(batch: _Batch):
    """Depth k at position i sees the tokens up to i+k, and no other."""
    model, one_document, counting = _make_model(), np.ones_like(_SEGMENTS), np.arange(_SEQ)
    positions, token = np.stack([counting] * 2), 7
    ids = batch.input_ids
    changed = batch._replace(input_ids=np.where(counting == token, ids + 1, ids) % _VOCAB)
    before, after = (
        np.asarray(_run_model(model, b, one_document, positions)[0].hidden_states)
        for b in (batch, changed)
    )
    for depth in (1, 2, 3):
        first = token - depth
        np.testing.assert_array_equal(before[depth - 1, :, :first], after[depth - 1, :, :first])
        assert np.abs(before - after)[depth - 1, :, first:].max(-1).min() > 1e-4


def test_packed_documents_equal_rows_of_their_own(batch: _Batch):
    model = _make_model()
    _, packed_losses, packed_mask = _run_model(model, batch, _SEGMENTS, _POSITIONS)
    packed_losses, packed_mask = np.asarray(packed_losses), np.asarray(packed_mask)
    num_scored = 0
    for segment in (1, 2, 3):
        # In both rows at once; the third document of the second row is empty.
        inside = np.equal(_SEGMENTS, segment)
        alone = [np.zeros((2, _SEQ), int) for _ in range(5)]
        for destination, source in zip(alone, (*batch, _SEGMENTS, _POSITIONS), strict=True):
            for row in range(2):
                destination[row, : inside[row].sum()] = source[row][inside[row]]
        *fields, segments, positions = alone
        _, losses, mask = _run_model(model, _Batch(*fields), segments, positions)
        losses, mask = np.asarray(losses), np.asarray(mask)
        own = np.stack([inside] * 3)
        num_scored += mask.sum()
        assert mask.sum() == (packed_mask & own).sum()
        assert_close(losses[mask], packed_losses[packed_mask & own])
    assert num_scored == packed_mask.sum() > 10


def test_nothing_scored(batch: _Batch):
    parts = _make_parts(MTPConfig(2), _ToyLayer)
    targets = batch._replace(target_mask=np.zeros((2, _SEQ), int)).targets(2)

    def loss(parts: _Parts) -> tuple[Array, MTPOutput]:
        output = _run(parts, targets)
        return calculate_mtp_loss(output.losses), output

    (value, output), gradients = quick_jit(eqx.filter_value_and_grad(loss, has_aux=True))(parts)
    assert float(value) == 0
    np.testing.assert_array_equal(output.losses.losses, [0, 0])
    np.testing.assert_array_equal(output.losses.weights, [0, 0])
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_bfloat16(batch: _Batch):
    """Computes in bfloat16 with float32 parameters, gradients and losses."""
    parts = _make_parts(MTPConfig(2), _ToyLayer)
    config = dataclasses.replace(_TRANSFORMER, dtype="bfloat16")
    decoder = build(lambda key: nn.TransformerDecoder(config, key=key))
    low = _Parts(decoder, parts.block, parts.hidden_states.astype(jnp.bfloat16))
    (loss, output), gradients = _fast(low, batch.targets(2))
    (expected_loss, expected), expected_gradients = _fast(parts, batch.targets(2))
    assert output.hidden_states.dtype == gradients.hidden_states.dtype == jnp.bfloat16
    assert output.losses.losses.dtype == jnp.float32
    parameters = jax.tree.leaves((gradients.decoder, gradients.block))
    assert {x.dtype for x in parameters} == {jnp.dtype("float32")}
    assert_close(loss, expected_loss, 1e-2)
    np.testing.assert_array_equal(output.losses.weights, expected.losses.weights)
    for x, y in zip(
        jax.tree.leaves(_by_name(gradients)),
        jax.tree.leaves(_by_name(expected_gradients)),
        strict=True,
    ):
        assert_close(x.astype(jnp.float32), y, 6e-2)


def test_dropout(batch: _Batch):
    parts = _make_parts(MTPConfig(2))
    dropping = eqx.tree_at(lambda m: m.layers.transformer_layer.dropout.p, parts.block, 0.5)
    dropping = parts._replace(block=dropping)
    targets = batch.targets(2)

    def run(parts: _Parts, **arguments: Any) -> Array:
        return _forward(parts, targets, **arguments).losses.losses

    without = run(parts)
    one, again, other = (run(dropping, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).min()) > 1e-3
    assert float(jnp.abs(one - without).min()) > 1e-3
    np.testing.assert_array_equal(run(dropping, inference=True), without)
    np.testing.assert_array_equal(run(dropping, inference=True, key=jax.random.key(0)), without)
    np.testing.assert_array_equal(run(parts, key=jax.random.key(0)), without)
    with pytest.raises(RuntimeError, match="requires a key"):
        run(dropping)


def test_make_layer_must_make_a_decoder_layer():
    def make_layer(*, key: PRNGKeyArray) -> eqx.nn.Linear:
        return eqx.nn.Linear(_EMBED, _EMBED, key=key)

    with pytest.raises(TypeError, match=r"`make_layer` must return an `AbstractDecoderLayer`"):
        MultiTokenPredictionBlock(
            MTPConfig(2), make_layer, embed_size=_EMBED, key=jax.random.key(0)
        )


class _CountingLayer(AbstractDecoderLayer):
    """As a router does, it has statistics over tokens."""

    takes_token_mask = True
    router: Array

    def __init__(self, *, key: PRNGKeyArray):
        self.router = jax.random.normal(key, (_EMBED,))

    def __call__(
        self, hidden_states: Array, *, token_mask: Array | None = None, **_: Any
    ) -> tuple[Array, Array]:
        assert token_mask is not None
        load = jax.nn.sigmoid(hidden_states @ self.router)
        return hidden_states, jnp.sum(jnp.where(token_mask, load, 0)) / jnp.sum(token_mask)


def test_a_router_is_told_which_positions_carry_fill(batch: _Batch) -> None:
    parts = _make_parts(MTPConfig(3), _CountingLayer)
    targets = batch.targets(3)
    segment_ids = jnp.asarray(_SEGMENTS)
    output = parts.block(parts.decoder, parts.hidden_states, targets, segment_ids=segment_ids)
    hidden_states = np.asarray(output.hidden_states)
    for k in range(1, 4):
        router = np.asarray(parts.block.layer(k).transformer_layer.router)  # pyright: ignore
        combined = hidden_states[k - 1]  # the layer returns what it was given
        loads = [
            1 / (1 + np.exp(-combined[b, i] @ router))
            for b in range(2)
            for i in range(_SEQ - k)
            if len(set(_SEGMENTS[b, i : i + k + 1])) == 1 and _SEGMENTS[b, i] != 0
        ]
        assert_close(output.auxiliary[k - 1], np.mean(loads))
