"""From logits to tokens, and which drafts may stay."""

from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from .._checks import check_ids, check_integer, check_number
from .._types import at_hand, checked

Number: TypeAlias = float | int | np.floating | np.integer
"""A number of Python or NumPy; `Sampler` takes no traced ones."""


class Sampler(eqx.Module):
    """How a token is chosen from logits: the best one, or drawn after temperature, top-k and top-p.

    `temperature` is `None` for the best one.

    >>> sampler = emtp.speculative.Sampler(temperature=1.0, top_k=2)
    >>> probabilities = sampler.probabilities(jnp.log(jnp.asarray([0.5, 0.3, 0.2])))
    >>> print(np.asarray(probabilities).round(3))
    [0.625 0.375 0.   ]
    """

    temperature: Float32[Array, ""] | None
    top_k: int | None = eqx.field(static=True)
    top_p: float | None = eqx.field(static=True)

    def __init__(
        self,
        temperature: Number = 0.0,
        top_k: int | np.integer | None = None,
        top_p: Number | None = None,
    ):
        """**Arguments:**

        - `temperature`: divides the logits; 0 takes the best token, and so does what float32 has
            no normal number for (below 1.2e-38).
        - `top_k`: only the k best tokens can be drawn.
        - `top_p`: only the fewest of the best tokens can be drawn that hold this much probability
            (arXiv 1904.09751, §3.1); at least one.

        Of equally good tokens the first ids count as better.

        **Raises:** `ValueError` for values that make no sense.
        """
        temperature = check_number("temperature", temperature, at_least=0)
        # Beyond these limits float32 flushes the number, or one over it, to 0, and makes NaN.
        is_greedy = temperature < float(jnp.finfo(jnp.float32).tiny)
        self.temperature = None if is_greedy else jnp.asarray(min(temperature, 1e37), jnp.float32)
        self.top_k = None if top_k is None else check_integer("top_k", top_k, at_least=1)
        self.top_p = None if top_p is None else check_number("top_p", top_p, above=0, at_most=1)

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature is None

    def probabilities(self, logits: Float[Array, "*batch vocab"]) -> Float32[Array, "*batch vocab"]:
        """The distribution that tokens are drawn from; all on the best one if greedy.

        It is 0 everywhere if the highest logit is not finite: there is no best token then.
        """
        logits = logits.astype(jnp.float32)
        vocab = logits.shape[-1]
        if self.temperature is None:
            return jax.nn.one_hot(_best_ids(logits), vocab, dtype=jnp.float32)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        is_defined = jnp.isfinite(highest)
        # The best logit is 0 whatever the temperature; so nothing overflows but to -∞.
        scaled = (logits - highest) / self.temperature
        probabilities = self._keep(jnp.where(is_defined, scaled, 0))
        return jnp.where(is_defined, probabilities, 0)

    def _keep(self, logits: Float32[Array, "*batch vocab"]) -> Float32[Array, "*batch vocab"]:
        """Probabilities, of what top-k and top-p leave."""
        vocab = logits.shape[-1]
        top_k = vocab if self.top_k is None else min(self.top_k, vocab)
        top_p = 1.0 if self.top_p is None else self.top_p
        if top_k == vocab and top_p == 1:
            return jax.nn.softmax(logits, axis=-1)
        best, ids = jax.lax.top_k(logits, top_k)  # of equal logits the first ids
        kept = jax.nn.softmax(best, axis=-1)
        if top_p < 1:
            through = jnp.cumsum(kept, axis=-1)
            # Those whose forerunners do not hold it yet; the first one always.
            count = 1 + jnp.sum(through[..., :-1] < top_p, axis=-1, keepdims=True)
            is_kept = jnp.arange(top_k) < count
            kept = jax.nn.softmax(jnp.where(is_kept, best, -jnp.inf), axis=-1)
        return jnp.put_along_axis(jnp.zeros_like(logits), ids, kept, axis=-1, inplace=False)

    def choose(
        self, logits: Float[Array, "*batch vocab"], key: PRNGKeyArray
    ) -> tuple[Int32[Array, "*batch"], Float32[Array, "*batch vocab"] | None]:
        """A token, and the distribution it was drawn from; `None` if greedy.

        The token is -1 if the highest logit is not finite.
        """
        if self.is_greedy:
            return _best_ids(logits), None
        probabilities = self.probabilities(logits)
        return self.draw(probabilities, key), probabilities

    def draw(
        self, probabilities: Float32[Array, "*batch vocab"], key: PRNGKeyArray
    ) -> Int32[Array, "*batch"]:
        """A token from a distribution; -1 if it is 0 everywhere, or holds NaN."""
        if self.is_greedy:
            ids = jnp.argmax(probabilities, axis=-1)
        else:
            ids = jax.random.categorical(key, jnp.log(probabilities))
        is_defined = jnp.max(probabilities, axis=-1) > 0
        return jnp.where(is_defined, ids, -1).astype(jnp.int32)


GREEDY = Sampler()
"""Takes the best token."""


def _best_ids(logits: Float[Array, "*batch vocab"]) -> Int32[Array, "*batch"]:
    """The first of the best tokens; -1 if the highest logit is not finite."""
    best = jnp.argmax(logits, axis=-1, keepdims=True)  # the first NaN, if there is one
    is_defined = jnp.isfinite(jnp.take_along_axis(logits, best, axis=-1))
    return jnp.where(is_defined, best, -1)[..., 0].astype(jnp.int32)


class Verdict(NamedTuple):
    """What verification says of each row's drafts.

    `num_accepted` of them stay, and `next_ids` follows them.

    >>> num_accepted, next_ids = jnp.asarray([2]), jnp.asarray([7])
    >>> verdict = emtp.speculative.Verdict(num_accepted, next_ids)
    >>> print(verdict.num_accepted + 1)  # the new tokens of the row
    [3]
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

    >>> draft_ids = jnp.asarray([[4, 5]], jnp.int32)
    >>> q, p = jax.nn.one_hot(draft_ids, 8), jax.nn.one_hot(jnp.asarray([[4, 6, 7]]), 8)
    >>> key = jax.random.key(0)
    >>> verdict = emtp.speculative.accept_drafts(draft_ids, q, p, sampler, key=key)
    >>> print(verdict.num_accepted, verdict.next_ids)  # 4 stays; the model has 6 after it
    [1] [6]

    **Arguments:**

    - `draft_ids`, `draft_probabilities`: the drafts, and the distributions q they were drawn from.
    - `probabilities`: p, the model's at the same positions and after the last draft.
    - `sampler`: draws the token; if greedy, all distributions are on one token, and nothing is left
        to chance.
    - `key`: for the draws.

    `next_ids` is -1 where p is 0 everywhere or holds NaN.

    **Raises:** `ValueError` if `probabilities` does not hold one position more than there are
    drafts, or for drafts outside the vocabulary. Inside `jit` such drafts are never accepted.
    """
    num_drafts, vocab_size = draft_ids.shape[1], probabilities.shape[2]
    if probabilities.shape[1] != num_drafts + 1:
        raise ValueError(
            f"`probabilities` must hold {num_drafts + 1} positions a row, one for each of the "
            f"{num_drafts} draft(s) and one after them; got {probabilities.shape[1]}."
        )
    check_ids("draft_ids", at_hand(draft_ids), vocab_size)
    return accept_drawn(draft_ids, draft_probabilities, probabilities, sampler, key)


def accept_drawn(
    draft_ids: Int32[Array, "batch drafts"],
    draft_probabilities: Float32[Array, "batch drafts vocab"],
    probabilities: Float32[Array, "batch new vocab"],
    sampler: Sampler,
    key: PRNGKeyArray,
) -> Verdict:
    """`accept_drafts`, of drafts that may be -1: these are never accepted."""
    num_drafts, vocab_size = draft_ids.shape[1], probabilities.shape[2]
    accept_key, draw_key = jax.random.split(key)

    def of_drafts(p: Array) -> Array:
        return jnp.take_along_axis(p, draft_ids[..., None], axis=-1)[..., 0]

    p, q = of_drafts(probabilities[:, :num_drafts]), of_drafts(draft_probabilities)
    # u < p/q, with no division: q is above zero, as the draft was drawn from it.
    uniform = 0.0 if sampler.is_greedy else jax.random.uniform(accept_key, p.shape)
    accepted = (uniform * q < p) & (draft_ids >= 0) & (draft_ids < vocab_size)
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
    matches = (draft_ids == best_ids[:, : draft_ids.shape[1]]) & (draft_ids >= 0)
    is_wrong = jnp.pad(~matches, ((0, 0), (0, 1)), constant_values=True)
    num_accepted = jnp.argmax(is_wrong, axis=1).astype(jnp.int32)
    return Verdict(num_accepted, jnp.take_along_axis(best_ids, num_accepted[:, None], axis=1)[:, 0])


def committed_mask(
    new_ids: Int32[Array, "batch new"],
    num_accepted: Int32[Array, "batch"],
    num_left: Int32[Array, "batch"],
    eos_id: Int32[Array, ""] | Int32[Array, "ends"],
) -> tuple[Int32[Array, "batch"], Bool[Array, "batch"]]:
    """How many of the new tokens are committed, and whether the row ends with them.

    At most the accepted drafts and one more, at most `num_left`, and none after the first EOS or
    -1, the token of logits that are not finite.
    """
    num_new = jnp.minimum(num_accepted + 1, num_left)
    positions = jnp.arange(new_ids.shape[1])
    is_eos = jnp.any(new_ids[..., None] == jnp.atleast_1d(eos_id), axis=-1) | (new_ids < 0)
    is_eos &= positions < num_new[:, None]
    ends = jnp.any(is_eos, axis=1)
    first_eos = jnp.argmax(is_eos, axis=1).astype(jnp.int32)
    num_new = jnp.where(ends, first_eos + 1, num_new)
    return num_new, ends | (num_new >= num_left)
