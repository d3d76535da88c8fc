"""What decoding keeps between steps, and what it gives in the end."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from .._decoder import Cache


class DecodingState(eqx.Module):
    """Everything that a step changes; preallocated, of a static size.

    With n the position of a row's last committed token, the main model has run on the tokens before
    it, and their keys and values are in `main_cache`.

    >>> state.lengths.tolist(), state.done.tolist(), state.num_accepted.shape
    ([3, 3], [False, False], (2, 2))

    **Fields:**

    - `tokens`: prompt and committed tokens; anything after `lengths`. A row whose logits were not
        finite ends with -1.
    - `lengths`: how many there are.
    - `end_lengths`: how many there may be.
    - `done`: rows that have ended.
    - `eos_id`: the token that ends a row, or several; -1 if there is none.
    - `main_cache`, `draft_caches`: of the decoder's layers, and of each draft's.
    - `hidden_states`: the main model's, before its final norm, at the last positions before n,
        where a rejected draft may have stood.
    - `key`: for the next step.
    - `num_steps`: passes of the main model after the prompt's, while the row was not done.
    - `num_accepted`: in how many of them the first, the second, … draft was committed.
    """

    tokens: Int32[Array, "batch max_length"]
    lengths: Int32[Array, "batch"]
    end_lengths: Int32[Array, "batch"]
    done: Bool[Array, "batch"]
    eos_id: Int32[Array, ""] | Int32[Array, "ends"]
    main_cache: Cache
    draft_caches: tuple[Cache, ...]
    hidden_states: Float[Array, "batch window embed"]
    key: PRNGKeyArray
    num_steps: Int32[Array, "batch"]
    num_accepted: Int32[Array, "batch drafts"]


class Drafts(eqx.Module):
    """Tokens proposed to follow each row, and the distributions they were drawn from, if any.

    A depth whose logits are not finite proposes -1, which is never accepted.

    >>> drafts.ids.shape, drafts.probabilities  # greedy drafts need no distribution
    ((2, 2), None)
    """

    ids: Int32[Array, "batch drafts"]
    probabilities: Float32[Array, "batch drafts vocab"] | None


class Verification(eqx.Module):
    """What a pass of the main model over the drafts has found.

    `num_accepted` drafts stay and `next_ids` follows them (-1: the logits were not finite), unless
    the row ends before; `hidden_states` are the main model's at
    the last committed token and the drafts.

    >>> verification.num_accepted.shape, verification.hidden_states.shape
    ((2,), (2, 3, 16))
    """

    num_accepted: Int32[Array, "batch"]
    next_ids: Int32[Array, "batch"]
    hidden_states: Float[Array, "batch new embed"]


class Generation(eqx.Module):
    """Generated rows, and how they came about.

    >>> generation = emtp.speculative.generate(model, [[5, 6], [9, 3]], max_new_tokens=4)
    >>> generation.lengths.tolist(), bool(generation.tokens_per_pass >= 1)
    ([6, 6], True)

    **Fields:**

    - `tokens`: prompt and generated tokens, and 0 after them. A row whose logits were not finite
        ends with -1; only inside `jit`, as `generate` raises an error for it elsewhere.
    - `lengths`: how many tokens a row has.
    - `prompt_lengths`: how many of them are the prompt's.
    - `num_steps`: passes of the main model after the prompt's.
    - `num_drafted`, `num_accepted`: how often the first, the second, … draft was made, and how
        often it was committed; not so those after an EOS or beyond `max_new_tokens`.
    """

    tokens: Int32[Array, "batch max_length"]
    lengths: Int32[Array, "batch"]
    prompt_lengths: Int32[Array, "batch"]
    num_steps: Int32[Array, "batch"]
    num_drafted: Int32[Array, "batch drafts"]
    num_accepted: Int32[Array, "batch drafts"]

    @property
    def num_generated(self) -> Int32[Array, "batch"]:
        """The number of new tokens in each row."""
        return self.lengths - self.prompt_lengths

    @property
    def accepted_per_position(self) -> Float32[Array, "drafts"]:
        """The share of steps that committed the first k drafts, over all rows; 0 if there were no
        steps.
        """
        drafted = jnp.sum(self.num_drafted, axis=0).astype(jnp.float32)
        return jnp.sum(self.num_accepted, axis=0) / jnp.maximum(drafted, 1)

    @property
    def tokens_per_pass(self) -> Float32[Array, ""]:
        """τ: tokens committed by a pass of the main model after the prompt's, over all rows; 1 if
        there were no such passes.

        1 + Σ_k `accepted_per_position`, less the rows that ended with a draft, for each pass.
        """
        num_steps = jnp.sum(self.num_steps).astype(jnp.float32)
        num_new = jnp.sum(self.num_generated - 1)
        return jnp.where(num_steps > 0, num_new / jnp.maximum(num_steps, 1), 1.0)
