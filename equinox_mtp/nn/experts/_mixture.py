"""A mixture of experts: each token goes to a few of many feed-forward networks."""

from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..._checks import check_integer
from ..._parameters import matrix_flops
from ..._platform import accumulation_dtype
from ..._types import checked
from .._feed_forward import SwiGLU
from .._init import fan_in_normal
from .._kernels import cast_matrices, outputs_first
from .._linear import Linear, check_features
from .._parts import AbstractFeedForward
from ._grouped import Groups, Matrices, grouped_swiglu
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

    def flops_per_token(self, seq_len: int) -> float:
        """The router, and the experts that a token passes; see `AbstractDecoderLayer`."""
        of_all = matrix_flops(self.experts)
        chosen = self.router.top_k * of_all / self.router.num_experts
        others = (self.router, self.shared_expert, self.shared_gate)
        return chosen + matrix_flops(others)

    def for_decoding(self, dtype: Any) -> "MixtureOfExperts":
        """With matrices of `dtype`, but for the router's; see `AbstractCachedDecoderLayer`."""
        cast = outputs_first(cast_matrices(self, dtype))
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
    if summed_over:
        # Here, so that tokens' gradients are summed over devices, and not those of their copies.
        x = lax.pcast(x, summed_over, to="varying")
    y = _weighed_outputs(x, routing, experts, first, router.num_experts)
    return (lax.psum(y, summed_over) if summed_over else y), routing


def _weighed_outputs(
    x: Array, routing: Routing, experts: Experts, first: Any, num_experts: int
) -> Array:
    """The weighed sum of each token's experts, as far as they are `first`, `first + 1`, …"""
    chosen = routing.expert_ids.reshape(-1)
    order = _stable_order(chosen, num_experts)
    numbers = jnp.arange(len(order), dtype=order.dtype)
    places = jnp.zeros_like(order).at[order].set(numbers).reshape(-1, routing.weights.shape[-1])
    loads = jnp.zeros(num_experts, jnp.int32).at[chosen].add(1)
    groups = Groups(
        sizes=lax.dynamic_slice_in_dim(loads, first, len(experts.gate)),
        first_row=jnp.sum(jnp.where(jnp.arange(num_experts) < first, loads, 0)),
    )
    copies = _copies(x.reshape(-1, x.shape[-1]), order, places)
    weights = routing.weights.reshape(-1)[order]
    matrices = Matrices(experts.gate, experts.up, experts.down)
    outputs = grouped_swiglu(copies, weights, matrices, groups)
    return _sum_of_copies(outputs, order, places).reshape(x.shape)


def _stable_order(ids: Array, num_ids: int) -> Array:
    """`argsort`; with the places in the keys XLA sorts one array of integers, in a quarter."""
    size = len(ids)
    if size * num_ids >= 2**31:
        return jnp.argsort(ids, stable=True).astype(jnp.int32)
    places = jnp.arange(size, dtype=jnp.int32)
    return lax.sort(ids * size + places, is_stable=False) % max(size, 1)


# Each is the other's transpose. They are written out, as XLA makes a scatter of a gather's.


@jax.custom_vjp
def _copies(tokens: Array, order: Array, places: Array) -> Array:
    """A copy of a token for each of its experts, in the order of the experts.

    `places` `[tokens top_k]` says where copies are, and `order` is the inverse of it.
    """
    return tokens[order // max(places.shape[1], 1)]


@jax.custom_vjp
def _sum_of_copies(copies: Array, order: Array, places: Array) -> Array:
    """The sum of the copies of each token."""
    # One after the other: XLA would fuse the gather with the sum, and lose a factor of twenty.
    dtype = accumulation_dtype(copies)
    parts = [copies[places[:, k]].astype(dtype) for k in range(places.shape[1])]
    return sum(parts[1:], parts[0]).astype(copies.dtype)


def _copies_forward(tokens: Array, order: Array, places: Array) -> tuple[Array, Any]:
    return _copies(tokens, order, places), (order, places)


def _copies_backward(residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    return _sum_of_copies(cotangent, *residuals), None, None


def _sum_forward(copies: Array, order: Array, places: Array) -> tuple[Array, Any]:
    return _sum_of_copies(copies, order, places), (order, places)


def _sum_backward(residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    return _copies(cotangent, *residuals), None, None


_copies.defvjp(_copies_forward, _copies_backward)
_sum_of_copies.defvjp(_sum_forward, _sum_backward)
