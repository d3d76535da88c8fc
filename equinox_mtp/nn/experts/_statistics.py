"""What a router has done to a batch, as sums over tokens; and what keeps its experts balanced."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ..._types import Scalar, checked
from ._router import Routing


class RouterStatistics(eqx.Module):
    r"""Sums over the tokens that a router has seen; `a + b` of two of them is that of both.

    With $f_i$ the share of expert i in the tokens' choices and $p_i$ the mean over tokens of its
    score (as a share of all experts' scores), a perfectly balanced router of E experts has
    $E \sum_i f_i p_i = 1$: `balance_loss` of Switch Transformers (arXiv 2101.03961, §2.2) over all
    tokens, and `sequence_balance_loss` of DeepSeek-V3 (arXiv 2412.19437, §2.1.2) for each row by
    itself. `z_loss` is the mean of $(\log \sum_i e^{l_i})^2$ of the logits (ST-MoE,
    arXiv 2202.08906, §2.2). Add them, weighted, to what is minimised. Padding does not count.

    >>> router = emtp.nn.Router(16, 8, top_k=2, key=jax.random.key(0))
    >>> statistics = emtp.nn.router_statistics(router(jnp.zeros((2, 3, 16))))
    >>> print(statistics.tokens, statistics.load, statistics.sequence_balance_loss)
    6.0 [6. 6. 0. 0. 0. 0. 0. 0.] 1.0

    The sums are over rows, so they add up over microbatches and devices, and may have leading axes:
    of layers, or of depths. `balance_loss` of a sum is that of all its tokens.

    **Fields:**

    - `load`: how many tokens went to each expert.
    - `scores`: the sum of each expert's share of a token's scores.
    - `tokens`, `rows`: how many there are; rows without a token do not count.
    - `z_losses`: the sum over tokens.
    - `sequence_balance_losses`: the sum over rows.
    """

    load: Float32[Array, "*layers experts"]
    scores: Float32[Array, "*layers experts"]
    tokens: Float32[Array, "*layers"]
    rows: Float32[Array, "*layers"]
    z_losses: Float32[Array, "*layers"]
    sequence_balance_losses: Float32[Array, "*layers"]

    def __add__(self, other: "RouterStatistics") -> "RouterStatistics":
        """Of both."""
        fields = self.__dataclass_fields__
        return RouterStatistics(*(getattr(self, x) + getattr(other, x) for x in fields))

    @property
    def balance_loss(self) -> Float32[Array, "*layers"]:
        """Of Switch Transformers; 1 if all experts have the same load, 0 without tokens."""
        return _balance(self.load, self.scores)

    @property
    def sequence_balance_loss(self) -> Float32[Array, "*layers"]:
        """The mean over rows of DeepSeek-V3's; 0 without rows."""
        return self.sequence_balance_losses / jnp.maximum(self.rows, 1.0)

    @property
    def z_loss(self) -> Float32[Array, "*layers"]:
        """The mean over tokens; 0 without tokens."""
        return self.z_losses / jnp.maximum(self.tokens, 1.0)


@checked
def router_statistics(
    routing: Routing, token_mask: Bool[Array, "batch seq"] | None = None
) -> RouterStatistics:
    """The sums over a batch of what a router decided for it.

    >>> router = emtp.nn.Router(16, 8, top_k=2, key=jax.random.key(0))
    >>> routing = router(jnp.ones((2, 3, 16)))
    >>> print(emtp.nn.router_statistics(routing, jnp.asarray([[1, 1, 0], [0, 0, 0]], bool)).tokens)
    2.0

    **Arguments:**

    - `routing`: of `Router`, for hidden states `[batch seq embed]`.
    - `token_mask`: which positions carry a token; `None` for all.
    """
    scores = routing.scores
    mask = jnp.ones(scores.shape[:2], bool) if token_mask is None else token_mask
    counts = mask.astype(jnp.float32)[..., None]
    num_experts = scores.shape[-1]
    shares = counts * scores / _or_one(jnp.sum(scores, axis=-1, keepdims=True))
    # Equation 18 of DeepSeek-V3: what the scores choose, without the bias.
    of_rows = _balance(
        jnp.sum(counts * _number_of_choices(routing.best_ids, num_experts), axis=1),
        jnp.sum(shares, axis=1),
    )
    return RouterStatistics(
        load=jnp.sum(counts * _number_of_choices(routing.expert_ids, num_experts), axis=(0, 1)),
        scores=jnp.sum(shares, axis=(0, 1)),
        tokens=jnp.sum(counts),
        rows=jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32),
        z_losses=jnp.sum(counts[..., 0] * jnp.square(routing.log_sum_exp)),
        sequence_balance_losses=jnp.sum(of_rows),
    )


@checked
def update_router_bias(
    bias: Float[Array, "*layers experts"], load: Float[Array, "*layers experts"], rate: Scalar
) -> Float[Array, "*layers experts"]:
    r"""A router's bias after a step: up for experts of less than the mean load, down for others.

    $b_i + r \cdot \text{sign}(\text{mean}(load) - load_i)$. It balances experts without a loss that
    pulls on the model (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, §2.1.2). No
    optimizer should touch the bias: its gradient is 0, and `weight_decay_mask` leaves it out.

    >>> bias = emtp.nn.update_router_bias(jnp.zeros(3), jnp.asarray([1.0, 3.0, 2.0]), 0.001)
    >>> print(bias)
    [ 0.001 -0.001  0.   ]

    **Arguments:**

    - `bias`: of one router, or of routers stacked over leading axes.
    - `load`: tokens of each expert, of all devices and microbatches of the step:
        `RouterStatistics.load`.
    - `rate`: how far a step goes; DeepSeek-V3 took 0.001, and 0 towards the end.
    """
    mean = jnp.mean(load, axis=-1, keepdims=True)
    return bias + (rate * jnp.sign(mean - load)).astype(bias.dtype)


def _number_of_choices(expert_ids: Array, num_experts: int) -> Array:
    """How often each token chose each expert, 0 or 1: a choice at a time, so no array is larger."""
    experts = jnp.arange(num_experts)
    chosen = [expert_ids[..., k, None] == experts for k in range(expert_ids.shape[-1])]
    return sum((x.astype(jnp.float32) for x in chosen[1:]), chosen[0].astype(jnp.float32))


def _balance(load: Array, scores: Array) -> Array:
    """The number of experts times the sum of the products of both, each as shares of its sum."""
    sums = jnp.sum(load, axis=-1) * jnp.sum(scores, axis=-1)
    return load.shape[-1] * jnp.sum(load * scores, axis=-1) / _or_one(sums)


def _or_one(divisor: Array) -> Array:
    """1 in place of 0, so that gradients are 0 there, too."""
    return jnp.where(divisor > 0, divisor, 1.0)
