"""What keeps the experts of a run's model balanced, and what is reported of them."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

import equinox_mtp as emtp
from equinox_mtp.nn import Router, RouterStatistics, router_statistics_in, update_router_biases

from ._config import TrainConfig


class TokenCounts(NamedTuple):
    """Tokens, and rows with a token, that routers see in all microbatches of a step.

    Of the main model's layers, and of those of each depth.
    """

    main_tokens: Float32[Array, ""]
    main_rows: Float32[Array, ""]
    depth_tokens: Float32[Array, "depth"]
    depth_rows: Float32[Array, "depth"]

    @classmethod
    def of(cls, batches: emtp.Batch) -> "TokenCounts":
        """Of batches with a leading axis of microbatches."""
        assert batches.segment_ids is not None
        assert batches.targets is not None
        assert batches.targets.token_mask is not None
        main, depths = jnp.asarray(batches.segment_ids) != 0, batches.targets.token_mask
        return cls(
            jnp.sum(main, dtype=jnp.float32),
            jnp.sum(jnp.any(main, axis=-1), dtype=jnp.float32),
            jnp.sum(depths, axis=(0, 2, 3), dtype=jnp.float32),
            jnp.sum(jnp.any(depths, axis=-1), axis=(0, 2), dtype=jnp.float32),
        )


class Auxiliary(eqx.Module):
    """The routers' statistics, stacked over the layers of the main model, and over depths.

    Stacks of routers of several sizes follow one another. None of a model without experts.
    """

    main: tuple[RouterStatistics, ...]
    depths: tuple[RouterStatistics, ...]

    @classmethod
    def of(cls, main: Any, depths: Any) -> "Auxiliary":
        """What is among the auxiliary outputs of the main model and of its depths."""
        return cls(router_statistics_in(main), router_statistics_in(depths))

    def loss(self, config: TrainConfig, counts: TokenCounts) -> Array:
        """What a microbatch's routers add to the loss of the step, summed over all layers.

        Divided by what all microbatches hold, so that their gradients add up exactly.
        """
        total = jnp.zeros((), jnp.float32)
        parts = (
            (self.main, counts.main_rows, counts.main_tokens),
            (self.depths, counts.depth_rows, counts.depth_tokens),
        )
        for found, rows, tokens in parts:
            for statistics in found:
                balance = statistics.sequence_balance_losses / jnp.maximum(rows, 1.0)
                z = statistics.z_losses / jnp.maximum(tokens, 1.0)
                total += jnp.sum(config.balance_loss * balance + config.router_z_loss * z)
        return total

    def updated(self, model: emtp.MTPModel, rate: float) -> emtp.MTPModel:
        """The model with the biases of its routers after a step."""
        decoder, block = model.decoder, model.block
        if self.main:
            decoder = update_router_biases(decoder, self.main, rate)
        if self.depths:
            block = update_router_biases(block, self.depths, rate)
        return emtp.MTPModel(decoder, block)

    def record(self) -> dict[str, Any]:
        """Of each layer with a router, the main model's first: for `metrics.jsonl`.

        `router_max_load` is the load of the busiest expert, as a multiple of the mean load; the
        last `router_depths` of the numbers are of prediction depths.
        """
        main, depths = jax.device_get((self.main, self.depths))
        found = (*main, *depths)
        if not found:
            return {}
        named = {
            "router_max_load": [
                x.load.max(axis=-1) / np.maximum(x.load.mean(axis=-1), 1e-9) for x in found
            ],
            "router_balance_loss": [
                x.sequence_balance_losses / np.maximum(x.rows, 1) for x in found
            ],
            "router_z_loss": [x.z_losses / np.maximum(x.tokens, 1) for x in found],
        }
        lists = {name: np.concatenate(values).tolist() for name, values in named.items()}
        return {**lists, "router_depths": sum(len(x.tokens) for x in depths)}


def check_routers(config: TrainConfig, model: emtp.MTPModel | None) -> None:
    """**Raises:** `ValueError` for options of routers, if none that trains has a use for them."""
    leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, Router))
    # Of a frozen part the arrays are `None`.
    routers = [x for x in leaves if isinstance(x, Router) and x.kernel is not None]
    with_bias = [x for x in routers if x.bias is not None]
    for name in ("balance_loss", "router_z_loss", "router_bias_rate"):
        default = TrainConfig.__dataclass_fields__[name].default
        is_of_bias = name == "router_bias_rate"
        if getattr(config, name) != default and not (with_bias if is_of_bias else routers):
            what = "the bias of routers" if is_of_bias else "the routers"
            raise ValueError(
                f"`{name}` is of {what} of a mixture of experts, and none trains here; got "
                f"{getattr(config, name)}. Leave it out, or take an --architecture that has some."
            )
