"""Generation: whole rows in one compiled loop, or step by step."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int32, Integer, PRNGKeyArray

from .._model import MTPModel
from .._types import HostOrDeviceArray, checked
from ._model import DecodingModel, check_cached_steps
from ._sampling import Sampler
from ._state import DecodingState, Generation
from ._steps import Sizes, prefill, step


@checked
def generate(
    model: MTPModel,
    prompt_ids: Integer[HostOrDeviceArray, "batch prompt"],
    prompt_lengths: Integer[HostOrDeviceArray, "batch"] | None = None,
    *,
    max_new_tokens: int,
    num_drafts: int | None = None,
    temperature: float | int = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Generation:
    """Continues prompts, with the prediction depths as a draft model (DeepSeek-V3, arXiv
    2412.19437, §5.4.3).

    Each step the depths draft tokens, and one pass of the main model verifies them all. Lossless:
    greedily the tokens are those of plain decoding; drawn, they have its distribution (see
    `accept_drafts`). The whole loop is one compiled program: for other prompts of the same padded
    length and batch size it is not compiled anew.

    **Arguments:**

    - `model`: its decoder is an `AbstractCachedDecoder`, and its layers
        `AbstractCachedDecoderLayer`s.
    - `prompt_ids`: one prompt a row, padded at its end.
    - `prompt_lengths`: how many tokens of a row are its prompt; at least 1. `None`: all.
    - `max_new_tokens`: how many tokens to add to each row, at most.
    - `num_drafts`: drafts a step; the number of depths if `None`. 0 is plain decoding. Beyond the
        number of depths the last layer is repeated.
    - `temperature`, `top_k`, `top_p`: see `Sampler`; they act on drafts and model alike.
    - `eos_id`: ends a row; it is the row's last token then.
    - `key`: for draws; needed if `temperature` is above 0.

    **Returns:** `Generation`.

    **Raises:** `TypeError` if the model has no cached step; `ValueError` for arguments that make no
    sense.
    """
    request = _request(
        model, prompt_ids, prompt_lengths, max_new_tokens, num_drafts, eos_id, temperature, key
    )
    sampler = Sampler(float(temperature), top_k, top_p)
    return _run(request.sizes, model, sampler, *request.arrays)


class StreamedStep(NamedTuple):
    """What a step has added.

    - `new_ids`: of each row, the first `num_new` of which are new tokens.
    - `num_new`: 0 for rows that are done.
    - `num_accepted`: how many of the new tokens were drafts; the others are the main model's own.
    """

    new_ids: Int32[np.ndarray, "batch new"]
    num_new: Int32[np.ndarray, "batch"]
    num_accepted: Int32[np.ndarray, "batch"]


@checked
def stream(
    model: MTPModel,
    prompt_ids: Integer[HostOrDeviceArray, "batch prompt"],
    prompt_lengths: Integer[HostOrDeviceArray, "batch"] | None = None,
    *,
    max_new_tokens: int,
    num_drafts: int | None = None,
    temperature: float | int = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Iterator[StreamedStep]:
    """`generate`, step by step: yields the tokens that each step has committed.

    The first one comes from the prompts' pass. The arguments are those of `generate`, and so are
    the tokens. The state is donated from step to step: it takes the memory of one.
    """
    request = _request(
        model, prompt_ids, prompt_lengths, max_new_tokens, num_drafts, eos_id, temperature, key
    )
    sampler = Sampler(float(temperature), top_k, top_p)
    return _stream(request, model, sampler)


def _stream(request: "_Request", model: MTPModel, sampler: Sampler) -> Iterator[StreamedStep]:
    lengths = np.asarray(request.prompt_lengths)
    accepted = np.zeros_like(lengths)
    decoding = _lay_out(model)
    state = _prefill(request.sizes, decoding, sampler, *request.arrays)
    width = request.sizes.num_drafts + 1
    while True:
        new_lengths, done, tokens = map(np.asarray, (state.lengths, state.done, state.tokens))
        so_far = np.asarray(state.num_accepted).sum(axis=1).astype(np.int32)
        num_new = new_lengths - lengths
        places = np.minimum(lengths[:, None] + np.arange(width), tokens.shape[1] - 1)
        new_ids = np.take_along_axis(tokens, places, axis=1)
        yield StreamedStep(new_ids, num_new, np.minimum(so_far - accepted, num_new))
        if done.all():
            return
        lengths, accepted = new_lengths, so_far
        state = _step((request.sizes, decoding, sampler), state)


class _Request(NamedTuple):
    """Checked arguments."""

    sizes: Sizes
    prompt_ids: Array
    prompt_lengths: Array
    eos_id: Array
    key: PRNGKeyArray

    @property
    def arrays(self) -> tuple[Array, Array, Array, PRNGKeyArray]:
        return self.prompt_ids, self.prompt_lengths, self.eos_id, self.key


def _request(
    model: MTPModel,
    prompt_ids: Any,
    prompt_lengths: Any,
    max_new_tokens: int,
    num_drafts: int | None,
    eos_id: int | None,
    temperature: float,
    key: PRNGKeyArray | None,
) -> _Request:
    check_cached_steps(model)
    num_depths = model.block.config.num_depths
    num_drafts = num_depths if num_drafts is None else num_drafts
    if num_drafts < 0 or (num_drafts > 0 and num_depths == 0):
        raise ValueError(
            f"`num_drafts` must be zero or positive, and zero for a model without depths; got "
            f"{num_drafts} for {num_depths} depth(s)."
        )
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1; got {max_new_tokens}.")
    prompts = jnp.asarray(prompt_ids, jnp.int32)
    batch, prompt = prompts.shape
    if prompt < 1:
        raise ValueError(
            "`prompt_ids` must have at least one token a row; got rows of none. Begin with a token "
            "such as the end of a document."
        )
    if prompt_lengths is None:
        prompt_lengths = np.full(batch, prompt, np.int32)
    lengths = jnp.asarray(prompt_lengths, jnp.int32)
    if not isinstance(lengths, Tracer):
        on_host = np.asarray(lengths)
        low, high = int(np.min(on_host, initial=prompt)), int(np.max(on_host, initial=1))
        if low < 1 or high > prompt:
            raise ValueError(
                f"`prompt_lengths` must lie in 1 … {prompt}, the length of the rows; got {low} … "
                f"{high}."
            )
    if key is None:
        if temperature != 0:
            raise ValueError(
                f"`key` must be given if `temperature` is not 0; got `key=None` and {temperature}. "
                "Pass `jax.random.key(0)`, for instance."
            )
        key = jax.random.key(0)
    if eos_id is not None and eos_id < 0:
        raise ValueError(f"`eos_id` must be a token id, or `None`; got {eos_id}.")
    eos = jnp.asarray(-1 if eos_id is None else eos_id, jnp.int32)
    return _Request(Sizes(num_drafts, max_new_tokens), prompts, lengths, eos, key)


@eqx.filter_jit
def _run(
    sizes: Sizes,
    model: MTPModel,
    sampler: Sampler,
    prompt_ids: Array,
    prompt_lengths: Array,
    eos_id: Array,
    key: PRNGKeyArray,
) -> Generation:
    decoding = DecodingModel.of(model)
    state = prefill(decoding, prompt_ids, prompt_lengths, sizes, sampler, eos_id=eos_id, key=key)
    state = lax.while_loop(
        lambda state: ~jnp.all(state.done),
        lambda state: step(decoding, state, sizes, sampler),
        state,
    )
    tokens = state.tokens[:, : prompt_ids.shape[1] + sizes.max_new_tokens]
    is_token = jnp.arange(tokens.shape[1]) < state.lengths[:, None]
    return Generation(
        tokens=jnp.where(is_token, tokens, 0),
        lengths=state.lengths,
        prompt_lengths=prompt_lengths,
        num_steps=state.num_steps,
        num_drafted=jnp.broadcast_to(state.num_steps[:, None], state.num_accepted.shape),
        num_accepted=state.num_accepted,
    )


@eqx.filter_jit
def _lay_out(model: MTPModel) -> DecodingModel:
    return DecodingModel.of(model)


@eqx.filter_jit
def _prefill(
    sizes: Sizes,
    model: DecodingModel,
    sampler: Sampler,
    prompt_ids: Array,
    prompt_lengths: Array,
    eos_id: Array,
    key: PRNGKeyArray,
) -> DecodingState:
    return prefill(model, prompt_ids, prompt_lengths, sizes, sampler, eos_id=eos_id, key=key)


@eqx.filter_jit(donate="all-except-first")
def _step(constant: tuple[Sizes, DecodingModel, Sampler], state: DecodingState) -> DecodingState:
    sizes, model, sampler = constant
    return step(model, state, sizes, sampler)
