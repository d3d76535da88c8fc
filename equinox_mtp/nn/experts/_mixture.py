"""A mixture of experts: each token goes to a few of many feed-forward networks."""

from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..._checks import check_integer
from ..._platform import accumulation_dtype
from ..._types import checked
from .._feed_forward import SwiGLU
from .._init import fan_in_normal
from .._linear import Linear, cast_matrices, check_features
from .._parts import AbstractFeedForward
from ._grouped import grouped_product
from ._partitioning import ExpertSpecs
from ._router import Router, Routing
from ._statistics import RouterStatistics, router_statistics


class Experts(eqx.Module):
    """Networks `(silu(x·gate) * (x·up)) · down`, stacked over their number; see `SwiGLU`.

    >>> emtp.nn.Experts(8, 16, 32, key=jax.random.key(0)).gate.shape
    (8, 16, 32)
    """

    gate: Float[Array, "experts embed mlp"]
    up: Float[Array, "experts embed mlp"]
    down: Float[Array, "experts mlp embed"]

    def __init__(
        self,
        num_experts: int,
        embed_size: int,
        mlp_size: int,
        *,
        out_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `num_experts`: how many there are.
        - `embed_size`, `mlp_size`: outer and inner number of features of each.
        - `out_scale`: multiplies the initial `down`.
        - `key`: for the initial values.

        **Raises:** `ValueError` for a size below 1.
        """
        num_experts = check_integer("num_experts", num_experts, at_least=1)
        embed_size = check_integer("embed_size", embed_size, at_least=1)
        mlp_size = check_integer("mlp_size", mlp_size, at_least=1)
        gate_key, up_key, down_key = jax.random.split(key, 3)
        shape = (num_experts, embed_size, mlp_size)
        self.gate = fan_in_normal(gate_key, shape, embed_size)
        self.up = fan_in_normal(up_key, shape, embed_size)
        shape = (num_experts, mlp_size, embed_size)
        self.down = fan_in_normal(down_key, shape, mlp_size, out_scale)


class MixtureOfExperts(AbstractFeedForward):
    r"""A feed-forward network of which each token passes a few parts, chosen by a router.

    $y = \sum_{i \in \text{chosen}} w_i \, \text{expert}_i(x) + \text{shared}(x)$, where the shared
    expert, if there is one, may be weighed by $\text{sigmoid}(x \cdot g)$. See `Router` for the
    choice and the weights, DeepSeek-V3 (arXiv 2412.19437, §2.1.2), and Shazeer et al.
    (arXiv 1701.06538).

    No token is dropped, whatever the load of its experts. Each expert works on the rows that chose
    it, and no array is larger than `top_k` copies of all tokens.

    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> mixture = emtp.nn.MixtureOfExperts(
    ...     emtp.nn.Router(16, 8, top_k=2, key=keys[0]), emtp.nn.Experts(8, 16, 32, key=keys[1])
    ... )
    >>> y, statistics = eqx.filter_jit(mixture)(jnp.ones((2, 3, 16)))
    >>> print(y.shape, statistics.tokens, statistics.balance_loss.shape)
    (2, 3, 16) 6.0 ()

    On a mesh with an axis `expert` each device has its part of the experts (`sharding.use_rules`):
    it computes what they add to every token, and the sum over devices is the output. Tokens go to
    no other device, and weights of experts neither.
    """

    takes_token_mask: ClassVar[bool] = True

    router: Router
    experts: Experts
    shared_expert: SwiGLU | None
    shared_gate: Linear | None

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        shared_expert: SwiGLU | None = None,
        shared_gate: Linear | None = None,
    ):
        """**Arguments:**

        - `router`: chooses experts.
        - `experts`: as many as the router knows.
        - `shared_expert`: a network that every token passes.
        - `shared_gate`: a linear map to one number, whose sigmoid weighs the shared expert.

        **Raises:** `ValueError` for parts that do not fit together.
        """
        wanted, found = router.kernel.shape, (experts.gate.shape[1], experts.gate.shape[0])
        if wanted != found:
            raise ValueError(
                f"`experts` must be {wanted[1]} experts of {wanted[0]} features, as `router` has "
                f"them; got {found[1]} of {found[0]}."
            )
        if shared_gate is not None and shared_expert is None:
            raise ValueError("`shared_gate` is of a `shared_expert`; got none. Leave it out.")
        if shared_gate is not None and shared_gate.kernel.shape != (wanted[0], 1):
            raise ValueError(
                f"`shared_gate` must map {wanted[0]} features to 1; got a kernel of shape "
                f"{shared_gate.kernel.shape}."
            )
        if shared_expert is not None and shared_expert.gate.kernel.shape[0] != wanted[0]:
            raise ValueError(
                f"`shared_expert` must take {wanted[0]} features, as `router` does; got "
                f"{shared_expert.gate.kernel.shape[0]}."
            )
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.shared_gate = shared_gate

    @checked
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        *,
        token_mask: Bool[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], RouterStatistics]:
        """Transforms each position, and counts what the router did.

        **Arguments:**

        - `x`: in the compute dtype, which the result keeps.
        - `token_mask`: where there is a token; `None` for everywhere. Other positions are
            transformed as well, and left out of the statistics.

        **Returns:** `(y, statistics)`.

        **Raises:** `ValueError` if `x` has not as many features as the experts, or if the mesh
        cannot be shared.
        """
        num_experts, embed_size, mlp_size = self.experts.gate.shape
        check_features(x, embed_size, "the experts")
        experts = cast_matrices(self.experts, x.dtype)
        specs = ExpertSpecs.in_force(x, num_experts, mlp_size)
        if specs is None:
            y, routing = _routed(x, self.router, experts)
        else:
            routed = partial(_routed, experts_over=specs.experts, summed_over=specs.summed)
            y, routing = specs.shard_map(routed)(x, self.router, experts)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_gate is not None:
                shared = jax.nn.sigmoid(self.shared_gate(x)) * shared
            y = y + shared
        return y, router_statistics(routing, token_mask)

    def for_decoding(self, dtype: Any) -> "MixtureOfExperts":
        """With matrices of `dtype`, but for the router's; see `AbstractCachedDecoderLayer`."""
        cast = cast_matrices(self, dtype)
        return eqx.tree_at(lambda mixture: mixture.router, cast, self.router)


def _routed(
    x: Array,
    router: Router,
    experts: Experts,
    *,
    experts_over: tuple[str, ...] = (),
    summed_over: tuple[str, ...] = (),
) -> tuple[Array, Routing]:
    """What these experts add to each token. In a `shard_map` they are a part of all experts."""
    routing = router(x)
    first = lax.axis_index(experts_over) * len(experts.gate) if experts_over else 0
    y = _weighed_outputs(x, routing, experts, first, router.num_experts)
    return (lax.psum(y, summed_over) if summed_over else y), routing


def _weighed_outputs(
    x: Array, routing: Routing, experts: Experts, first: Any, num_experts: int
) -> Array:
    """The weighed sum of each token's experts, as far as they are `first`, `first + 1`, …"""
    top_k = routing.expert_ids.shape[-1]
    chosen = routing.expert_ids.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    loads = jnp.zeros(num_experts, jnp.int32).at[chosen].add(1)
    of_these = jnp.arange(num_experts) - first
    group_sizes = lax.dynamic_slice_in_dim(loads, first, len(experts.gate))
    first_row = jnp.sum(jnp.where(of_these < 0, loads, 0))
    product = partial(grouped_product, group_sizes=group_sizes, first_row=first_row)

    copies = _copies(x.reshape(-1, x.shape[-1]), order, inverse, top_k)
    hidden = jax.nn.silu(product(copies, experts.gate)) * product(copies, experts.up)
    outputs = _permuted(product(hidden, experts.down), inverse, order)
    outputs = outputs.reshape(*routing.weights.shape, x.shape[-1])
    dtype = accumulation_dtype(x)
    weighed = outputs.astype(dtype) * routing.weights[..., None].astype(dtype)
    return jnp.sum(weighed, axis=-2).astype(x.dtype)


# Gradients of these two are written out: of a gather XLA makes a scatter, row by row.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _copies(x: Array, order: Array, inverse: Array, top_k: int) -> Array:
    """`top_k` copies of each row, in the order of their experts."""
    return x[order // top_k]


def _copies_forward(
    x: Array, order: Array, inverse: Array, top_k: int
) -> tuple[Array, tuple[Array, ...]]:
    return _copies(x, order, inverse, top_k), (inverse,)


def _copies_backward(top_k: int, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
    (inverse,) = residuals
    of_tokens = cotangent[inverse].reshape(-1, top_k, cotangent.shape[-1])
    total = jnp.sum(of_tokens, axis=1, dtype=accumulation_dtype(cotangent))
    return total.astype(cotangent.dtype), None, None


_copies.defvjp(_copies_forward, _copies_backward)


@jax.custom_vjp
def _permuted(x: Array, order: Array, inverse: Array) -> Array:
    return x[order]


def _permuted_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, ...]]:
    return x[order], (inverse,)


def _permuted_backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
    return cotangent[residuals[0]], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
