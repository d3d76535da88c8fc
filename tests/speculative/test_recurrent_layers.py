"""Generation with layers whose cache is a state: what was refused leaves nothing behind."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build, quick_jit
from jaxtyping import Array

import equinox_mtp as emtp
from equinox_mtp import MTPConfig, MTPModel, nn, speculative
from equinox_mtp.speculative import DecodingShape, Sampler

VOCAB, EMBED, NEW = 5, 16, 20
LENGTHS = np.asarray([1, 6, 3])
PROMPTS = np.random.default_rng(0).integers(0, VOCAB, (3, 6))
KEY, NO_END = jax.random.key(0), jnp.int32(-1)


def make_layer(is_delta: bool, key: Array) -> nn.TransformerDecoderLayer:
    attention_key, feed_forward_key = jax.random.split(key)
    if is_delta:
        attention = nn.GatedDeltaNet(EMBED, 1, 2, 4, 6, key=attention_key)
    else:
        attention = nn.GroupedQueryAttention(EMBED, 2, 1, 8, gate=True, key=attention_key)
    return nn.TransformerDecoderLayer.of(
        attention,
        nn.SwiGLU(EMBED, 24, key=feed_forward_key),
        attention_norm=nn.RMSNorm(EMBED),
        feed_forward_norm=nn.RMSNorm(EMBED),
    )


@cache
def make_model(num_depths: int, seed: int = 0) -> MTPModel:
    """Recurrent layers in the main model and in the depths."""

    def make_decoder(key: Array) -> nn.TransformerDecoder:
        keys = jax.random.split(key, 4)
        layers = [make_layer(i < 2, key) for i, key in enumerate(keys[1:])]
        embedding = jax.random.normal(keys[0], (VOCAB, EMBED))
        return nn.TransformerDecoder.of(layers, embedding=embedding, norm=nn.RMSNorm(EMBED))

    def make_block(key: Array) -> emtp.MultiTokenPredictionBlock:
        config = MTPConfig.preset("megatron", num_depths)
        make = partial(make_layer, True)
        return emtp.MultiTokenPredictionBlock(config, make, embed_size=EMBED, key=key)

    return MTPModel(build(make_decoder, seed + 1), build(make_block, seed + 2))


@cache
def plainly(num_depths: int, seed: int = 0) -> speculative.Generation:
    model = make_model(num_depths, seed)
    return speculative.generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, num_drafts=0)


@pytest.mark.slow
def test_plain_decoding_is_the_whole_pass() -> None:
    model, tokens = make_model(1), np.asarray(plainly(1).tokens)

    @quick_jit
    def best(model: MTPModel, tokens: Array) -> Array:
        decoder: Any = model.decoder
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        normed = decoder.final_norm(decoder(tokens, position_ids=positions))
        return jnp.argmax(normed @ decoder.output_head().T, axis=-1)

    predicted = np.asarray(best(model, jnp.asarray(tokens)))
    for row, (length, one) in enumerate(zip(LENGTHS, predicted, strict=True)):
        end = length + NEW
        np.testing.assert_array_equal(tokens[row, length:end], one[length - 1 : end - 1])


@pytest.mark.parametrize(
    ("num_depths", "num_drafts", "recursion"),
    [(1, 1, "by_depth"), (2, 2, "by_depth"), (1, 3, "by_depth"), (2, 5, "extended")],
)
def test_drafts_change_no_token(num_depths: int, num_drafts: int, recursion: Any) -> None:
    """Rows of different lengths, with drafts that are accepted and others that are not."""
    plain = plainly(num_depths)
    drafted = speculative.generate(
        make_model(num_depths),
        PROMPTS,
        LENGTHS,
        max_new_tokens=NEW,
        num_drafts=num_drafts,
        recursion=recursion,
    )
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    accepted, steps = int(drafted.num_accepted[:, 0].sum()), int(drafted.num_steps.sum())
    assert 0 < accepted < steps


def test_rows_that_end_leave_the_others_alone() -> None:
    tokens = np.asarray(plainly(2).tokens)
    generated = [list(tokens[row, n : n + NEW]) for row, n in enumerate(LENGTHS)]

    def numbers(end: int) -> list[int]:
        return [row.index(end) + 1 if end in row else NEW for row in generated]

    end = max(range(VOCAB), key=lambda end: len(set(numbers(end))))
    expected = numbers(end)
    assert len(set(expected)) > 1
    drafted = speculative.generate(
        make_model(2), PROMPTS, LENGTHS, max_new_tokens=NEW, num_drafts=2, eos_id=end
    )
    np.testing.assert_array_equal(drafted.num_generated, expected)
    for row, (length, number) in enumerate(zip(LENGTHS, expected, strict=True)):
        new = drafted.tokens[row, length : length + number]
        np.testing.assert_array_equal(new, generated[row][:number])


@pytest.mark.slow
@pytest.mark.parametrize(("num_drafts", "recursion"), [(2, "by_depth"), (4, "extended")])
def test_drafts_are_those_of_a_fresh_start(num_drafts: int, recursion: Any) -> None:
    """After every step, as if the text so far were a prompt."""
    shape, sampler = DecodingShape(num_drafts, NEW, recursion), Sampler()
    decoding = speculative.DecodingModel.of(make_model(2))
    prefill, draft = quick_jit(speculative.prefill), quick_jit(speculative.draft)
    step = quick_jit(speculative.step)
    prompts, lengths = jnp.asarray(PROMPTS, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)
    options: dict[str, Any] = {"eos_id": NO_END, "key": KEY}
    state = prefill(decoding, prompts, lengths, shape, sampler, **options)
    for _ in range(5):
        drafts, _ = draft(decoding, state, shape, sampler, key=KEY)
        text = state.tokens[:, : PROMPTS.shape[1] + NEW]
        again = prefill(decoding, text, state.lengths - 1, shape, sampler, **options)
        np.testing.assert_array_equal(again.lengths, state.lengths)
        expected, _ = draft(decoding, again, shape, sampler, key=KEY)
        np.testing.assert_array_equal(drafts.ids, expected.ids)
        state = step(decoding, state, shape, sampler)


def test_a_decoder_that_says_nothing_of_going_back_fails_loudly() -> None:
    """Not with another text: one that hides its layers' caches must pass `rollback` on."""

    class Hiding(nn.TransformerDecoder):
        takes_rollback = False

    model = make_model(2)
    fields = {name: getattr(model.decoder, name) for name in model.decoder.__dataclass_fields__}
    hiding = emtp._types.module_of(Hiding, **fields)  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError):
        speculative.generate(
            MTPModel(hiding, model.block), PROMPTS, LENGTHS, max_new_tokens=NEW, num_drafts=2
        )
