"""The depths' divergences from the main model, against a loop over positions."""

from functools import partial
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_rejects, is_one_document
from jaxtyping import PRNGKeyArray

import equinox_mtp as emtp
from equinox_mtp.cross_entropy._divergences import FUNCTIONS
from equinox_mtp.distillation import DraftOutput, draft_losses, freeze_model

VOCAB, EMBED, DEPTHS = 23, 16, 3
CONFIG = emtp.nn.TransformerConfig(
    vocab_size=VOCAB, embed_size=EMBED, num_layers=2, num_heads=2, mlp_size=24
)
SEGMENTS = np.asarray([[1] * 4 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 8])
run_draft_losses = eqx.filter_jit(draft_losses)
run_model = eqx.filter_jit(lambda model, batch: model(batch))


@eqx.filter_jit
@eqx.filter_value_and_grad
def loss_and_gradients(heads: Any, frozen: Any, batch: emtp.Batch) -> jax.Array:
    return draft_losses(eqx.combine(heads, frozen), batch).loss


@eqx.filter_jit
def make_model(key: PRNGKeyArray, config: emtp.MTPConfig) -> emtp.MTPModel:
    decoder_key, block_key = jax.random.split(key)
    make_layer = partial(emtp.nn.TransformerDecoderLayer, CONFIG)
    block = emtp.MultiTokenPredictionBlock(config, make_layer, embed_size=EMBED, key=block_key)
    return emtp.MTPModel(emtp.nn.TransformerDecoder(CONFIG, key=decoder_key), block)


@pytest.fixture(params=["deepseek_v3", "fast_mtp"])
def model(request: pytest.FixtureRequest, getkey: Any) -> emtp.MTPModel:
    return make_model(getkey(), emtp.MTPConfig.preset(request.param, DEPTHS))


@pytest.fixture
def batch() -> emtp.Batch:
    tokens = np.random.default_rng(0).integers(0, VOCAB, SEGMENTS.shape)
    return emtp.make_batch(tokens, segment_ids=SEGMENTS)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


@eqx.filter_jit
def logits_of(model: emtp.MTPModel, batch: emtp.Batch) -> tuple[jax.Array, jax.Array]:
    decoder: Any = model.decoder
    block = model.block
    context = {"position_ids": batch.position_ids, "segment_ids": batch.segment_ids}
    hidden = decoder(jnp.asarray(batch.input_ids), **context)
    main = jnp.asarray(decoder.final_norm(hidden)) @ decoder.output_head().T
    targets: Any = batch.align(DEPTHS).targets
    depths = []
    for k in range(DEPTHS):
        layer = block.layer(k + 1)
        if k == 0:
            hidden = decoder.final_norm(hidden)
        embedding = decoder.embed(targets.input_ids[k], targets.position_ids[k])
        raw, _ = layer(hidden, embedding, token_mask=None, **context)
        normed, hidden = layer.normed_and_carried(raw, decoder.final_norm)
        depths.append(normed @ decoder.output_head().T)
    return main, jnp.stack(depths)


@eqx.filter_jit
def gradients_of_depths(model: emtp.MTPModel, batch: emtp.Batch, cotangent: jax.Array) -> Any:
    """Of the parameters, for those of the depths' logits: one program for all divergences."""
    return eqx.filter_grad(lambda model: jnp.sum(logits_of(model, batch)[1] * cotangent))(model)


def distributions(model: emtp.MTPModel, batch: emtp.Batch) -> tuple[np.ndarray, np.ndarray]:
    """Of the main model `[batch seq vocab]`, and of the depths `[depth batch seq vocab]`."""
    main, depths = logits_of(model, jax.tree.map(jnp.asarray, batch))
    return np.asarray(main, np.float64), np.asarray(depths, np.float64)


def alphas(
    main: np.ndarray, depths: np.ndarray, draft_vocab: Any = None
) -> dict[tuple[int, int, int], float]:
    """α of every scored (depth, row, position), depths counted from 1."""
    out = {}
    for k in range(1, DEPTHS + 1):
        for b, i in np.ndindex(main.shape[:2]):
            # The last token of a document has no target of its own.
            if i + k + 1 < SEGMENTS.shape[1] and is_one_document(SEGMENTS[b], i, i + k + 1):
                p, q = softmax(main[b, i + k]), depths[k - 1, b, i]
                ids = range(VOCAB) if draft_vocab is None else draft_vocab
                p, q = p[ids], softmax(q[ids])
                out[k, b, i] = float(np.minimum(p, q).sum())
    return out


@pytest.mark.parametrize("draft_vocab", [None, np.asarray([1, 4, 7, 8, 21])], ids=["all", "some"])
def test_total_variation_and_acceptance(
    model: emtp.MTPModel, batch: emtp.Batch, draft_vocab: Any
) -> None:
    output = run_draft_losses(model, batch, draft_vocab=draft_vocab)
    found = alphas(*distributions(model, batch), draft_vocab)
    counts, losses, accepted, joint = np.zeros((4, DEPTHS))
    for (k, b, i), alpha in found.items():
        counts[k - 1] += 1
        losses[k - 1] += 1 - alpha
        accepted[k - 1] += alpha
        joint[k - 1] += np.prod([found[j, b, i] for j in range(1, k + 1)])
    assert_close(output.losses.weights, counts)
    assert_close(output.losses.losses, losses)
    assert_close(output.acceptance.independent, accepted / counts)
    assert_close(output.acceptance.joint, joint / counts)
    assert_close(output.acceptance.expected_accepted_length, 1 + np.sum(joint / counts))
    assert_close(output.loss, 0.1 * losses.sum() / counts.sum())
    whole = run_model(model, batch)
    assert_close(output.main.mean, whole.main.mean)
    assert_close(output.hidden_states, whole.mtp.hidden_states)


def test_expected_accepted_length(model: emtp.MTPModel, batch: emtp.Batch) -> None:
    """The mean of each depth's loss is 1 less the joint acceptance: their sum is D + 1 - τ."""
    output = run_draft_losses(model, batch, divergence="expected_accepted_length")
    assert_close(output.losses.mean, 1 - output.acceptance.joint)
    tau = output.acceptance.expected_accepted_length
    assert_close(jnp.sum(output.losses.mean), DEPTHS + 1 - tau)


@pytest.mark.parametrize("divergence", [*get_args(emtp.cross_entropy.Divergence), "joint"])
def test_gradients(divergence: Any, batch: emtp.Batch, getkey: Any) -> None:
    """Those of full logits, for all parameters, with the teacher's distributions held."""
    name: Any = "expected_accepted_length" if divergence == "joint" else divergence
    model = make_model(getkey(), emtp.MTPConfig.preset("deepseek_v3", DEPTHS))
    on_device = jax.tree.map(jnp.asarray, batch)
    targets = on_device.align(DEPTHS).targets
    assert targets is not None

    @jax.jit
    @jax.grad
    def cotangent(logits: jax.Array, main_logits: jax.Array) -> jax.Array:
        teacher = jax.nn.log_softmax(main_logits)
        total, joint = jnp.zeros(()), 1.0
        for k in range(DEPTHS):
            log_p = jnp.roll(teacher, -(k + 1), axis=1)
            log_q = jax.nn.log_softmax(logits[k])
            kind = "total_variation" if divergence == "joint" else divergence
            value = FUNCTIONS[kind](log_p, log_q, partial(jnp.sum, axis=-1), 0.0)
            if divergence == "joint":
                joint = joint * (1 - value)
                value = 1 - joint
            total += jnp.sum(jnp.where(targets.mask[k], value, 0))
        return 0.1 * total / jnp.sum(targets.mask)

    main, depths = logits_of(model, on_device)
    expected = gradients_of_depths(model, on_device, cotangent(depths, main))
    gradients = eqx.filter_jit(
        eqx.filter_grad(lambda m: draft_losses(m, batch, divergence=name).loss)
    )
    for x, y in zip(jax.tree.leaves(gradients(model)), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(y))) + 1e-12
        assert_close(x / scale, y / scale, rtol=1e-3, atol=1e-4)


def test_frozen_model_has_no_gradient(model: emtp.MTPModel, batch: emtp.Batch) -> None:
    heads, frozen = freeze_model(model)
    assert emtp.count_parameters(heads) == emtp.count_parameters(model.block)
    assert jax.tree.leaves(heads.decoder) == []
    whole, single = jax.tree.leaves(model), jax.tree.leaves(eqx.combine(heads, frozen))
    assert all(x is y for x, y in zip(whole, single, strict=True))

    _, gradients = loss_and_gradients(heads, frozen, batch)
    unfrozen = eqx.filter_jit(eqx.filter_grad(lambda m: draft_losses(m, batch).loss))(model)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(unfrozen.block), strict=True)
    for x, y in pairs:
        assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_frozen_trunk_keeps_nothing(getkey: Any) -> None:
    """More layers of the main model take no more memory: nothing is kept for a backward pass."""

    def temporaries(num_layers: int) -> int:
        config = emtp.nn.TransformerConfig(
            vocab_size=64, embed_size=32, num_layers=num_layers, num_heads=2
        )

        def make(key: Any) -> emtp.MTPModel:
            make_layer = partial(emtp.nn.TransformerDecoderLayer, config)
            block = emtp.MultiTokenPredictionBlock(
                emtp.MTPConfig(1), make_layer, embed_size=32, key=key
            )
            return emtp.MTPModel(emtp.nn.TransformerDecoder(config, key=key), block)

        heads, frozen = freeze_model(eqx.filter_jit(make)(getkey()))
        batch = emtp.make_batch(np.zeros((2, 257), np.int32))

        def loss(heads: Any, frozen: Any) -> jax.Array:
            return draft_losses(eqx.combine(heads, frozen), batch).loss

        function: Any = eqx.filter_jit(eqx.filter_value_and_grad(loss))
        compiled = function.lower(heads, frozen).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    one_row = 2 * 256 * 32 * 4
    assert temporaries(8) - temporaries(2) < one_row


def test_padding_changes_nothing(model: emtp.MTPModel) -> None:
    """A row of padding, and what follows a document, whatever its tokens are."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, SEGMENTS.shape)
    segments = np.asarray([[1] * 6 + [0] * 5, [0] * 11])
    heads, frozen = freeze_model(model)
    others = np.where(segments == 0, (tokens + 1) % VOCAB, tokens)
    one, other = (
        loss_and_gradients(heads, frozen, emtp.make_batch(x, segment_ids=segments))
        for x in (tokens, others)
    )
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert_close(x, y)


def test_bad_input(model: emtp.MTPModel, batch: emtp.Batch, getkey: Any) -> None:
    assert_rejects("divergence", draft_losses, model, batch, divergence="kl")
    with pytest.raises(ValueError, match="`temperature` must be"):
        draft_losses(model, batch, temperature=-1.0)
    without = make_model(getkey(), emtp.MTPConfig(0))
    with pytest.raises(ValueError, match="`block` must have a prediction depth"):
        draft_losses(without, batch)


def test_known_hidden_states(model: Any, batch: emtp.Batch) -> None:
    """The decoder does not run: its layers may be anything."""
    on_device = jax.tree.map(jnp.asarray, batch)
    context = {"position_ids": on_device.position_ids, "segment_ids": on_device.segment_ids}
    run = eqx.filter_jit(lambda decoder, ids, context: decoder(ids, **context))
    hidden_states: Any = run(model.decoder, on_device.input_ids, context)
    numbers, rest = eqx.partition(model.decoder.layers, eqx.is_inexact_array)
    spoilt = eqx.combine(jax.tree.map(lambda x: x * jnp.nan, numbers), rest)
    without = eqx.tree_at(lambda m: m.decoder.layers, model, spoilt)
    expected = run_draft_losses(model, batch)
    output = run_draft_losses(without, batch, hidden_states=hidden_states)
    for x, y in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        assert_close(x, y)
    with pytest.raises(ValueError, match=r"`hidden_states` must be of the rows .*\(2, 10\); got"):
        draft_losses(model, batch, hidden_states=hidden_states[:1])


def test_output_joins_batches(model: emtp.MTPModel, batch: emtp.Batch) -> None:
    output: DraftOutput = run_draft_losses(model, batch)
    twice = output.acceptance + output.acceptance
    assert_close(twice.joint, output.acceptance.joint)
    assert_close(twice.scored, 2 * np.asarray(output.acceptance.scored))
    with pytest.raises(ValueError, match="same number of depths"):
        _ = output.acceptance + jax.tree.map(lambda x: x[:1], output.acceptance)


def test_measure_acceptance_of_sampling(model: emtp.MTPModel) -> None:
    """At a temperature, as the oracle has it; none without one; batches join."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, SEGMENTS.shape)
    measure = eqx.filter_jit(emtp.speculative.measure_acceptance)
    sampled: Any = measure(model, tokens, segment_ids=SEGMENTS, temperature=1.0)
    batch = emtp.make_batch(tokens, segment_ids=SEGMENTS)
    found = alphas(*distributions(model, batch))
    for k in range(1, DEPTHS + 1):
        expected = np.mean([alpha for (depth, _, _), alpha in found.items() if depth == k])
        assert_close(sampled.sampled.independent[k - 1], expected)
    assert_close((sampled + sampled).sampled.joint, sampled.sampled.joint)
    greedy = measure(model, tokens, segment_ids=SEGMENTS)
    assert greedy.sampled is None
    assert_close(greedy.overall.joint, sampled.overall.joint)
    with pytest.raises(ValueError, match="`sampled` must be measured in both"):
        _ = greedy + sampled
