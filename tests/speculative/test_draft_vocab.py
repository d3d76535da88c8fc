"""Drafts from a part of the vocabulary: other drafts, the same text."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from jaxtyping import Array, TypeCheckError

import equinox_mtp as emtp
from equinox_mtp import nn, speculative
from equinox_mtp.speculative import DecodingModel, DecodingShape, Sampler, frequent_ids, generate
from equinox_mtp.speculative._model import check_cached_steps

VOCAB, SIZE, NEW = 11, 16, 12
PROMPTS = np.asarray([[5, 6, 7], [9, 3, 0], [1, 1, 4]])
LENGTHS = np.asarray([3, 2, 1])
DRAFT_VOCAB = np.asarray([9, 2, 3, 7])
NO_END = jnp.int32(-1)
quick_generate = quick_jit(generate)


def make_model(head: str = "matrix") -> emtp.MTPModel:
    """Two depths; the head is a matrix, or has a bias and a soft-cap."""
    config = nn.TransformerConfig(vocab_size=VOCAB, embed_size=SIZE, num_layers=1, num_heads=2)
    decoder: Any = build(lambda key: nn.TransformerDecoder(config, key=key), 1)
    block = build(
        lambda key: emtp.MultiTokenPredictionBlock(
            emtp.MTPConfig.preset("deepseek_v3", 2),
            partial(nn.TransformerDecoderLayer, config),
            embed_size=SIZE,
            key=key,
        ),
        2,
    )
    if head == "linear":
        decoder = BiasedDecoder(decoder, jax.random.normal(jax.random.key(3), (VOCAB,)))
    return emtp.MTPModel(decoder, block)


class BiasedDecoder(emtp.AbstractCachedDecoder):
    """A decoder whose head has a bias and a soft-cap."""

    decoder: nn.TransformerDecoder
    bias: Array

    def embed(self, input_ids, position_ids):
        return self.decoder.embed(input_ids, position_ids)

    def __call__(self, input_ids, **context):
        return self.decoder(input_ids, **context)

    def final_norm(self, hidden_states):
        return self.decoder.final_norm(hidden_states)

    def output_head(self) -> Any:
        return emtp.LinearHead(self.decoder.output_head(), self.bias, soft_cap=2.0)

    def init_cache(self, batch_size, max_length):
        return self.decoder.init_cache(batch_size, max_length)

    def decode(self, input_ids, cache, *, position_ids):
        return self.decoder.decode(input_ids, cache, position_ids=position_ids)


class CallableHead(BiasedDecoder):
    """A decoder whose head is any function."""

    def output_head(self) -> Any:
        return lambda hidden_states: hidden_states @ self.decoder.output_head().T


@pytest.mark.parametrize("head", ["matrix", "linear"])
@pytest.mark.parametrize("draft_vocab", [DRAFT_VOCAB, np.asarray([4]), np.arange(VOCAB)])
def test_the_text_is_that_of_plain_decoding(head, draft_vocab):
    model = make_model(head)
    plain = quick_generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, num_drafts=0)
    drafted = quick_generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, draft_vocab=draft_vocab)
    assert np.array_equal(plain.tokens, drafted.tokens)
    if len(draft_vocab) == VOCAB:
        of_all = quick_generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW)
        assert np.array_equal(drafted.num_accepted, of_all.num_accepted)


def test_a_model_may_be_laid_out_beforehand():
    model = make_model()
    wanted = quick_generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, draft_vocab=DRAFT_VOCAB)
    laid_out = DecodingModel.of(model, DRAFT_VOCAB.tolist())
    found = quick_generate(laid_out, PROMPTS, LENGTHS, max_new_tokens=NEW)
    assert np.array_equal(found.tokens, wanted.tokens)
    assert np.array_equal(found.num_accepted, wanted.num_accepted)
    steps = speculative.stream(laid_out, PROMPTS, LENGTHS, max_new_tokens=NEW)
    assert np.array_equal(sum(step.num_new for step in steps), wanted.num_generated)
    # Its arrays are still there.
    again = quick_generate(laid_out, PROMPTS, LENGTHS, max_new_tokens=NEW, num_drafts=0)
    assert np.array_equal(again.tokens, wanted.tokens)
    with pytest.raises(ValueError, match="`draft_vocab` must be given when a model is laid out"):
        generate(laid_out, PROMPTS, max_new_tokens=2, draft_vocab=DRAFT_VOCAB)
    with pytest.raises(ValueError, match="`draft_vocab`"):
        DecodingModel.of(model, [VOCAB])
    with pytest.raises(TypeError, match="`model` must be an `MTPModel`; got a `DecodingModel`"):
        check_cached_steps(laid_out)


@pytest.mark.parametrize("head", ["matrix", "linear"])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.7), Sampler(1.3, top_k=2)])
def test_drafts_are_those_of_masked_logits(head, sampler):
    """Oracle: all logits, with -inf in place of those that may not be drafted."""
    model, shape = make_model(head), DecodingShape(num_drafts=1, max_new_tokens=NEW)
    restricted = DecodingModel.of(model, jnp.asarray(DRAFT_VOCAB, jnp.int32))
    prompts, lengths = jnp.asarray(PROMPTS, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)
    state = quick_jit(speculative.prefill)(
        restricted, prompts, lengths, shape, Sampler(), eos_id=NO_END, key=jax.random.key(0)
    )
    drafts, _ = quick_jit(speculative.draft)(
        restricted, state, shape, sampler, key=jax.random.key(1)
    )

    class Masked(eqx.Module):
        head: emtp.LinearHead

        def __call__(self, hidden_states):
            allowed = jnp.zeros(VOCAB, bool).at[DRAFT_VOCAB].set(True)
            return jnp.where(allowed, self.head(hidden_states), -jnp.inf)

    whole = DecodingModel.of(model)
    output_head: Any = whole.decoder.output_head()
    if not isinstance(output_head, emtp.LinearHead):
        output_head = emtp.LinearHead(output_head)
    masked = Masked(output_head)
    oracle = eqx.tree_at(
        lambda x: (x.draft_vocab, x.draft_head),
        whole,
        (jnp.arange(VOCAB, dtype=jnp.int32), masked),
        is_leaf=lambda x: x is None,
    )
    wanted, _ = quick_jit(speculative.draft)(oracle, state, shape, sampler, key=jax.random.key(1))
    if sampler.is_greedy:
        assert drafts.probabilities is None
        assert np.array_equal(drafts.ids, wanted.ids)
    else:
        assert drafts.probabilities is not None
        assert wanted.probabilities is not None
        assert_close(drafts.probabilities, wanted.probabilities)
    assert np.isin(drafts.ids, DRAFT_VOCAB).all()


@pytest.mark.slow
def test_sampled_tokens_have_the_models_distribution():
    """The first two new tokens against the products of the model's own probabilities."""
    model, rows = make_model("linear"), 3000
    prompt = np.asarray([[5, 6, 7]])
    generation = quick_generate(
        model,
        np.repeat(prompt, rows, axis=0),
        max_new_tokens=3,
        num_drafts=2,
        draft_vocab=DRAFT_VOCAB,
        sampler=Sampler(1.0),
        key=jax.random.key(4),
    )

    decoder: Any = model.decoder

    def next_probabilities(tokens: Array) -> np.ndarray:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden_states = decoder(tokens, position_ids=positions)
        logits = decoder.output_head()(decoder.final_norm(hidden_states))
        return np.asarray(jax.nn.softmax(logits[:, -1]), np.float64)

    first = next_probabilities(jnp.asarray(prompt))[0]
    after = np.concatenate([np.repeat(prompt, VOCAB, axis=0), np.arange(VOCAB)[:, None]], axis=1)
    second = first @ next_probabilities(jnp.asarray(after))
    for place, wanted in ((3, first), (4, second)):
        counts = np.bincount(np.asarray(generation.tokens[:, place]), minlength=VOCAB)
        deviation = (counts - rows * wanted) / np.sqrt(rows * wanted * (1 - wanted))
        assert np.abs(deviation).max() < 4


def test_stream_is_generate():
    model = make_model()
    steps = speculative.stream(
        model, PROMPTS, LENGTHS, max_new_tokens=NEW, draft_vocab=DRAFT_VOCAB.tolist()
    )
    rows = [[] for _ in LENGTHS]
    for step in steps:
        for row, ids, count in zip(rows, step.new_ids, step.num_new, strict=True):
            row.extend(ids[:count].tolist())
    whole = quick_generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, draft_vocab=DRAFT_VOCAB)
    wanted = [row[n : n + NEW].tolist() for row, n in zip(whole.tokens, LENGTHS, strict=True)]
    assert rows == wanted


def test_frequent_ids_against_a_loop():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (6, 9)) ** 2 // 20
    counted = {x: int((tokens == x).sum()) for x in np.unique(tokens).tolist()}
    for size in (1, 3, 5, 400):
        wanted = sorted(sorted(counted, key=lambda x: (-counted[x], x))[:size])
        counts = np.bincount(tokens.ravel())
        assert frequent_ids(counts, size).tolist() == wanted
        assert frequent_ids(jnp.asarray(counts), size).dtype == np.int32


@pytest.mark.parametrize(
    ("draft_vocab", "message"),
    [
        ([], "`draft_vocab` must hold at least one token id"),
        ([3, 3], "`draft_vocab` must hold each token id once; got 2 ids, 1 of them different"),
        ([VOCAB], r"`draft_vocab` must lie in 0 … 10"),
        ([[1]], "`draft_vocab` must have one axis, such as"),
        ([0.5], "`draft_vocab` must be integers"),
    ],
)
def test_a_vocabulary_that_cannot_be(draft_vocab, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), PROMPTS, max_new_tokens=2, draft_vocab=draft_vocab)


def test_a_head_without_rows():
    model = make_model("linear")
    decoder: Any = model.decoder
    model = emtp.MTPModel(CallableHead(decoder.decoder, decoder.bias), model.block)
    with pytest.raises(ValueError, match="`draft_vocab` needs an output head that is a matrix"):
        generate(model, PROMPTS, max_new_tokens=2, draft_vocab=[1])


def test_frequent_ids_of_what_is_no_text():
    with pytest.raises(ValueError, match="`size` must be at least 1"):
        frequent_ids(np.arange(3), 0)
    for counts in (np.zeros(0, int), np.zeros(3, int)):
        with pytest.raises(ValueError, match="`counts` must count at least one token"):
            frequent_ids(counts, 1)
    with pytest.raises(TypeCheckError):
        frequent_ids(np.zeros(2), 1)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["matrix", "linear"])
def test_measured_acceptance_is_that_of_drafts_from_the_ids(head: str) -> None:
    """Against full logits, position by position: greedy drafts, and sampled ones."""
    model = make_model(head)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 10))
    measured = quick_jit(speculative.measure_acceptance)(
        model, jnp.asarray(tokens), draft_vocab=jnp.asarray(DRAFT_VOCAB), temperature=1.0
    )
    batch = emtp.make_batch(tokens).align(2)
    decoder: Any = model.decoder
    positions = jnp.asarray(batch.position_ids)
    hidden = decoder(jnp.asarray(batch.input_ids), position_ids=positions)
    states = model.block.depth_states(decoder, hidden, jax.tree.map(jnp.asarray, batch.targets))
    of_head: Any = decoder.output_head()
    of_head = of_head if head == "linear" else emtp.LinearHead(of_head)
    main = np.asarray(of_head(decoder.final_norm(hidden)), np.float64)
    depths = np.asarray(of_head(states.normed), np.float64)[..., DRAFT_VOCAB]
    probabilities = np.exp(main) / np.exp(main).sum(-1, keepdims=True)
    drafted = np.exp(depths) / np.exp(depths).sum(-1, keepdims=True)
    assert batch.targets is not None
    for k in (1, 2):
        right, alpha = [], []
        for b, i in np.argwhere(batch.targets.mask[k - 1]):
            draft = DRAFT_VOCAB[np.argmax(depths[k - 1, b, i])]
            right.append(draft == np.argmax(main[b, i + k]))
            p = probabilities[b, i + k, DRAFT_VOCAB]
            alpha.append(np.minimum(p, drafted[k - 1, b, i]).sum())
        assert_close(measured.overall.independent[k - 1], np.mean(right))
        assert measured.sampled is not None
        assert_close(measured.sampled.independent[k - 1], np.mean(alpha), rtol=1e-5)
