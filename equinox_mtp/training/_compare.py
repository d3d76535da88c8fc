"""Times decoding with drafts against plain decoding."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import equinox_mtp as emtp
from equinox_mtp.speculative import DecodingModel, Generation, generate

from ._corpus import Corpus


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Greedy continuations of the same prompts, with and without drafts.

    >>> comparison = training.Comparison(1, 100, 2.0, 1.0, 1.0, 1.8, (0.8,))
    >>> comparison.speedup
    2.0

    **Fields:**

    - `num_drafts`: drafts per step.
    - `num_tokens`: new tokens of all prompts.
    - `plain_seconds`, `seconds`: without and with drafts; medians of several rounds.
    - `same_tokens`: the share of prompts whose two continuations are the same. Below 1 only if
        rounding has decided between two tokens that are equally good to it, as happens in bfloat16.
    - `tokens_per_pass`, `accepted_per_position`: see `Generation`.
    """

    num_drafts: int
    num_tokens: int
    plain_seconds: float
    seconds: float
    same_tokens: float
    tokens_per_pass: float
    accepted_per_position: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """The speed with drafts over the speed without."""
        return self.plain_seconds / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.num_tokens / self.plain_seconds:,.0f} tokens/s plain, "
            f"{self.num_tokens / self.seconds:,.0f} with {self.num_drafts} draft(s) per step: "
            f"{self.speedup:.2f} times as fast, {self.same_tokens:.0%} of the continuations equal\n"
            f"  {describe_acceptance(self.tokens_per_pass, self.accepted_per_position)}"
        )


def compare(
    model: emtp.MTPModel,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    num_drafts: int | None = None,
    draft_vocab: np.ndarray | None = None,
    eos_id: int | Sequence[int] | None = None,
    rounds: int = 3,
) -> Comparison:
    """Continues prompts one by one, greedily, with and without drafts in turn.

    All in this process and after a warm-up, so that no compilation is counted; the model is laid
    out once, beforehand.

    >>> prompts = [np.arange(4), np.arange(4, 8)]
    >>> comparison = training.compare(model, prompts, max_new_tokens=4, rounds=1)
    >>> comparison.num_tokens, comparison.same_tokens
    (8, 1.0)

    **Arguments:**

    - `prompts`: token ids, all of the same length.
    - `max_new_tokens`, `num_drafts`, `draft_vocab`, `eos_id`: see `generate`.
    - `rounds`: how many times each variant is timed.
    """
    drafts = model.block.config.num_depths if num_drafts is None else num_drafts

    @eqx.filter_jit
    def lay_out(model: emtp.MTPModel) -> DecodingModel:
        return DecodingModel.of(model, draft_vocab)

    laid_out = lay_out(model)

    def run(drafts: int) -> list[Generation]:
        generations = [
            generate(
                laid_out,
                prompt[None],
                max_new_tokens=max_new_tokens,
                num_drafts=drafts,
                eos_id=eos_id,
            )
            for prompt in prompts
        ]
        return jax.block_until_ready(generations)

    plain, drafted = run(0), run(drafts)
    seconds: dict[int, list[float]] = {0: [], drafts: []}
    for _ in range(rounds):
        for variant, times in seconds.items():
            started = time.perf_counter()
            run(variant)
            times.append(time.perf_counter() - started)
    same = [np.array_equal(x.tokens, y.tokens) for x, y in zip(plain, drafted, strict=True)]
    total = jax.tree.map(lambda *x: jnp.concatenate(x), *drafted)
    return Comparison(
        num_drafts=drafts,
        num_tokens=int(total.num_generated.sum()),
        plain_seconds=statistics.median(seconds[0]),
        seconds=statistics.median(seconds[drafts]),
        same_tokens=float(np.mean(same)),
        tokens_per_pass=float(total.tokens_per_pass),
        accepted_per_position=tuple(total.accepted_per_position.tolist()),
    )


def describe_acceptance(tokens_per_pass: float, accepted: Sequence[float]) -> str:
    """Tokens a pass and acceptance, in words."""
    rates = ", ".join(
        f"first {'draft' if k == 1 else k} {rate:.0%}" for k, rate in enumerate(accepted, start=1)
    )
    accepted_words = f"; accepted: {rates}" if rates else ""
    return f"{tokens_per_pass:.2f} tokens per forward pass{accepted_words}"


def held_out_prompts(corpus: Corpus, *, num_prompts: int, length: int) -> list[np.ndarray]:
    """The beginnings of at most `num_prompts` documents that are longer than `length`.

    >>> training.held_out_prompts(corpus, num_prompts=8, length=6)
    [array([0, 1, 2, 3, 4, 5], dtype=int32)]
    """
    long_enough = np.flatnonzero(corpus.lengths > length)[:num_prompts]
    return [corpus.read(np.full(length, index), np.arange(length)) for index in long_enough]
