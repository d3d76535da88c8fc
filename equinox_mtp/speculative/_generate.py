"""Generation: whole rows in one compiled loop, or step by step."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int32, Integer, PRNGKeyArray

from .._checks import check_integer
from .._model import MTPModel
from .._types import HostOrDeviceArray, at_hand, checked
from ..cross_entropy import head_vocab_size
from ._arguments import (
    DraftVocab,
    EndIds,
    check_draft_vocab,
    check_end_ids,
    check_prompts,
)
from ._model import DecodingModel, check_cached_steps, check_laid_out
from ._sampling import GREEDY, Sampler
from ._shape import DecodingShape, Recursion
from ._state import DecodingState, Generation
from ._steps import prefill, step


@checked
def generate(
    model: MTPModel | DecodingModel,
    prompt_ids: Integer[HostOrDeviceArray, "batch prompt"] | Sequence[Any],
    prompt_lengths: Integer[HostOrDeviceArray, "batch"] | Sequence[Any] | None = None,
    *,
    max_new_tokens: int | np.integer,
    num_drafts: int | np.integer | None = None,
    recursion: Recursion = "by_depth",
    draft_vocab: DraftVocab = None,
    sampler: Sampler = GREEDY,
    eos_id: EndIds = None,
    key: PRNGKeyArray | None = None,
) -> Generation:
    """Continues prompts, with the prediction depths as a draft model (DeepSeek-V3, arXiv
    2412.19437, §5.4.3).

    Each step the depths draft tokens, and one pass of the main model verifies them all. Lossless:
    greedily the tokens are those of plain decoding; drawn, they have its distribution (see
    `accept_drafts`). That holds as far as the main model computes the same logits for several
    tokens at once as for one after the other: in float32 to its rounding, which decides between
    tokens that are equally good; in bfloat16 more tokens are that close, and some rows differ. The
    whole loop is one compiled program: for other prompts of the same padded
    length and batch size it is not compiled again.

    >>> generation = emtp.speculative.generate(model, [[5, 6], [9, 3]], max_new_tokens=4)
    >>> generation.tokens.shape, generation.num_generated.tolist()
    ((2, 6), [4, 4])

    **Arguments:**

    - `model`: its decoder is an `AbstractCachedDecoder`, and its layers
        `AbstractCachedDecoderLayer`s. A `DecodingModel` of it saves the time of laying it out.
    - `prompt_ids`: one prompt a row, padded at its end with anything; an array, or lists of equal
        length.
    - `prompt_lengths`: how many tokens of a row are its prompt; at least 1. `None`: all.
    - `max_new_tokens`: how many tokens to add to each row, at most.
    - `num_drafts`: drafts per step, at most 64; the number of depths if `None`. 0 is plain
        decoding. Beyond the number of layers the last one is repeated.
    - `recursion`: how it is repeated: `"by_depth"` as a further depth over the whole text, as a
        repeated layer is trained; `"extended"` from its own last output on, as vLLM drafts, which
        costs a single position for each such draft.
    - `draft_vocab`: the token ids that may be drafted, such as the frequent ones of the text
        (`frequent_ids`); `None` for all. A draft then reads these rows of the output head alone,
        and costs less; other tokens are never drafted, so fewer drafts are accepted (arXiv
        2502.14856; 2509.18362). For a head that is a matrix or a `LinearHead`. A `DecodingModel`
        has its own.
    - `sampler`: greedy, or `Sampler(temperature, top_k, top_p)`; for drafts and model alike.
    - `eos_id`: ends a row; it is the row's last token then. Of several, as `[2, 7]` or an array of
        them, the first that comes does.
    - `key`: for draws; needed unless `sampler` is greedy.

    **Returns:** `Generation`.

    **Raises:** `TypeError` if the model has no cached step; `ValueError` for arguments that make no
    sense, and for ids outside of the vocabulary (if the output head is a matrix);
    `FloatingPointError` if the highest logit of a row is not finite. Inside `jit` neither ids nor
    logits can be looked at: an id outside is embedded as the decoder does, and a row ends with -1
    where its logits are not finite.
    """
    request = _request(
        model,
        prompt_ids,
        prompt_lengths,
        max_new_tokens,
        num_drafts,
        recursion,
        draft_vocab,
        sampler,
        eos_id,
        key,
    )
    generation = _run(request, model)
    if not isinstance(generation.tokens, Tracer):
        ends = jnp.take_along_axis(generation.tokens, generation.lengths[:, None] - 1, axis=1)
        _check_finite(at_hand(ends), at_hand(generation.num_generated))
    return generation


class StreamedStep(NamedTuple):
    """What a step has added.

    - `new_ids`: of each row, the first `num_new` of which are new tokens.
    - `num_new`: 0 for rows that are done.
    - `num_accepted`: how many of the new tokens were drafts; the others are the main model's own.
        The last step of a row may end with a draft.

    >>> step = next(emtp.speculative.stream(model, [[5, 6], [9, 3]], max_new_tokens=4))
    >>> step.num_new.tolist(), step.num_accepted.tolist()  # the first one has no drafts yet
    ([1, 1], [0, 0])
    """

    new_ids: Int32[np.ndarray, "batch new"]
    num_new: Int32[np.ndarray, "batch"]
    num_accepted: Int32[np.ndarray, "batch"]


@checked
def stream(
    model: MTPModel | DecodingModel,
    prompt_ids: Integer[HostOrDeviceArray, "batch prompt"] | Sequence[Any],
    prompt_lengths: Integer[HostOrDeviceArray, "batch"] | Sequence[Any] | None = None,
    *,
    max_new_tokens: int | np.integer,
    num_drafts: int | np.integer | None = None,
    recursion: Recursion = "by_depth",
    draft_vocab: DraftVocab = None,
    sampler: Sampler = GREEDY,
    eos_id: EndIds = None,
    key: PRNGKeyArray | None = None,
) -> Iterator[StreamedStep]:
    """`generate`, step by step: yields the tokens that each step has committed.

    The first one comes from the prompts' pass. Arguments, tokens and errors are the same as in
    `generate`. The state is donated from step to step: it takes the memory of one.

    >>> steps = emtp.speculative.stream(model, [[5, 6], [9, 3]], max_new_tokens=4)
    >>> print(sum(step.num_new for step in steps))
    [4 4]
    """
    request = _request(
        model,
        prompt_ids,
        prompt_lengths,
        max_new_tokens,
        num_drafts,
        recursion,
        draft_vocab,
        sampler,
        eos_id,
        key,
    )
    return _stream(request, model)


def _stream(request: "_Request", model: MTPModel | DecodingModel) -> Iterator[StreamedStep]:
    lengths = np.asarray(request.prompt_lengths)
    accepted = np.zeros_like(lengths)
    decoding = _lay_out(request, model) if isinstance(model, MTPModel) else model
    state = _prefill(request, decoding)
    width = request.shape.num_drafts + 1
    while True:
        new_lengths, done, tokens = map(np.asarray, (state.lengths, state.done, state.tokens))
        so_far = np.asarray(state.num_accepted).sum(axis=1).astype(np.int32)
        num_new = new_lengths - lengths
        positions = np.minimum(lengths[:, None] + np.arange(width), tokens.shape[1] - 1)
        new_ids = np.take_along_axis(tokens, positions, axis=1)
        ends = np.take_along_axis(tokens, new_lengths[:, None] - 1, axis=1)
        _check_finite(ends, new_lengths - np.asarray(request.prompt_lengths))
        yield StreamedStep(new_ids, num_new, so_far - accepted)
        if done.all():
            return
        lengths, accepted = new_lengths, so_far
        state = _step((request, decoding), state)


class _Request(NamedTuple):
    """Checked arguments of a generation, without the model."""

    shape: DecodingShape
    prompt_ids: Int32[Array, "batch prompt"]
    prompt_lengths: Int32[Array, "batch"]
    draft_vocab: Int32[Array, "draft_vocab"] | None
    sampler: Sampler
    eos_id: Int32[Array, ""] | Int32[Array, "ends"]
    key: PRNGKeyArray

    def lay_out(self, model: MTPModel | DecodingModel) -> DecodingModel:
        if isinstance(model, DecodingModel):
            return model
        return DecodingModel.of(model, self.draft_vocab)

    def prefill(self, model: DecodingModel) -> DecodingState:
        return prefill(
            model,
            self.prompt_ids,
            self.prompt_lengths,
            self.shape,
            self.sampler,
            eos_id=self.eos_id,
            key=self.key,
        )

    def step(self, model: DecodingModel, state: DecodingState) -> DecodingState:
        return step(model, state, self.shape, self.sampler)


def _request(
    model: MTPModel | DecodingModel,
    prompt_ids: Any,
    prompt_lengths: Any,
    max_new_tokens: Any,
    num_drafts: Any,
    recursion: Recursion,
    draft_vocab: Any,
    sampler: Sampler,
    eos_id: Any,
    key: PRNGKeyArray | None,
) -> _Request:
    if isinstance(model, MTPModel):
        check_cached_steps(model)
        num_depths = model.block.config.num_depths
    else:
        check_laid_out(model, draft_vocab)
        num_depths = model.config.num_depths
    vocab_size = head_vocab_size(model.decoder.output_head())
    prompts, lengths = check_prompts(prompt_ids, prompt_lengths, vocab_size)
    drafts = check_integer("num_drafts", num_depths if num_drafts is None else num_drafts)
    if drafts > 0 and num_depths == 0:
        raise ValueError(
            f"`num_drafts` must be 0 for a model without depths; got {drafts} for 0 depth(s)."
        )
    # Positions are int32: those of the longest row, with the drafts of its last step.
    most = 2**31 - 2 - prompts.shape[1] - drafts
    new = check_integer("max_new_tokens", max_new_tokens, at_least=1, at_most=most)
    if key is None:
        if not sampler.is_greedy:
            raise ValueError(
                "`key` must be given if `sampler` draws tokens; got `key=None` and temperature "
                f"{sampler.temperature}. Pass `jax.random.key(0)`, for instance."
            )
        key = jax.random.key(0)
    eos = check_end_ids(eos_id, vocab_size)
    vocab = check_draft_vocab(draft_vocab, model.decoder.output_head())
    shape = DecodingShape(drafts, new, recursion)
    return _Request(shape, prompts, lengths, vocab, sampler, eos, key)


def _check_finite(last_ids: Any, num_generated: Any) -> None:
    """**Raises:** `FloatingPointError` if a row ends with the token of logits without a best."""
    if not isinstance(last_ids, np.ndarray):
        return  # on other hosts
    failed = np.flatnonzero(last_ids[:, 0] < 0)
    if failed.size:
        row = int(failed[0])
        raise FloatingPointError(
            f"the logits of the main model are not finite, for new token {num_generated[row]} of "
            f"row {row}, counted from 0 ({failed.size} row(s) in all). Look for NaN and infinity "
            "in the model's parameters."
        )


@eqx.filter_jit
def _run(request: _Request, model: MTPModel | DecodingModel) -> Generation:
    decoding = request.lay_out(model)
    state = lax.while_loop(
        lambda state: ~jnp.all(state.done),
        lambda state: request.step(decoding, state),
        request.prefill(decoding),
    )
    max_length = request.prompt_ids.shape[1] + request.shape.max_new_tokens
    is_token = jnp.arange(max_length) < state.lengths[:, None]
    return Generation(
        tokens=jnp.where(is_token, state.tokens[:, :max_length], 0),
        lengths=state.lengths,
        prompt_lengths=request.prompt_lengths,
        num_steps=state.num_steps,
        num_drafted=jnp.broadcast_to(state.num_steps[:, None], state.num_accepted.shape),
        num_accepted=state.num_accepted,
    )


@eqx.filter_jit
def _lay_out(request: _Request, model: MTPModel) -> DecodingModel:
    return request.lay_out(model)


@eqx.filter_jit
def _prefill(request: _Request, model: DecodingModel) -> DecodingState:
    return request.prefill(model)


@eqx.filter_jit(donate="all-except-first")
def _step(constant: tuple[_Request, DecodingModel], state: DecodingState) -> DecodingState:
    request, model = constant
    return request.step(model, state)
