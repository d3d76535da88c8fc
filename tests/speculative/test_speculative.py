"""Generation against the full forward pass, token for token and in distribution."""

import dataclasses
import itertools
import operator
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close, build, quick_jit
from hlo import compile_for
from jaxtyping import Array, TypeCheckError

import equinox_mtp as emtp
from equinox_mtp import MTPConfig, MTPModel, nn, speculative
from equinox_mtp.speculative import DecodingShape, Sampler, accept_drafts, generate, stream
from equinox_mtp.speculative._generate import _Request, _step

VOCAB, PROMPT, NEW = 5, 6, 9


@cache
def make_model(num_depths: int, preset: Any = "deepseek_v3", num_layers: int = 1) -> MTPModel:
    """Of so few tokens that drafts are accepted by chance, too."""
    config = nn.TransformerConfig(
        vocab_size=VOCAB,
        embed_size=16,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        mlp_size=24,
    )
    return MTPModel(
        build(lambda key: nn.TransformerDecoder(config, key=key), 1),
        build(
            lambda key: emtp.MultiTokenPredictionBlock(
                MTPConfig.preset(preset, num_depths),
                partial(nn.TransformerDecoderLayer, config),
                embed_size=16,
                key=key,
            ),
            2,
        ),
    )


def prompts(batch: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ragged, with anything in the padding."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, (batch, PROMPT)), rng.integers(1, PROMPT + 1, batch)


# Once for all tests: what has the same shapes is compiled once.
quick_generate = quick_jit(generate)
quick_prefill, quick_step = quick_jit(speculative.prefill), quick_jit(speculative.step)
quick_draft, quick_commit = quick_jit(speculative.draft), quick_jit(speculative.commit)
quick_measure = quick_jit(speculative.measure_acceptance)
quick_rate = quick_jit(emtp.calculate_mtp_acceptance_rate)
quick_accept = quick_jit(accept_drafts)


@quick_jit
def all_logits(model: MTPModel, tokens: Array) -> Array:
    """The main model's, by its full forward pass."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden_states: Any = model.decoder(tokens, position_ids=positions)
    normed = model.decoder.final_norm(hidden_states)
    return jnp.einsum("bse,ve->bsv", normed, model.decoder.output_head())


def greedy_oracle(
    model: MTPModel, prompt_ids: np.ndarray, lengths: np.ndarray, *end_ids: int
) -> list[list[int]]:
    """Every token by a full forward pass over the rows so far, up to the first that ends a row."""
    rows = [list(row[:length]) for row, length in zip(prompt_ids, lengths, strict=True)]
    growing = list(range(len(rows)))
    for _ in range(NEW):
        padded = np.zeros((len(rows), PROMPT + NEW), np.int32)
        for i, tokens in enumerate(rows):
            padded[i, : len(tokens)] = tokens
        best = np.asarray(all_logits(model, padded)).argmax(-1)
        for i in growing:
            rows[i].append(int(best[i, len(rows[i]) - 1]))
        growing = [i for i in growing if rows[i][-1] not in end_ids]
    return rows


def rows_of(generation: speculative.Generation) -> list[list[int]]:
    tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
    for row, length in zip(tokens, lengths, strict=True):
        assert not row[length:].any()
    return [list(row[:length]) for row, length in zip(tokens, lengths, strict=True)]


# Greedy


# No drafts; as many as depths; more than depths; fewer.
CASES = [(1, 1, 0), (2, 1, 1), (1, 2, 3), (1, 3, 2)]


@pytest.mark.parametrize(("num_layers", "num_depths", "num_drafts"), CASES)
def test_greedy_is_the_full_forward_pass(num_layers: int, num_depths: int, num_drafts: int) -> None:
    model = make_model(num_depths, num_layers=num_layers)
    prompt_ids, lengths = prompts()
    generation = generate(model, prompt_ids, lengths, max_new_tokens=NEW, num_drafts=num_drafts)
    assert rows_of(generation) == greedy_oracle(model, prompt_ids, lengths)
    np.testing.assert_array_equal(generation.num_generated, [NEW] * 3)
    np.testing.assert_array_equal(generation.prompt_lengths, lengths)
    steps, accepted = np.asarray(generation.num_steps), np.asarray(generation.num_accepted)
    # The first token is the prompt's pass's; the last step may have ended with a draft.
    ended_with_a_draft = 1 + steps + accepted.sum(1) - NEW
    assert set(ended_with_a_draft) <= {0, 1}
    tokens_per_pass = 3 * (NEW - 1) / steps.sum()
    np.testing.assert_allclose(generation.tokens_per_pass, tokens_per_pass, rtol=1e-6)
    assert np.all(np.diff(accepted, axis=1) <= 0)
    if num_drafts == 0:
        np.testing.assert_array_equal(steps, [NEW - 1] * 3)
        assert float(generation.tokens_per_pass) == 1
    else:
        assert accepted.sum() > 0
        assert steps.sum() < 3 * (NEW - 1)


@pytest.mark.parametrize("preset", ["paper", "megatron", "fast_mtp"])
def test_every_convention_is_lossless(preset: Any) -> None:
    model = make_model(2, preset)
    prompt_ids, lengths = prompts(seed=1)
    generation = quick_generate(model, prompt_ids, lengths, max_new_tokens=NEW, num_drafts=3)
    assert rows_of(generation) == greedy_oracle(model, prompt_ids, lengths)


def test_eos_ends_a_row() -> None:
    model = make_model(2)
    prompt_ids, lengths = prompts()
    num_generated = []
    for eos_id in range(VOCAB):
        generation = generate(
            model, prompt_ids, lengths, max_new_tokens=NEW, num_drafts=3, eos_id=eos_id
        )
        assert rows_of(generation) == greedy_oracle(model, prompt_ids, lengths, eos_id)
        num_generated += generation.num_generated.tolist()
    assert len(set(num_generated)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [0, 3])
def test_any_of_several_ends_a_row(num_drafts: int) -> None:
    model = make_model(2)
    prompt_ids, lengths = prompts(seed=1)
    plain = greedy_oracle(model, prompt_ids, lengths)
    ended = set()
    for end_ids in ([0, 1], (3, 1, 4), [2], []):
        # Cut by hand: behind the first new token that is one of them.
        expected = []
        for row, length in zip(plain, lengths, strict=True):
            stop = next((i for i in range(length, len(row)) if row[i] in end_ids), len(row) - 1)
            expected.append(row[: stop + 1])
            ended.add(row[stop])
        options: dict[str, Any] = {"max_new_tokens": NEW, "num_drafts": num_drafts}
        generation = generate(model, prompt_ids, lengths, **options, eos_id=end_ids)
        assert rows_of(generation) == expected
        streamed = [list(row[:length]) for row, length in zip(prompt_ids, lengths, strict=True)]
        for step in stream(model, prompt_ids, lengths, **options, eos_id=end_ids):
            for row, ids, num_new in zip(streamed, step.new_ids, step.num_new, strict=True):
                row += ids[:num_new].tolist()
        assert streamed == expected
    assert len(ended) > 2


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_no_more_tokens_than_asked_for(max_new_tokens: int) -> None:
    model = make_model(2)
    prompt_ids, lengths = prompts()
    generation = generate(model, prompt_ids, lengths, max_new_tokens=max_new_tokens, num_drafts=3)
    expected = [
        row[: length + max_new_tokens]
        for row, length in zip(greedy_oracle(model, prompt_ids, lengths), lengths, strict=True)
    ]
    assert rows_of(generation) == expected


def test_counters_hold_what_was_committed() -> None:
    """All five drafts are accepted; the row ends at the third, by an EOS or for lack of room."""
    model = with_one_answer(make_model(2))
    prompt_ids = np.asarray([[1, 2]])
    arguments: dict[str, Any] = {"num_drafts": 5}
    by_room = generate(model, prompt_ids, max_new_tokens=4, **arguments)
    np.testing.assert_array_equal(by_room.tokens, [[1, 2, 0, 0, 0, 0]])
    # Token 3 follows two of token 0: the third draft is the EOS.
    state = speculative.DecodingState(
        tokens=jnp.zeros((1, 12), jnp.int32),
        lengths=jnp.asarray([3]),
        end_lengths=jnp.asarray([10]),
        done=jnp.asarray([False]),
        eos_id=jnp.int32(3),
        main_cache=(),
        draft_caches=(),
        hidden_states=jnp.zeros((1, 6, 4)),
        key=jax.random.key(0),
        num_steps=jnp.zeros(1, jnp.int32),
        num_accepted=jnp.zeros((1, 5), jnp.int32),
    )
    by_eos = quick_commit(
        state,
        speculative.Drafts(jnp.asarray([[0, 0, 3, 0, 0]]), None),
        speculative.Verification(jnp.asarray([5]), jnp.asarray([0]), jnp.zeros((1, 6, 4))),
        (),
        (),
        DecodingShape(5, 7),
        key=state.key,
    )
    assert by_eos.lengths.tolist() == [6]
    assert by_eos.done.tolist() == [True]
    for counted in (by_room, by_eos):
        assert counted.num_steps.tolist() == [1]
        assert counted.num_accepted.tolist() == [[1, 1, 1, 0, 0]]
    assert float(by_room.tokens_per_pass) == 3
    assert by_room.accepted_per_position.tolist() == [1, 1, 1, 0, 0]
    first, second = stream(model, prompt_ids, max_new_tokens=4, **arguments)
    assert (first.num_new.tolist(), first.num_accepted.tolist()) == ([1], [0])
    assert (second.num_new.tolist(), second.num_accepted.tolist()) == ([3], [3])


def test_the_sampler_decides_in_every_phase() -> None:
    class Never0(Sampler):
        def choose(self, logits: Array, key: Any) -> Any:
            return super().choose(logits.at[..., 0].set(-jnp.inf), key)

    # Token 0 is the first of equally good ones; every phase must pass it over.
    model = speculative.DecodingModel.of(with_one_answer(make_model(2)))
    make_sampler: Any = Never0
    sizes, sampler = DecodingShape(2, 8), make_sampler()
    prompt_ids, lengths = (jnp.asarray(x, jnp.int32) for x in prompts())
    key = jax.random.key(0)
    state = quick_prefill(model, prompt_ids, lengths, sizes, sampler, eos_id=jnp.int32(-1), key=key)
    state = quick_step(model, state, sizes, sampler)
    for row, length in enumerate(lengths.tolist()):
        assert state.tokens[row, length : length + 4].tolist() == [1] * 4
    assert state.num_accepted.tolist() == [[1, 1]] * 3


# Logits that are not finite


def broken(model: MTPModel, where: str, value: float) -> MTPModel:
    """A number that is not finite, in the main model's final norm or in the depths'."""
    if where == "main":
        return eqx.tree_at(lambda m: m.decoder.norm.scale, model, replace_fn=lambda x: x * value)
    scale: Any = lambda m: m.block.layers.output_norm.scale  # noqa: E731
    return eqx.tree_at(scale, model, replace_fn=lambda x: x * value)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("function", [generate, lambda *a, **k: list(stream(*a, **k))])
def test_logits_of_nan_are_an_error(function: Any, temperature: float) -> None:
    model = broken(make_model(2), "main", jnp.nan)
    with pytest.raises(FloatingPointError, match=r"not finite, for new token 1 of row 0.*\(3 row"):
        function(
            model,
            *prompts(),
            max_new_tokens=NEW,
            num_drafts=2,
            sampler=Sampler(temperature),
            key=jax.random.key(0),
        )


def test_the_row_of_nan_is_named_and_ends_with_no_token() -> None:
    """Only one token's embedding is NaN; the rows that have it in their prompts fail."""
    model = make_model(1)
    head = model.decoder.output_head()
    model = eqx.tree_at(lambda m: m.decoder.head, model, head, is_leaf=lambda x: x is None)
    model = eqx.tree_at(
        lambda m: m.decoder.embedding, model, replace_fn=lambda x: x.at[4].set(jnp.nan)
    )
    prompt_ids = np.asarray([[1, 2, 3], [1, 4, 3], [4, 4, 0]])
    lengths = np.asarray([3, 3, 1])
    with pytest.raises(FloatingPointError, match=r"new token 1 of row 1.*\(2 row"):
        generate(model, prompt_ids, lengths, max_new_tokens=1)
    generation = quick_generate(model, prompt_ids, lengths, max_new_tokens=1)
    assert generation.num_generated.tolist() == [1, 1, 1]
    last = np.asarray(generation.tokens)[np.arange(3), np.asarray(generation.lengths) - 1]
    assert last[0] >= 0
    assert last[1:].tolist() == [-1, -1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_of_nan_are_never_accepted(value: float, temperature: float) -> None:
    model = make_model(2)
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "num_drafts": 2}
    prompt_ids, lengths = prompts()
    if temperature:
        arguments |= {"sampler": Sampler(temperature), "key": jax.random.key(0)}
    generation = generate(broken(model, "depths", value), prompt_ids, lengths, **arguments)
    assert int(generation.num_accepted.sum()) == 0
    assert generation.num_generated.tolist() == [NEW] * 3
    assert float(generation.tokens_per_pass) == 1
    if not temperature:
        assert rows_of(generation) == greedy_oracle(model, prompt_ids, lengths)


def test_measured_acceptance_of_nan_is_none() -> None:
    tokens = np.random.default_rng(3).integers(0, VOCAB, (3, 13))
    for where in ("main", "depths"):
        report = quick_measure(broken(make_model(2), where, jnp.nan), tokens, num_buckets=3)
        assert report.overall.joint.tolist() == [0, 0]
        assert report.overall.scored.tolist() == [33, 30]
        assert float(report.overall.expected_accepted_length) == 1


def test_prompts_attend_to_themselves_alone() -> None:
    """Nothing of a row's whole length is made for them but the caches."""
    model, prompt, new = make_model(1), 24, 13
    batch, heads = 1, 2
    ids, lengths = jnp.ones((batch, prompt), jnp.int32), jnp.full(batch, prompt, jnp.int32)
    shape = DecodingShape(1, new)

    @quick_jit
    def prefill(model: MTPModel, ids: Array) -> speculative.DecodingState:
        decoding = speculative.DecodingModel.of(model)
        no_eos, key = jnp.asarray(-1, jnp.int32), jax.random.key(0)
        return speculative.prefill(
            decoding, ids, lengths, shape, Sampler(0.0), eos_id=no_eos, key=key
        )

    _, program = compile_for(prefill, model, ids)
    max_length = prompt + new + 1 + 1
    assert f"{heads},{prompt},{prompt}]" in program
    assert f"{prompt},{max_length}]" not in program


def test_model_without_depths_decodes_plainly() -> None:
    model = make_model(0)
    prompt_ids, lengths = prompts()
    generation = generate(model, prompt_ids, lengths, max_new_tokens=NEW)
    assert rows_of(generation) == greedy_oracle(model, prompt_ids, lengths)
    assert generation.num_accepted.shape == (3, 0)


# Caches


def of_row(cache: Any, row: int) -> list[np.ndarray]:
    """All keys and values of a row, positions first."""
    caches = [cache] if isinstance(cache, nn.KeyValueCache) else cache
    keys = [np.moveaxis(np.asarray(x.key)[row], -1, 0) for x in caches]
    return keys + [np.moveaxis(np.asarray(x.value)[row], 1, 0) for x in caches]


def with_one_answer(model: MTPModel) -> MTPModel:
    """All logits are 0, of drafts too, and so all drafts are accepted."""
    where = lambda m: [m.decoder.norm.scale, m.block.layers.output_norm.scale]  # noqa: E731
    return eqx.tree_at(where, model, replace_fn=jnp.zeros_like)


@pytest.mark.parametrize(
    ("num_depths", "num_drafts", "all_accepted", "recursion"),
    [
        (1, 1, False, "by_depth"),
        (1, 1, True, "by_depth"),
        (2, 4, False, "by_depth"),
        (2, 4, True, "by_depth"),
        (2, 4, False, "extended"),
        (2, 4, True, "extended"),
    ],
)
def test_caches_are_as_if_no_draft_had_been_wrong(
    num_depths: int, num_drafts: int, all_accepted: bool, recursion: Any
) -> None:
    model = make_model(num_depths)
    model = with_one_answer(model) if all_accepted else model
    prompt_ids, lengths = (jnp.asarray(x, jnp.int32) for x in prompts())
    sizes, sampler = DecodingShape(num_drafts, 3 * (num_drafts + 1) + 1, recursion), Sampler()
    key, no_eos = jax.random.key(0), jnp.int32(-1)
    decoding = speculative.DecodingModel.of(model)
    state = quick_prefill(decoding, prompt_ids, lengths, sizes, sampler, eos_id=no_eos, key=key)
    rejected = 0
    for _ in range(3):
        before = state
        state = quick_step(decoding, state, sizes, sampler)
        rejected += int((np.asarray(before.num_accepted) + 1 - state.num_accepted).sum())
        # From the committed tokens alone, in one pass.
        _, draft_caches = quick_draft(decoding, state, sizes, sampler, key=key)
        fresh = quick_prefill(
            decoding, state.tokens, state.lengths - 1, sizes, sampler, eos_id=no_eos, key=key
        )
        for row, length in enumerate(np.asarray(state.lengths)):
            known = int(length) - 1
            for mine, theirs in zip(
                of_row(state.main_cache, row), of_row(fresh.main_cache, row), strict=True
            ):
                assert_close(mine[:known], theirs[:known], 1e-5)
            for depth, (mine, theirs) in enumerate(
                zip(draft_caches, fresh.draft_caches, strict=True), start=1
            ):
                # At place i depth k has seen token i+k; the last committed one is at `known`.
                end = max(known - depth + 1, 0)
                for x, y in zip(of_row(mine, row), of_row(theirs, row), strict=True):
                    assert_close(x[:end], y[:end], 1e-5)
    assert (rejected == 0) == all_accepted


@pytest.mark.parametrize("num_depths", [1, 2])
def test_extended_drafts_go_on_in_one_cache(num_depths: int) -> None:
    """Lossless, as plain decoding is."""
    model = make_model(num_depths)
    prompt_ids, lengths = prompts()
    generation = generate(
        model, prompt_ids, lengths, max_new_tokens=NEW, num_drafts=4, recursion="extended"
    )
    assert rows_of(generation) == greedy_oracle(model, prompt_ids, lengths)


def test_extended_drafts_are_drawn_too() -> None:
    drawn = generate(
        make_model(1),
        *prompts(),
        max_new_tokens=NEW,
        num_drafts=3,
        recursion="extended",
        sampler=Sampler(1.0),
        key=jax.random.key(0),
    )
    np.testing.assert_array_equal(drawn.num_generated, NEW)
    with pytest.raises((ValueError, TypeCheckError), match="recursion"):
        DecodingShape(2, 4, "other")  # type: ignore[arg-type]


# Drawn


def exact_distribution(
    model: MTPModel, prompt: list[int], num_tokens: int, sampler: Sampler
) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, by the full forward pass."""
    continuations = list(itertools.product(range(VOCAB), repeat=num_tokens))
    padded = np.zeros((len(continuations), PROMPT + NEW), np.int32)
    padded[:, : len(prompt)] = prompt
    padded[:, len(prompt) : len(prompt) + num_tokens] = continuations
    p = np.asarray(sampler.probabilities(all_logits(model, padded)))
    places = range(len(prompt) - 1, len(prompt) + num_tokens - 1)
    out = {
        tokens: float(np.prod([p[row, i, padded[row, i + 1]] for i in places]))
        for row, tokens in enumerate(continuations)
    }
    assert abs(sum(out.values()) - 1) < 1e-5
    return out


@pytest.mark.parametrize(
    ("num_drafts", "temperature", "top_k", "top_p"),
    [(2, 0.7, None, None), (3, 1.5, 4, 0.9)],
)
def test_drawn_tokens_have_the_models_distribution(
    num_drafts: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    model = make_model(2)
    prompt, num_rows, num_tokens = [1, 3, 0], 6000, 3
    generation = generate(
        model,
        np.tile(np.asarray(prompt), (num_rows, 1)),
        max_new_tokens=num_tokens,
        num_drafts=num_drafts,
        sampler=Sampler(temperature, top_k, top_p),
        key=jax.random.key(11),
    )
    drawn = np.asarray(generation.tokens)[:, len(prompt) :]
    exact = exact_distribution(model, prompt, num_tokens, Sampler(temperature, top_k, top_p))
    counts = dict.fromkeys(exact, 0)
    for tokens in map(tuple, drawn.tolist()):
        counts[tokens] += 1
    impossible = [tokens for tokens, p in exact.items() if p == 0]
    assert all(counts[tokens] == 0 for tokens in impossible)
    # Pearson's statistic, cells of few expected counts put together.
    expected = np.asarray([num_rows * p for p in exact.values()])
    observed = np.asarray(list(counts.values()), float)
    few = expected < 5
    expected = np.append(expected[~few], expected[few].sum())
    observed = np.append(observed[~few], observed[few].sum())
    expected, observed = expected[expected > 0], observed[expected > 0]
    degrees = len(expected) - 1
    assert degrees > 10
    statistic = ((observed - expected) ** 2 / expected).sum()
    # Mean `degrees`, standard deviation √(2 degrees): a one in some thousand chance.
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)
    assert 0 < float(generation.accepted_per_position[0]) < 1


def test_accepted_or_not_the_next_token_has_the_models_distribution() -> None:
    # Exactly: the probabilities of acceptance and of the residual, put together.
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 2).astype(np.float32)
    accepted = np.minimum(p, q)
    residual = np.maximum(p - q, 0)
    total = accepted + (1 - accepted.sum()) * residual / residual.sum()
    np.testing.assert_allclose(total, p, atol=1e-6)
    # And the function draws from just that.
    num_rows = 20_000
    draft_key, key = jax.random.split(jax.random.key(0))
    ids = jax.random.categorical(draft_key, jnp.log(q), shape=(num_rows, 1)).astype(jnp.int32)
    verdict = quick_accept(
        ids,
        jnp.broadcast_to(q, (num_rows, 1, 4)),
        jnp.broadcast_to(p, (num_rows, 2, 4)),
        Sampler(1.0),
        key=key,
    )
    stays = np.asarray(verdict.num_accepted) == 1
    error = 4 / np.sqrt(num_rows)
    np.testing.assert_allclose(stays.mean(), accepted.sum(), atol=error)
    first = np.where(stays, np.asarray(ids)[:, 0], np.asarray(verdict.next_ids))
    np.testing.assert_allclose(np.bincount(first, minlength=4) / num_rows, p, atol=error)
    after = np.asarray(verdict.next_ids)[stays]
    np.testing.assert_allclose(np.bincount(after, minlength=4) / len(after), p, atol=2 * error)


@pytest.mark.parametrize("is_greedy", [False, True])
def test_equal_distributions_leave_no_residual(is_greedy: bool) -> None:
    sampler = Sampler(0.0 if is_greedy else 1.0)
    p = jnp.asarray([[[1.0, 0.0, 0.0]] * 3])
    ids = jnp.zeros((1, 2), jnp.int32)
    verdict = accept_drafts(ids, p[:, :2], p, sampler, key=jax.random.key(0))
    assert verdict.num_accepted.tolist() == [2]
    assert verdict.next_ids.tolist() == [0]
    # Rounding may reject where nothing is left over: the token is drawn from p, not from nowhere.
    q = jnp.asarray([[[1.0 + 1e-6, 0.0, 0.0]] * 2])
    for seed in range(20):
        verdict = accept_drafts(ids, q, p, sampler, key=jax.random.key(seed))
        assert verdict.next_ids.tolist() == [0]


def test_drafts_that_cannot_be_verified() -> None:
    ids, q = jnp.zeros((2, 1), jnp.int32), jnp.full((2, 1, 4), 0.25)
    p, key = jnp.full((2, 2, 4), 0.25), jax.random.key(0)
    for positions in (1, 3):
        wrong = jnp.full((2, positions, 4), 0.25)
        with pytest.raises(
            ValueError, match=f"`probabilities` must hold 2 positions.*got {positions}"
        ):
            accept_drafts(ids, q, wrong, Sampler(1.0), key=key)
    for draft_id in (-1, 4):
        with pytest.raises(ValueError, match=r"`draft_ids` must lie in 0 … 3"):
            accept_drafts(ids + draft_id, q, p, Sampler(1.0), key=key)
        verdict = quick_accept(ids + draft_id, q, p, Sampler(1.0), key=key)
        assert verdict.num_accepted.tolist() == [0, 0]


def probabilities_oracle(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """One row at a time, in float64."""
    out = np.zeros(logits.shape)
    for index in np.ndindex(logits.shape[:-1]):
        row = logits[index].astype(np.float64)
        row = np.exp((row - row.max()) / temperature)
        order = np.argsort(-row, kind="stable")
        keep = set(order[:top_k])
        if top_p is not None:
            row = np.where([i in keep for i in range(len(row))], row, 0)
            row, mass, nucleus = row / row.sum(), 0.0, set()
            for i in order:
                if mass >= top_p:
                    break
                nucleus.add(i)
                mass += row[i]
            keep &= nucleus
        row = np.where([i in keep for i in range(len(row))], row, 0)
        out[index] = row / row.sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.3, None, None),
        (2.0, 3, None),
        (1.0, 1, None),
        (1.0, 100, 1.0),
        (1.0, None, 0.5),
        (0.8, 4, 0.9),
        (1.0, None, 1e-6),
    ],
)
def test_probabilities(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32) * 2
    actual = Sampler(temperature, top_k, top_p).probabilities(jnp.asarray(logits))
    assert_close(actual, probabilities_oracle(logits, temperature, top_k, top_p))


@pytest.mark.parametrize(
    ("logits", "top_k", "top_p", "expected"),
    [
        ([0, 0, 0, 0], None, 0.5, [1 / 2, 1 / 2, 0, 0]),
        ([0, 0, 0, 0], None, 0.51, [1 / 3, 1 / 3, 1 / 3, 0]),
        ([0, 0, 0, 0], 3, None, [1 / 3, 1 / 3, 1 / 3, 0]),
        ([0, 1, 0, 1], 1, None, [0, 1, 0, 0]),
        ([0, 1, 0, 1], 3, 0.4, [0, 1, 0, 0]),
        ([-np.inf, 2, -np.inf, 2], 3, 0.999, [0, 1 / 2, 0, 1 / 2]),
    ],
)
def test_of_equal_logits_the_first_are_kept(
    logits: list[float], top_k: int | None, top_p: float | None, expected: list[float]
) -> None:
    probabilities = Sampler(1.0, top_k, top_p).probabilities(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("temperature", [10.0**-e for e in range(3, 47)] + [1e4, 1e38, 1e300])
def test_probabilities_of_any_temperature(temperature: float, scale: float) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    logits = scale * logits / np.abs(logits).max()
    expected = probabilities_oracle(logits, temperature, None, None)
    sampler = Sampler(temperature)
    np.testing.assert_allclose(sampler.probabilities(jnp.asarray(logits)), expected, atol=1e-3)
    masked = jnp.asarray([[-np.inf, 1.0, -np.inf]])
    np.testing.assert_array_equal(sampler.probabilities(masked), [[0, 1, 0]])
    assert sampler.is_greedy == (temperature < 1.17549435e-38)
    ids = sampler.choose(jnp.asarray(logits), jax.random.key(0))[0]
    if temperature <= 1e-6:
        np.testing.assert_array_equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("top_p", [10.0**-e for e in range(3, 47)])
def test_a_tiny_nucleus_is_the_best_token(top_p: float) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
    probabilities = Sampler(1.0, top_p=top_p).probabilities(logits)
    np.testing.assert_array_equal(probabilities, jax.nn.one_hot(logits.argmax(-1), 7))


@pytest.mark.parametrize(
    ("num_drafts", "arguments"),
    [
        (0, {"temperature": 1e-30}),
        (2, {"temperature": 1e-38}),
        (2, {"temperature": 1e-30}),
        (2, {"temperature": 1, "top_p": 1e-46}),
    ],
)
def test_nearly_greedy_is_greedy(num_drafts: int, arguments: dict[str, Any]) -> None:
    model = make_model(2)
    prompt_ids, lengths = prompts()
    generation = generate(
        model,
        prompt_ids,
        lengths,
        max_new_tokens=NEW,
        num_drafts=num_drafts,
        key=jax.random.key(0),
        sampler=Sampler(**arguments),
    )
    assert rows_of(generation) == greedy_oracle(model, prompt_ids, lengths)


@pytest.mark.parametrize(
    ("logits", "best"),
    [([1, np.nan, 2], -1), ([np.inf, 0, 0], -1), ([-np.inf] * 3, -1), ([-np.inf, 0, 0], 1)],
)
@pytest.mark.parametrize("temperature", [0, 1e-30])
def test_logits_without_a_best(logits: list[float], best: int, temperature: float) -> None:
    sampler, array = Sampler(temperature, top_k=1), jnp.asarray([logits], jnp.float32)
    assert sampler.choose(array, jax.random.key(0))[0].tolist() == [best]
    probabilities = sampler.probabilities(array)
    assert probabilities.tolist() == [[float(i == best) for i in range(3)]]
    assert sampler.draw(probabilities, jax.random.key(0)).tolist() == [best]


# Step by step


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_is_generate(temperature: float) -> None:
    model = make_model(2)
    prompt_ids, lengths = prompts()
    arguments: dict[str, Any] = {
        "max_new_tokens": NEW,
        "num_drafts": 2,
        "sampler": Sampler(temperature),
        "eos_id": 4,
        "key": jax.random.key(5),
    }
    rows = [list(row[:length]) for row, length in zip(prompt_ids, lengths, strict=True)]
    steps = list(stream(model, prompt_ids, lengths, **arguments))
    for new_ids, num_new, num_accepted in steps:
        assert np.all((num_new - num_accepted == 1) | (num_new - num_accepted == 0))
        for row, ids, count in zip(rows, new_ids, num_new, strict=True):
            row.extend(ids[:count])
    generation = generate(model, prompt_ids, lengths, **arguments)
    assert rows == rows_of(generation)
    assert len(steps) == 1 + int(generation.num_steps.max())
    assert steps[0].num_new.tolist() == [1, 1, 1]
    accepted = sum(step.num_accepted for step in steps)
    np.testing.assert_array_equal(accepted, generation.num_accepted.sum(1))


def test_other_prompts_are_not_compiled_anew() -> None:
    model = make_model(1)
    traces = []

    class Decoder(nn.TransformerDecoder):
        def final_norm(self, hidden_states: Array) -> Array:
            traces.append(hidden_states.shape)
            return super().final_norm(hidden_states)

    decoder = object.__new__(Decoder)
    for name, value in vars(model.decoder).items():
        object.__setattr__(decoder, name, value)
    model = MTPModel(decoder, model.block)
    arguments: dict[str, Any] = {"max_new_tokens": 3, "num_drafts": 1}
    for run in (generate, lambda *a, **k: list(stream(*a, **k))):
        run(model, *prompts(seed=0), **arguments, sampler=Sampler(0.5), key=jax.random.key(0))
        seen = len(traces)
        assert seen > 0
        run(model, *prompts(seed=1), **arguments, sampler=Sampler(0.7), key=jax.random.key(1))
        assert len(traces) == seen


def test_steps_reuse_the_memory_of_the_state() -> None:
    model, sizes, sampler = (
        speculative.DecodingModel.of(make_model(2)),
        DecodingShape(2, NEW),
        Sampler(),
    )
    prompt_ids, lengths = (jnp.asarray(x, jnp.int32) for x in prompts())
    state = quick_prefill(
        model, prompt_ids, lengths, sizes, sampler, eos_id=jnp.int32(-1), key=jax.random.key(0)
    )
    caches = jax.tree.leaves((state.main_cache, state.draft_caches))
    request = _Request(sizes, prompt_ids, lengths, None, sampler, jnp.int32(-1), jax.random.key(0))
    arguments = ((request, model), state)
    run_step: Any = _step
    memory = run_step.lower(*arguments).compile().compiled.memory_analysis()
    cache_bytes = sum(x.nbytes for x in caches)
    assert memory.alias_size_in_bytes >= cache_bytes
    next_state = run_step(*arguments)
    assert all(x.is_deleted() for x in caches)
    assert not any(x.is_deleted() for x in jax.tree.leaves(next_state.main_cache))


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_drafts": -1}, "`num_drafts` must be at least 0"),
        ({"num_drafts": 10**6}, "`num_drafts` must be at least 0 and at most 64"),
        ({"max_new_tokens": 10**12}, "`max_new_tokens` must be at least 1 and at most"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be an integer"),
        ({"prompt_lengths": np.asarray([2**32 + 1] * 3)}, "`prompt_lengths` must lie in 1 … 6"),
        ({"prompt_lengths": [1, 1]}, "`prompt_lengths` must be one a row"),
        ({"prompt_ids": np.full((3, 6), VOCAB)}, "`prompt_ids` must lie in 0 … 4.* got 5 … 5"),
        ({"prompt_ids": jnp.full((3, 6), -1)}, "`prompt_ids` must lie in 0 … 4"),
        ({"prompt_ids": np.full((3, 6), 2**32)}, "`prompt_ids` must lie in"),
        ({"prompt_ids": [[1, 2], [3]]}, "`prompt_ids` must have rows of one length"),
        ({"prompt_ids": [1, 2]}, "`prompt_ids` must have two axes, such as"),
        ({"prompt_ids": [[1.0, 2.0]] * 3}, "`prompt_ids` must be integers"),
        ({"prompt_ids": "text"}, "`prompt_ids` must be .* got text. Encode it first"),
        ({"prompt_ids": ["abc"]}, "`prompt_ids` must be .* got text. Encode it first"),
        ({"prompt_ids": [[1, 2], "abc"]}, "`prompt_ids` must be .* got text. Encode it first"),
        ({"prompt_ids": [["a", "b"]]}, "`prompt_ids` must be .* got text. Encode it first"),
        ({"eos_id": VOCAB}, "`eos_id` must be at least 0 and at most 4"),
        ({"eos_id": 2**32}, "`eos_id` must be at least 0 and at most 4"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"prompt_lengths": np.asarray([0, 1, 1])}, "`prompt_lengths` must lie in 1 … 6"),
        ({"prompt_lengths": np.asarray([1, 7, 1])}, "`prompt_lengths` must lie in 1 … 6"),
        ({"prompt_ids": np.zeros((3, 0), int)}, "`prompt_ids` must have at least one token"),
        ({"sampler": Sampler(1.0)}, "`key` must be given if `sampler` draws tokens"),
        ({"eos_id": -1}, "`eos_id` must be at least 0"),
        ({"eos_id": np.asarray([1, VOCAB])}, "`eos_id` must be at least 0 and at most 4; got 5"),
        ({"eos_id": jnp.asarray([[1]])}, r"`eos_id` must be an integer .*; got \[1\]"),
        ({"eos_id": [1, VOCAB]}, "`eos_id` must be at least 0 and at most 4; got 5"),
        ({"eos_id": "ab"}, "`eos_id` must be an integer at least 0 and at most 4; got 'a'"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_arguments_that_make_no_sense(
    function: Any, arguments: dict[str, Any], message: str
) -> None:
    prompt_ids, lengths = prompts()
    defaults = {"prompt_ids": prompt_ids, "prompt_lengths": lengths, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message) as raised:
        function(make_model(1), **{**defaults, **arguments})
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": np.inf}, "`temperature` must be finite"),
        ({"temperature": np.nan}, "`temperature` must be finite"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"top_p": np.nan}, "`top_p` must be finite"),
        ({"top_p": 0.0}, "`top_p` must be above 0"),
        ({"top_p": 1.5}, "`top_p` must be above 0 and at most 1"),
    ],
)
def test_samplers_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_end_tokens_in_arrays(as_array: Any) -> None:
    model, (prompt_ids, lengths) = make_model(1), prompts()
    run = quick_jit(partial(generate, model, prompt_ids, lengths, max_new_tokens=NEW))
    for end_ids in (2, [1, 3]):
        expected = generate(model, prompt_ids, lengths, max_new_tokens=NEW, eos_id=end_ids)
        ends = as_array(end_ids)
        actual = generate(model, prompt_ids, lengths, max_new_tokens=NEW, eos_id=ends)
        assert eqx.tree_equal(actual, expected)
        # Traced, too.
        np.testing.assert_array_equal(run(eos_id=ends).tokens, expected.tokens)


def test_plain_lists_and_numpy_scalars_are_taken() -> None:
    model = make_model(1)
    arguments: dict[str, Any] = {"num_drafts": 1, "sampler": Sampler(0.5, 3, 0.9)}
    expected = generate(
        model,
        np.asarray([[1, 2, 3], [4, 1, 0]]),
        np.asarray([3, 2]),
        max_new_tokens=3,
        eos_id=4,
        key=jax.random.key(0),
        **arguments,
    )
    actual = generate(
        model,
        [[1, 2, 3], [4, 1, -7]],
        [3, 2],
        max_new_tokens=np.int64(3),
        eos_id=np.int64(4),
        num_drafts=np.int32(1),
        sampler=Sampler(np.float32(0.5), np.int64(3), np.float64(0.9)),
        key=jax.random.key(0),
    )
    assert eqx.tree_equal(actual, expected)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**32])
def test_measured_tokens_lie_in_the_vocabulary(token: int) -> None:
    model, tokens = make_model(1), np.ones((2, 13), np.int64)
    tokens[1, -1] = token
    with pytest.raises(ValueError, match="`tokens` must lie in"):
        speculative.measure_acceptance(model, tokens)


def test_measured_rows_have_positions() -> None:
    with pytest.raises(ValueError, match="`tokens` must have at least 2 tokens a row; got 1"):
        speculative.measure_acceptance(make_model(1), np.ones((2, 1), int))


def test_sizes_and_depths_are_checked_in_the_phases_too() -> None:
    with pytest.raises(ValueError, match="`num_drafts` must be at least 0 and at most 64"):
        DecodingShape(10**6, 4)
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1"):
        DecodingShape(2, 0)
    with pytest.raises(ValueError, match="`depth` counts from 1; got 0"):
        speculative.DecodingModel.of(make_model(2)).layer(0)


def test_drafts_need_depths() -> None:
    with pytest.raises(ValueError, match=r"got 1 for 0 depth\(s\)"):
        generate(make_model(0), *prompts(), max_new_tokens=2, num_drafts=1)


def test_models_without_a_cached_step_are_named() -> None:
    model = make_model(1)

    class Plain(emtp.AbstractDecoder):
        decoder: emtp.AbstractDecoder

        def embed(self, input_ids: Array, position_ids: Array) -> Array:
            return self.decoder.embed(input_ids, position_ids)

        def __call__(self, input_ids: Array, **arguments: Any) -> Any:
            return self.decoder(input_ids, **arguments)

        def final_norm(self, hidden_states: Array) -> Array:
            return self.decoder.final_norm(hidden_states)

        def output_head(self) -> Any:
            return self.decoder.output_head()

    with pytest.raises(TypeError, match="its decoder is of the class `Plain`, not an `Abstract"):
        generate(MTPModel(Plain(model.decoder), model.block), *prompts(), max_new_tokens=2)


# Acceptance without generating


def assert_same_counts(actual: Any, expected: Any) -> None:
    # Sums of batches are of 64 bits.
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other, strict=False)


def test_measured_acceptance_is_that_of_the_model_output() -> None:
    model = make_model(2)
    tokens = np.random.default_rng(3).integers(0, VOCAB, (3, 13))
    report = quick_measure(model, tokens, num_buckets=3)
    output = quick_jit(model)(*emtp.inputs_and_targets(tokens), inference=True)
    expected = quick_rate(output.mtp.acceptance, output.predictions)
    assert_same_counts(report.overall, expected)
    assert report.edges == (0, 4, 8, 12)
    # The buckets share the positions out among them; drafts, one position a time.
    total = report.by_bucket[0] + report.by_bucket[1] + report.by_bucket[2]
    assert_same_counts(total, expected)
    acceptance = output.mtp.acceptance
    assert acceptance is not None
    assert output.predictions is not None
    best, main = np.asarray(acceptance.predictions), np.asarray(output.predictions)
    for (low, high), rate in zip(itertools.pairwise(report.edges), report.by_bucket, strict=True):
        for depth in (1, 2):
            places = range(low, min(high, 12 - depth))
            accepted = sum(
                int(best[depth - 1, row, i] == main[row, i + depth])
                for row in range(3)
                for i in places
            )
            assert int(rate.accepted[depth - 1]) == accepted
            assert int(rate.scored[depth - 1]) == 3 * len(places)
    joined = report + report
    assert eqx.tree_equal(joined.overall, expected + expected)


def test_decoding_accepts_what_is_measured_on_its_text() -> None:
    """Every step's count is that of the same place, found without generating."""
    model = make_model(3)
    prompt_ids, lengths = prompts(batch=4)
    new = 16
    steps = list(stream(model, prompt_ids, lengths, max_new_tokens=new))
    generation = generate(model, prompt_ids, lengths, max_new_tokens=new)
    output = quick_jit(model)(
        *emtp.inputs_and_targets(np.asarray(generation.tokens)), inference=True
    )
    assert output.mtp.acceptance is not None
    assert output.predictions is not None
    depths, main = np.asarray(output.mtp.acceptance.predictions), np.asarray(output.predictions)
    counts = []
    for row in range(4):
        last = int(lengths[row])  # of the token that the prompt's pass has added
        for step in steps[1:]:
            if step.num_new[row] and last + 4 < int(generation.lengths[row]):
                right = [depths[k - 1, row, last - 1] == main[row, last - 1 + k] for k in (1, 2, 3)]
                expected = right.index(False) if False in right else 3
                assert int(step.num_accepted[row]) == expected
                counts.append(expected)
            last += int(step.num_new[row])
    assert len(set(counts)) > 1


@pytest.mark.parametrize("num_buckets", [0, 13])
def test_buckets_that_make_no_sense(num_buckets: int) -> None:
    with pytest.raises(ValueError, match=r"`num_buckets` must lie in 1 … 12"):
        emtp.speculative.measure_acceptance(
            make_model(1), np.zeros((1, 13), int), num_buckets=num_buckets
        )


def test_positions_that_32_bits_cannot_hold() -> None:
    tokens = np.ones((1, 5), int)
    with pytest.raises(ValueError, match=r"`position_ids` must lie in .* 32 bits"):
        emtp.speculative.measure_acceptance(
            make_model(1), tokens, position_ids=np.arange(5)[None] + 2**32
        )


def test_acceptance_of_different_depths_does_not_add_up() -> None:
    one, two = (
        emtp.MTPAcceptanceRate(*[jnp.ones(num_depths, jnp.int32)] * 5) for num_depths in (1, 2)
    )
    edges = (0, 4)
    report = emtp.speculative.PositionalAcceptance(one, (one,), edges)
    assert (report + report).by_bucket[0].scored.tolist() == [2]
    with pytest.raises(ValueError, match="must have the same number of depths; got 1 and 2"):
        operator.add(report, emtp.speculative.PositionalAcceptance(two, (two,), edges))
    with pytest.raises((ValueError, TypeCheckError), match="scored"):  # the hook's check is first
        dataclasses.replace(one, scored=two.scored)


def test_matrices_are_cast_once_before_decoding() -> None:
    """In the loop over steps they would be read in float32, and cast, again and again."""
    config = nn.TransformerConfig(
        vocab_size=VOCAB, embed_size=16, num_layers=2, num_heads=2, dtype="bfloat16"
    )
    decoder = build(lambda key: nn.TransformerDecoder(config, key=key))
    block = build(
        lambda key: emtp.MultiTokenPredictionBlock(
            MTPConfig.preset("deepseek_v3", 2),
            partial(nn.TransformerDecoderLayer, config),
            embed_size=16,
            key=key,
        )
    )
    decoding = speculative.DecodingModel.of(MTPModel(decoder, block))
    unrolled: Any = decoding.decoder
    used = (unrolled.layers, decoding.layers, unrolled.output_head(), unrolled.embedding)
    for array in jax.tree.leaves(eqx.filter(used, eqx.is_array)):
        assert array.dtype == (jnp.bfloat16 if array.ndim >= 2 else jnp.float32)
    # Bit for bit what the parameters as they are give.
    ids = jnp.asarray(prompts()[0])
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    cast, _ = unrolled.decode(ids, unrolled.init_cache(len(ids), 32), position_ids=positions)
    states = decoder.embed(ids, positions)
    for layer in map(decoder.layer, range(2)):
        cache = layer.init_cache(len(ids), 32, jnp.bfloat16)
        states, _ = layer.decode(states, cache, position_ids=positions)
    np.testing.assert_array_equal(cast, states)
