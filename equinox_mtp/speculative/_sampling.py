"""From logits to tokens, and which drafts may stay."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from .._types import checked


class Sampler(eqx.Module):
    """How a token is chosen from logits: the best one, or drawn after temperature, top-k and top-p.

    `temperature` is `None` for the best one.
    """

    temperature: Float32[Array, ""] | None
    top_k: int | None = eqx.field(static=True)
    top_p: float | None = eqx.field(static=True)

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        """**Arguments:**

        - `temperature`: divides the logits; 0 takes the best token.
        - `top_k`: only the k best tokens can be drawn; ties with the k-th can be, too.
        - `top_p`: only the fewest of the best tokens can be drawn that hold this much probability
            (arXiv 1904.09751, §3.1).

        **Raises:** `ValueError` for values that make no sense.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"`temperature` must be finite, zero or positive; got {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, or `None`; got {top_k}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], or be `None`; got {top_p}.")
        self.temperature = None if temperature == 0 else jnp.asarray(temperature, jnp.float32)
        self.top_k = top_k
        self.top_p = top_p

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature is None

    def probabilities(self, logits: Float[Array, "*batch vocab"]) -> Float32[Array, "*batch vocab"]:
        """The distribution that tokens are drawn from; all on the best one if greedy."""
        logits = logits.astype(jnp.float32)
        vocab = logits.shape[-1]
        if self.temperature is None:
            return jax.nn.one_hot(jnp.argmax(logits, axis=-1), vocab, dtype=jnp.float32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < vocab:
            kth = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            ordered = jnp.sort(jax.nn.softmax(logits, axis=-1), axis=-1, descending=True)
            # Probability before each token: the best one always stays.
            before = jnp.cumsum(ordered, axis=-1) - ordered
            smallest = jnp.min(
                jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True
            )
            logits = jnp.where(jax.nn.softmax(logits, axis=-1) < smallest, -jnp.inf, logits)
        return jax.nn.softmax(logits, axis=-1)

    def choose(
        self, logits: Float[Array, "*batch vocab"], key: PRNGKeyArray
    ) -> tuple[Int32[Array, "*batch"], Float32[Array, "*batch vocab"] | None]:
        """A token, and the distribution it was drawn from; `None` if greedy."""
        if self.is_greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
        probabilities = self.probabilities(logits)
        return self.draw(probabilities, key), probabilities

    def draw(
        self, probabilities: Float32[Array, "*batch vocab"], key: PRNGKeyArray
    ) -> Int32[Array, "*batch"]:
        """A token from a distribution."""
        if self.is_greedy:
            return jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, jnp.log(probabilities)).astype(jnp.int32)


class Verdict(NamedTuple):
    """What verification says of each row's drafts.

    `num_accepted` of them stay, and `next_ids` follows them.
    """

    num_accepted: Int32[Array, "batch"]
    next_ids: Int32[Array, "batch"]


@checked
def accept_drafts(
    draft_ids: Int32[Array, "batch drafts"],
    draft_probabilities: Float32[Array, "batch drafts vocab"],
    probabilities: Float32[Array, "batch new vocab"],
    sampler: Sampler,
    *,
    key: PRNGKeyArray,
) -> Verdict:
    """Speculative sampling: what comes out is distributed as if drawn from the model itself.

    Draft j, drawn from q_j, is accepted with probability min(1, p_j[draft] / q_j[draft]) if all
    before it were. After the last accepted one a token is drawn from the normalised residual
    max(p_j - q_j, 0), or from p after all drafts (arXiv 2211.17192, §2.3; arXiv 2302.01318). If a
    residual vanishes, p and q are equal, and it is drawn from p.

    **Arguments:**

    - `draft_ids`, `draft_probabilities`: the drafts, and the distributions q they were drawn from.
    - `probabilities`: p, the model's at the same places and after the last draft.
    - `sampler`: draws the token; if greedy, all distributions are on one token, and nothing is left
        to chance.
    - `key`: for the draws.
    """
    num_drafts = draft_ids.shape[1]
    accept_key, draw_key = jax.random.split(key)

    def of_drafts(p: Array) -> Array:
        return jnp.take_along_axis(p, draft_ids[..., None], axis=-1)[..., 0]

    p, q = of_drafts(probabilities[:, :num_drafts]), of_drafts(draft_probabilities)
    # u < p/q, with no division: q is above zero, as the draft was drawn from it.
    uniform = 0.0 if sampler.is_greedy else jax.random.uniform(accept_key, p.shape)
    accepted = uniform * q < p
    accepted = jnp.logical_and.accumulate(accepted, axis=1)
    num_accepted = jnp.sum(accepted, axis=1, dtype=jnp.int32)
    here = num_accepted[:, None, None]
    after_all = jnp.zeros_like(probabilities[:, :1])
    p_here = jnp.take_along_axis(probabilities, here, axis=1)[:, 0]
    q_here = jnp.take_along_axis(
        jnp.concatenate([draft_probabilities, after_all], axis=1), here, axis=1
    )[:, 0]
    if sampler.is_greedy:
        return Verdict(num_accepted, sampler.draw(p_here, draw_key))
    residual = jnp.maximum(p_here - q_here, 0)
    total = jnp.sum(residual, axis=-1, keepdims=True)
    residual = jnp.where(total > 0, residual, p_here)
    return Verdict(num_accepted, sampler.draw(residual, draw_key))


def accept_best(
    draft_ids: Int32[Array, "batch drafts"], best_ids: Int32[Array, "batch new"]
) -> Verdict:
    """`accept_drafts` if greedy: drafts stay up to the first that is not the model's best token."""
    matches = draft_ids == best_ids[:, : draft_ids.shape[1]]
    is_wrong = jnp.pad(~matches, ((0, 0), (0, 1)), constant_values=True)
    num_accepted = jnp.argmax(is_wrong, axis=1).astype(jnp.int32)
    return Verdict(num_accepted, jnp.take_along_axis(best_ids, num_accepted[:, None], axis=1)[:, 0])


def committed_mask(
    new_ids: Int32[Array, "batch new"],
    num_accepted: Int32[Array, "batch"],
    num_left: Int32[Array, "batch"],
    eos_id: Int32[Array, ""],
) -> tuple[Int32[Array, "batch"], Bool[Array, "batch"]]:
    """How many of the new tokens are committed, and whether the row ends with them.

    At most the accepted drafts and one more, at most `num_left`, and none after the first EOS.
    """
    num_new = jnp.minimum(num_accepted + 1, num_left)
    places = jnp.arange(new_ids.shape[1])
    is_eos = (new_ids == eos_id) & (places < num_new[:, None])
    ends = jnp.any(is_eos, axis=1)
    first_eos = jnp.argmax(is_eos, axis=1).astype(jnp.int32)
    num_new = jnp.where(ends, first_eos + 1, num_new)
    return num_new, ends | (num_new >= num_left)
