"""Acceptance on given text, without generating."""

import dataclasses
import itertools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer

from .._acceptance import MTPAcceptance, MTPAcceptanceRate, calculate_mtp_acceptance_rate
from .._alignment import default_position_ids, inputs_and_targets
from .._batch import Batch
from .._checks import check_ids, check_integer
from .._expected_acceptance import ExpectedAcceptance
from .._model import MTPModel
from .._types import HostOrDeviceArray, Scalar, at_hand, checked
from ..cross_entropy import head_vocab_size, linear_cross_entropy
from ..distillation import draft_losses
from ._arguments import DraftVocab, check_draft_vocab, linear_head


class PositionalAcceptance(eqx.Module):
    """Acceptance in all, and by the position where the drafts begin; `+` joins batches.

    >>> tokens = np.arange(18).reshape(2, 9)
    >>> measure = eqx.filter_jit(emtp.speculative.measure_acceptance)
    >>> acceptance = measure(model, tokens, num_buckets=2)
    >>> acceptance.edges, [rate.scored.tolist() for rate in acceptance.by_bucket]
    ((0, 4, 8), [[8, 8], [6, 4]])

    **Fields:**

    - `overall`: of greedy decoding, over all positions.
    - `by_bucket`: one for each bucket of positions.
    - `edges`: bucket j holds the positions `edges[j] … edges[j + 1] - 1`.
    - `sampled`: of sampling at the temperature asked for, over all positions; `None` without one.
    """

    overall: MTPAcceptanceRate
    by_bucket: tuple[MTPAcceptanceRate, ...]
    edges: tuple[int, ...] = eqx.field(static=True)
    sampled: ExpectedAcceptance | None = None

    def __add__(self, other: "PositionalAcceptance") -> "PositionalAcceptance":
        if self.edges != other.edges:
            raise ValueError(
                f"`edges` must be the same to join batches; got {self.edges} and {other.edges}."
            )
        sampled = [x.sampled for x in (self, other) if x.sampled is not None]
        if len(sampled) == 1:
            raise ValueError(
                "`sampled` must be measured in both batches to join them, or in none; got one. "
                "Give `temperature` each time."
            )
        return PositionalAcceptance(
            overall=self.overall + other.overall,
            by_bucket=tuple(a + b for a, b in zip(self.by_bucket, other.by_bucket, strict=True)),
            edges=self.edges,
            sampled=sampled[0] + sampled[1] if sampled else None,
        )


@checked
def measure_acceptance(
    model: MTPModel,
    tokens: Integer[HostOrDeviceArray, "batch tokens"],
    *,
    segment_ids: Integer[HostOrDeviceArray, "batch tokens"] | None = None,
    position_ids: Integer[HostOrDeviceArray, "batch tokens"] | None = None,
    num_buckets: int | np.integer = 4,
    draft_vocab: DraftVocab = None,
    temperature: Scalar | None = None,
) -> PositionalAcceptance:
    """How often the depths predict what the main model predicts, on text as it stands.

    Teacher-forced: every draft follows the text's own tokens, at every position. `joint` is the
    probability that the first k drafts of greedy decoding are accepted, `conditional` that the k-th
    is if those before it are. On text that the model has generated greedily itself, the average
    over positions is the acceptance of real decoding, up to where its steps begin.

    >>> tokens = np.arange(18).reshape(2, 9)
    >>> measure = eqx.filter_jit(emtp.speculative.measure_acceptance)
    >>> acceptance = measure(model, tokens, num_buckets=2)
    >>> print(acceptance.overall.scored, acceptance.overall.joint.shape)
    [14 12] (2,)

    **Arguments:**

    - `model`: any `MTPModel`; it needs no cached step.
    - `tokens`: rows of `seq + 1` tokens.
    - `segment_ids`: for packed rows, which document each of these tokens belongs to; 0 is padding.
    - `position_ids`: of these tokens; they count from 0 in each document if `None`.
    - `num_buckets`: into how many parts of equal length the positions are split.
    - `draft_vocab`: the token ids that may be drafted, as for `generate`; `None` for all.
    - `temperature`: also gives the expected acceptance of sampling at this temperature, Σ_v min(p,
        q) (arXiv 2211.17192, §3.2), which takes a second pass; `None` leaves it out. For a head
        that is a matrix or a `LinearHead`.

    **Returns:** `PositionalAcceptance`.

    Where logits are not finite nothing is accepted.

    **Raises:** `ValueError` for rows of fewer than two tokens; if there are more buckets than
    positions, or none; for tokens outside of the vocabulary that are not padding (if the output
    head is a matrix). Inside `jit` tokens cannot be looked at: one outside is embedded as the
    decoder does.
    """
    seq = tokens.shape[1] - 1
    if seq < 1:
        raise ValueError(f"`tokens` must have at least 2 tokens a row; got {seq + 1}.")
    num_buckets = check_integer("num_buckets", num_buckets)
    if not 1 <= num_buckets <= seq:
        raise ValueError(
            f"`num_buckets` must lie in 1 … {seq}, the number of positions; got {num_buckets}."
        )
    head = model.decoder.output_head()
    drafted_ids = check_draft_vocab(draft_vocab, head)
    is_token = None if segment_ids is None else at_hand(segment_ids)
    check_ids("tokens", at_hand(tokens), head_vocab_size(head), is_token)
    input_ids, target_ids, target_mask = inputs_and_targets(tokens, segment_ids=segment_ids)
    if position_ids is None:
        position_ids = default_position_ids(tokens, segment_ids)
    positions = jnp.asarray(check_ids("position_ids", position_ids))[:, :-1]
    segments = None if segment_ids is None else jnp.asarray(segment_ids)[:, :-1]
    batch = Batch(input_ids, target_ids, target_mask, positions, segments)
    output = model(batch, inference=True)
    sampled = None
    if temperature is not None:
        sampled = draft_losses(
            model, batch, draft_vocab=drafted_ids, temperature=temperature, inference=True
        ).acceptance
    acceptance, predictions = output.mtp.acceptance, output.predictions
    assert acceptance is not None
    if drafted_ids is not None:
        drafts = _best_of(model, output.mtp.hidden_states, drafted_ids)
        acceptance = dataclasses.replace(acceptance, predictions=drafts)

    def rate(counted: Array) -> MTPAcceptanceRate:
        masked = MTPAcceptance(
            acceptance.predictions, acceptance.target_ids, acceptance.mask & counted
        )
        return calculate_mtp_acceptance_rate(masked, predictions)

    edges = tuple(round(j * seq / num_buckets) for j in range(num_buckets + 1))
    return PositionalAcceptance(
        overall=rate(jnp.ones_like(positions, bool)),
        by_bucket=tuple(
            rate((positions >= low) & (positions < high)) for low, high in itertools.pairwise(edges)
        ),
        edges=edges,
        sampled=sampled,
    )


def _best_of(
    model: MTPModel,
    hidden_states: Float[Array, "depth batch seq embed"],
    ids: Int32[Array, "draft_vocab"],
) -> Int32[Array, "depth batch seq"]:
    """What the depths draft from some ids; -1 where their logits are not finite."""
    decoder = model.decoder
    head = linear_head(decoder.output_head()).rows(ids)
    drafts = []
    for depth, raw in enumerate(hidden_states, start=1):
        normed, _ = model.block.layer(depth).normed_and_carried(raw, decoder.final_norm)
        nothing = jnp.zeros(normed.shape[:-1], jnp.int32)
        best = linear_cross_entropy(normed, head, nothing).predictions
        assert best is not None
        drafts.append(jnp.where(best < 0, -1, ids[best]))
    return jnp.stack(drafts)
