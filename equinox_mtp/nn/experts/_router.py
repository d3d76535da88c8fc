"""Which experts each token goes to, and with which weights."""

from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from ..._checks import check_choice, check_flag, check_integer, check_number
from ..._types import checked
from .._init import fan_in_normal
from .._linear import check_features

RouterScores: TypeAlias = Literal["softmax", "sigmoid"]
"""How a router's logits become scores: over all experts together, or each by itself."""


class Routing(eqx.Module):
    """What a router decides for each token.

    >>> router = emtp.nn.Router(16, 8, top_k=2, key=jax.random.key(0))
    >>> routing = router(jnp.ones((2, 3, 16)))
    >>> routing.expert_ids.shape, routing.scores.shape
    ((2, 3, 2), (2, 3, 8))

    **Fields:**

    - `expert_ids`: the experts that a token goes to.
    - `weights`: by which their outputs are multiplied.
    - `best_ids`: the experts of the largest scores, without bias and groups.
    - `scores`: of all experts.
    - `log_sum_exp`: of the logits.
    """

    expert_ids: Int32[Array, "*batch top_k"]
    weights: Float32[Array, "*batch top_k"]
    best_ids: Int32[Array, "*batch top_k"]
    scores: Float32[Array, "*batch experts"]
    log_sum_exp: Float32[Array, "*batch"]


class Router(eqx.Module):
    r"""The router of a mixture of experts: the `top_k` experts of each token, and their weights.

    With scores $s = \text{softmax}(x W)$, or $\text{sigmoid}(x W)$, a token goes to the experts of
    the `top_k` largest $s_i + b_i$. Their weights are $s_i$, divided by their sum if `normalize`
    says so, times `scaling_factor`. So the bias $b$ chooses experts, and does not weigh them; see
    `update_router_bias`.

    With groups, experts are chosen from `top_groups` of `num_groups` groups of neighbours: those in
    which the two largest $s_i + b_i$ have the largest sum.

    See DeepSeek-V3 (arXiv 2412.19437, §2.1.2). All of it is computed in float32.

    >>> router = emtp.nn.Router(16, 8, top_k=2, scores="sigmoid", bias=True, key=jax.random.key(0))
    >>> router(jnp.ones((1, 3, 16))).weights.shape
    (1, 3, 2)
    """

    kernel: Float[Array, "embed experts"]
    bias: Float[Array, "experts"] | None
    top_k: int = eqx.field(static=True)
    scores: RouterScores = eqx.field(static=True)
    num_groups: int = eqx.field(static=True)
    top_groups: int = eqx.field(static=True)
    normalize: bool = eqx.field(static=True)
    scaling_factor: float = eqx.field(static=True)

    def __init__(
        self,
        embed_size: int,
        num_experts: int,
        *,
        top_k: int,
        scores: RouterScores = "softmax",
        bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = True,
        scaling_factor: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `embed_size`, `num_experts`: features of a token, and how many experts there are.
        - `top_k`: experts of each token.
        - `scores`: `"softmax"` or `"sigmoid"`.
        - `bias`: whether a bias, 0 at first, corrects the choice. It gets no gradient.
        - `num_groups`, `top_groups`: groups of experts, and how many of them a token may go to.
        - `normalize`: whether the weights of a token are divided by their sum.
        - `scaling_factor`: multiplies all weights.
        - `key`: for the initial values.

        **Raises:** `ValueError` for numbers that do not fit together.
        """
        embed_size = check_integer("embed_size", embed_size, at_least=1)
        num_experts = check_integer("num_experts", num_experts, at_least=1)
        self.top_k = check_integer("top_k", top_k, at_least=1)
        check_choice("scores", scores, ("softmax", "sigmoid"))
        self.scores = scores
        self.num_groups = check_integer("num_groups", num_groups, at_least=1)
        self.top_groups = check_integer("top_groups", top_groups, at_least=1)
        self.normalize = check_flag("normalize", normalize)
        self.scaling_factor = check_number("scaling_factor", scaling_factor, above=0)
        has_bias = check_flag("bias", bias)
        self._check_sizes(num_experts)
        self.kernel = fan_in_normal(key, (embed_size, num_experts), embed_size)
        self.bias = jnp.zeros(num_experts, jnp.float32) if has_bias else None

    def _check_sizes(self, num_experts: int) -> None:
        if self.top_k > num_experts:
            raise ValueError(
                f"`top_k` must be at most `num_experts`; got {self.top_k} and {num_experts}."
            )
        if num_experts % self.num_groups:
            raise ValueError(
                f"`num_groups` must divide `num_experts`; got {self.num_groups} and {num_experts}."
            )
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"`top_groups` must be at most `num_groups`; got {self.top_groups} and "
                f"{self.num_groups}."
            )
        in_groups = self.top_groups * (num_experts // self.num_groups)
        if self.top_k > in_groups:
            raise ValueError(
                f"`top_k` must be at most the {in_groups} experts of `top_groups` groups; got "
                f"{self.top_k}."
            )

    @property
    def num_experts(self) -> int:
        """The size of the last axis of `kernel`."""
        return self.kernel.shape[-1]

    @checked
    def __call__(self, x: Float[Array, "*batch embed"]) -> Routing:
        """Chooses experts for each token.

        **Raises:** `ValueError` if `x` has not as many features as the router.
        """
        check_features(x, self.kernel.shape[0], "the router")
        logits = x.astype(jnp.float32) @ self.kernel.astype(jnp.float32)
        log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
        if self.scores == "softmax":
            scores = jnp.exp(logits - log_sum_exp[..., None])
        else:
            scores = jax.nn.sigmoid(logits)
        fixed = lax.stop_gradient(scores)
        _, best_ids = lax.top_k(fixed, self.top_k)
        _, expert_ids = lax.top_k(self._chosen_by(fixed), self.top_k)
        weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
        if self.normalize:
            total = jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights / jnp.where(total > 0, total, 1.0)  # sigmoids may all be 0
        return Routing(expert_ids, self.scaling_factor * weights, best_ids, scores, log_sum_exp)

    def _chosen_by(self, scores: Array) -> Array:
        """What is largest for the experts that a token goes to."""
        if self.bias is not None:
            scores = scores + lax.stop_gradient(self.bias).astype(jnp.float32)
        if self.top_groups == self.num_groups:
            return scores
        size = scores.shape[-1] // self.num_groups
        groups = scores.reshape(*scores.shape[:-1], self.num_groups, size)
        best = lax.top_k(groups, min(2, size))[0]
        _, group_ids = lax.top_k(jnp.sum(best, axis=-1), self.top_groups)
        is_kept = jnp.any(group_ids[..., None] == jnp.arange(self.num_groups), axis=-2)
        return jnp.where(is_kept[..., None], groups, -jnp.inf).reshape(scores.shape)
