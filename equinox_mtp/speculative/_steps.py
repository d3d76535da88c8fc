"""The phases of a decoding step: draft, verify, commit. Each is a pure function."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from .._decoder import Cache, if_taken
from .._types import checked
from ._model import DecodingModel
from ._sampling import Sampler, accept_best, accept_drawn, committed_mask
from ._shape import DecodingShape
from ._state import DecodingState, Drafts, Verification


@checked
def prefill(
    model: DecodingModel,
    prompt_ids: Int32[Array, "batch prompt"],
    prompt_lengths: Int32[Array, "batch"],
    shape: DecodingShape,
    sampler: Sampler,
    *,
    eos_id: Int32[Array, ""] | Int32[Array, "ends"],
    key: PRNGKeyArray,
) -> DecodingState:
    """Runs prompts, and commits the first new token of each row.

    >>> prompts, lengths = jnp.asarray([[5, 6], [9, 0]], jnp.int32), jnp.asarray([2, 1], jnp.int32)
    >>> state = prefill(decoding, prompts, lengths, shape, sampler, eos_id=no_eos, key=key)
    >>> print(state.lengths)
    [3 2]

    **Arguments:**

    - `model`: laid out by `DecodingModel.of`.
    - `prompt_ids`: one prompt a row, padded at its end with anything.
    - `prompt_lengths`: how many tokens of a row are its prompt; at least 1.
    - `shape`: how many drafts and new tokens there may be.
    - `sampler`: chooses the first new token.
    - `eos_id`: a token that ends a row, or several; -1 if none does.
    - `key`: for the draw; the state keeps another one for the next step.

    **Returns:** the state from which the first `step` starts.
    """
    decoder = model.decoder
    batch, prompt = prompt_ids.shape
    max_length = prompt + shape.max_new_tokens + shape.num_drafts + 1
    # Padding may be no token at all.
    prompt_ids = jnp.where(jnp.arange(prompt) < prompt_lengths[:, None], prompt_ids, 0)
    position_ids = jnp.broadcast_to(jnp.arange(prompt, dtype=jnp.int32), prompt_ids.shape)
    lengths = {"lengths": prompt_lengths}
    main_cache = decoder.init_cache(
        batch, max_length, **if_taken(decoder, rollback=shape.main_rollback)
    )
    hidden_states, main_cache = decoder.prefill(
        prompt_ids, main_cache, position_ids=position_ids, **if_taken(decoder, **lengths)
    )
    key, draw_key = jax.random.split(key)
    last = _gather_rows(hidden_states, prompt_lengths[:, None] - 1)
    first_ids, _ = sampler.choose(model.logits(decoder.final_norm(last))[:, 0], draw_key)
    tokens = jnp.pad(prompt_ids, ((0, 0), (0, max_length - prompt)))
    tokens = _scatter_rows(tokens, prompt_lengths[:, None], first_ids[:, None])
    end_lengths = prompt_lengths + shape.max_new_tokens
    _, ends = committed_mask(
        first_ids[:, None], jnp.zeros_like(first_ids), end_lengths - prompt_lengths, eos_id
    )
    states, draft_caches = model.enter(hidden_states), []
    for depth in range(1, shape.num_depths(model) + 1):
        layer: Any = model.layer(depth).transformer_layer
        rollback = if_taken(layer, rollback=shape.draft_rollback(model))
        cache = layer.init_cache(batch, max_length, hidden_states.dtype, **rollback)
        states, _, cache = _run_depth(
            model, depth, states, tokens, cache, position_ids, method="prefill", **lengths
        )
        draft_caches.append(cache)
    positions = prompt_lengths[:, None] - shape.window + jnp.arange(shape.window, dtype=jnp.int32)
    return DecodingState(
        tokens=tokens,
        lengths=prompt_lengths + 1,
        end_lengths=end_lengths,
        done=ends,
        eos_id=eos_id,
        main_cache=main_cache,
        draft_caches=tuple(draft_caches),
        hidden_states=_gather_rows(hidden_states, positions),
        key=key,
        num_steps=jnp.zeros_like(prompt_lengths),
        num_accepted=jnp.zeros((batch, shape.num_drafts), jnp.int32),
    )


@checked
def draft(
    model: DecodingModel,
    state: DecodingState,
    shape: DecodingShape,
    sampler: Sampler,
    *,
    key: PRNGKeyArray,
) -> tuple[Drafts, tuple[Cache, ...]]:
    """Proposes tokens by the prediction depths: depth k the k-th, the last one all beyond it.

    At depth k and position i a layer takes the hidden state of depth k-1 and the token at i+k. The
    drafts come from the position before the last token. Earlier positions are run again, with
    tokens and hidden states that are verified by now: the caches end up as if no other draft had
    ever been made.

    >>> drafts, draft_caches = draft(decoding, state, shape, sampler, key=key)
    >>> drafts.ids.shape
    (2, 2)

    **Arguments:**

    - `model`: laid out by `DecodingModel.of`, with the token ids that may be drafted.
    - `state`: of `prefill`, or of the step before.
    - `shape`: as given to `prefill`; with one draft or more.
    - `sampler`: chooses the drafts.
    - `key`: for draws.

    **Returns:** the drafts, and the depths' caches with the positions that were run.
    """
    last = state.lengths[:, None] - 1
    positions = last - shape.window + jnp.arange(shape.window, dtype=jnp.int32)
    tokens, states = state.tokens, model.enter(state.hidden_states)
    keys = jax.random.split(key, max(shape.num_drafts, 1))
    num_depths = shape.num_depths(model)
    ids, distributions, caches = [], [], list(state.draft_caches)
    for depth in range(1, shape.num_drafts + 1):
        cached = min(depth, num_depths)
        if depth > num_depths:
            # The last layer goes on from its own output, at the next position of its cache. The
            # next step writes all of these positions again, from what is verified by then.
            states, positions = states[:, -1:], last - 1 + depth - num_depths
        states, normed, caches[cached - 1] = _run_depth(
            model, cached, states, tokens, caches[cached - 1], positions
        )
        draft_ids, probabilities = model.choose_drafts(normed[:, -1], sampler, keys[depth - 1])
        tokens = _scatter_rows(tokens, last + depth, draft_ids[:, None])
        ids.append(draft_ids)
        distributions.append(probabilities)
    probabilities = None if sampler.is_greedy else jnp.stack(distributions, axis=1)
    return Drafts(jnp.stack(ids, axis=1), probabilities), tuple(caches)


@checked
def verify(
    model: DecodingModel,
    state: DecodingState,
    drafts: Drafts | None,
    sampler: Sampler,
    *,
    key: PRNGKeyArray,
) -> tuple[Verification, Cache]:
    """One pass of the main model over the last token and the drafts, and the verdict on them.

    >>> verification, main_cache = verify(decoding, state, drafts, sampler, key=key)
    >>> bool(jnp.all(verification.num_accepted <= 2))
    True

    **Arguments:**

    - `model`, `state`: as of `draft`.
    - `drafts`: what `draft` has proposed; `None` for a step of plain decoding.
    - `sampler`: as given to `draft`, whose distributions it is compared with.
    - `key`: for draws; another one than that of `draft`.

    **Returns:** how many drafts are accepted and what follows them, and the main model's cache with
    the positions that were run.
    """
    decoder = model.decoder
    last = state.lengths[:, None] - 1
    ids = _gather_rows(state.tokens, last)
    if drafts is not None:
        ids = jnp.concatenate([ids, drafts.ids], axis=1)
    ids = jnp.maximum(ids, 0)  # -1 is no token
    hidden_states, cache = decoder.decode(
        ids, state.main_cache, position_ids=last + jnp.arange(ids.shape[1], dtype=jnp.int32)
    )
    logits = model.logits(decoder.final_norm(hidden_states))
    if drafts is None:
        next_ids, _ = sampler.choose(logits[:, 0], key)
        return Verification(jnp.zeros_like(next_ids), next_ids, hidden_states), cache
    if drafts.probabilities is None:
        best_ids, _ = sampler.choose(logits, key)
        verdict = accept_best(drafts.ids, best_ids)
    else:
        probabilities = sampler.probabilities(logits)
        verdict = accept_drawn(drafts.ids, drafts.probabilities, probabilities, sampler, key)
    return Verification(verdict.num_accepted, verdict.next_ids, hidden_states), cache


@checked
def commit(
    state: DecodingState,
    drafts: Drafts | None,
    verification: Verification,
    main_cache: Cache,
    draft_caches: tuple[Cache, ...],
    shape: DecodingShape,
    *,
    key: PRNGKeyArray,
) -> DecodingState:
    """Appends the accepted drafts and the token after them to each row that is not done.

    >>> commit = eqx.filter_jit(emtp.speculative.commit)
    >>> after = commit(state, drafts, verification, main_cache, draft_caches, shape, key=key)
    >>> bool(jnp.all(after.lengths == state.lengths + verification.num_accepted + 1))
    True

    **Arguments:**

    - `state`: as it was given to `draft` and `verify`.
    - `drafts`, `draft_caches`: of `draft`; `None`, and the state's own caches, without drafts.
    - `verification`, `main_cache`: of `verify`.
    - `shape`: as given to `prefill`.
    - `key`: for the next step.

    **Returns:** the state after it. No row gets more than its `end_lengths`, or anything after a
    token that ends it.
    """
    num_accepted, next_ids = verification.num_accepted, verification.next_ids
    offsets = jnp.arange(shape.num_drafts + 1, dtype=jnp.int32)
    new_ids = next_ids[:, None]
    if drafts is not None:
        is_draft = offsets < num_accepted[:, None]
        new_ids = jnp.where(is_draft, jnp.pad(drafts.ids, ((0, 0), (0, 1))), new_ids)
    num_left = state.end_lengths - state.lengths
    num_new, ends = committed_mask(new_ids, num_accepted, num_left, state.eos_id)
    num_new = jnp.where(state.done, 0, num_new)
    positions = state.lengths[:, None] + offsets
    positions = jnp.where(offsets < num_new[:, None], positions, state.tokens.shape[1])
    hidden_states = jnp.concatenate([state.hidden_states, verification.hidden_states], axis=1)
    window = jnp.arange(shape.window, dtype=jnp.int32)
    active = (~state.done).astype(jnp.int32)
    # What was committed: a row may end before the last draft that was accepted.
    accepted = jnp.arange(shape.num_drafts) < jnp.minimum(num_accepted, num_new)[:, None]
    return DecodingState(
        tokens=_scatter_rows(state.tokens, positions, new_ids),
        lengths=state.lengths + num_new,
        end_lengths=state.end_lengths,
        done=state.done | ends,
        eos_id=state.eos_id,
        main_cache=main_cache,
        draft_caches=draft_caches,
        hidden_states=_gather_rows(hidden_states, num_new[:, None] + window),
        key=key,
        num_steps=state.num_steps + active,
        num_accepted=state.num_accepted + accepted,
    )


@checked
def step(
    model: DecodingModel, state: DecodingState, shape: DecodingShape, sampler: Sampler
) -> DecodingState:
    """Draft, verify, commit: one pass of the main model.

    >>> after = eqx.filter_jit(emtp.speculative.step)(decoding, state, shape, sampler)
    >>> bool(jnp.all(after.lengths > state.lengths))
    True

    **Arguments:** as of `draft`; keys come from the state.

    **Returns:** the state after it.
    """
    # Nothing is drawn greedily; the keys would be made in each step for nobody.
    is_greedy = sampler.is_greedy
    key, draft_key, verify_key = [state.key] * 3 if is_greedy else jax.random.split(state.key, 3)
    drafts, draft_caches = None, state.draft_caches
    if shape.num_drafts:
        drafts, draft_caches = draft(model, state, shape, sampler, key=draft_key)
    verification, main_cache = verify(model, state, drafts, sampler, key=verify_key)
    return commit(state, drafts, verification, main_cache, draft_caches, shape, key=key)


# The model


def _run_depth(
    model: DecodingModel,
    depth: int,
    hidden_states: Float[Array, "batch seq embed"],
    tokens: Int32[Array, "batch max_length"],
    cache: Cache,
    positions: Int32[Array, "batch seq"],
    *,
    method: Literal["decode", "prefill"] = "decode",
    **lengths: Array,
) -> tuple[Array, Array, Cache]:
    """One depth at some positions: hidden states for the next depth and for the head, the cache."""
    layer = model.layer(depth)
    position_ids = positions + depth
    ids = jnp.maximum(_gather_rows(tokens, position_ids), 0)  # -1 is no token
    embeddings = model.decoder.embed(ids, jnp.maximum(position_ids, 0))
    run = getattr(layer, method)
    hidden_states, cache = run(hidden_states, embeddings, cache, position_ids=positions, **lengths)
    normed, carried = layer.normed_and_carried(hidden_states, model.decoder.final_norm)
    return carried, normed, cache


# Rows whose last tokens are at different positions


def _gather_rows(x: Array, positions: Int32[Array, "batch seq"]) -> Array:
    """`x[b, positions[b, i]]`; the first or last entry for a position outside."""
    positions = jnp.clip(positions, 0, x.shape[1] - 1)
    return x[jnp.arange(x.shape[0])[:, None], positions]


def _scatter_rows(x: Array, positions: Int32[Array, "batch seq"], values: Array) -> Array:
    """`x` with `values` at positions; those at the end or beyond are dropped."""
    return x.at[jnp.arange(x.shape[0])[:, None], positions].set(values, mode="drop")
