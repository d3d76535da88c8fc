"""MaxText's configuration object, read and checked."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from .._config import MTPConfig
from ..nn import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a block needs of MaxText's configuration."""

    conventions: MTPConfig
    eval_depth: int
    embed_size: int
    norm_epsilon: float
    dtype: np.dtype
    weight_dtype: np.dtype

    @property
    def own_norm(self) -> bool:
        """Whether depths have an output norm of their own, and leave the decoder's out."""
        return self.conventions.output_norm == "own"


def read_settings(config: Any) -> Settings:
    """Reads a block's settings from an object with MaxText's attribute names.

    `mtp_final_norm` may be missing, as it is in older generations; it is `False` then. If it is
    set, every depth has a norm of its own before the head, and passes on the state before it.

    **Raises:** `ValueError` that names an attribute which is missing or makes no sense.
    """
    num_depths = int(_read(config, "mtp_num_layers", "an integer, zero or positive", _is_count))
    own_norm = getattr(config, "mtp_final_norm", False)
    if not isinstance(own_norm, (bool, np.bool_)):
        raise ValueError(f"`config.mtp_final_norm` must be True or False; got {own_norm!r}.")
    return Settings(
        conventions=MTPConfig.preset(
            "maxtext", num_depths, output_norm="own" if own_norm else "shared"
        ),
        eval_depth=read_eval_depth(config, num_depths),
        embed_size=_read_size(config, "emb_dim"),
        norm_epsilon=float(
            _read(config, "normalization_layer_epsilon", "a number above zero", _is_positive)
        ),
        dtype=_read_dtype(config, "dtype"),
        weight_dtype=_read_dtype(config, "weight_dtype"),
    )


def read_scaling_factor(config: Any) -> Float32[Array, ""]:
    """λ."""
    value = _read(
        config,
        "mtp_loss_scaling_factor",
        "a number, zero or positive",
        lambda value: _is_scalar_of_jax(value) or (_is_number(value) and value >= 0),
    )
    return jnp.asarray(value, jnp.float32)


def read_eval_depth(config: Any, num_depths: int | None = None) -> int:
    """The depth whose acceptance is collected; 0 for none."""
    wanted, accepts = "a depth from 1 on, or 0 for none", _is_count
    if num_depths is not None:
        wanted = f"a depth in 1 … {num_depths} (`mtp_num_layers`), or 0 for none"

        def accepts(value: Any) -> bool:
            return _is_count(value) and value <= num_depths

    return _read(config, "mtp_eval_target_module", wanted, accepts)


def read_transformer(config: Any) -> TransformerConfig:
    """The reference layer with MaxText's sizes, in the conventions of its Llama layer.

    MaxText has no 1/√head_dim in its attention: it is in the query's initial values.
    """
    heads, kv_heads = (_read_size(config, name) for name in ("num_query_heads", "num_kv_heads"))
    if heads % kv_heads:
        raise ValueError(
            f"`config.num_kv_heads` must divide `num_query_heads`; got {kv_heads} and {heads}."
        )
    return TransformerConfig(
        vocab_size=1,  # Of no concern to a layer.
        embed_size=_read_size(config, "emb_dim"),
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_read_size(config, "head_dim"),
        mlp_size=_read_size(config, "mlp_dim"),
        rope_theta=float(
            _read(config, "rope_max_timescale", "a number above zero", _is_positive)
            if hasattr(config, "rope_max_timescale")
            else 10_000.0
        ),
        norm_epsilon=float(
            _read(config, "normalization_layer_epsilon", "a number above zero", _is_positive)
        ),
        attention_scale=1.0,
    )


def _read(config: Any, name: str, wanted: str, accepts: Callable[[Any], bool]) -> Any:
    try:
        value = getattr(config, name)
    except AttributeError:
        hint = " Pass `types.SimpleNamespace(**config)`." if isinstance(config, Mapping) else ""
        raise ValueError(
            f"`config` must have the attribute `{name}`, {wanted}; got a "
            f"`{type(config).__name__}` without it.{hint}"
        ) from None
    if not accepts(value):
        raise ValueError(f"`config.{name}` must be {wanted}; got {value!r}.")
    return value


def _read_size(config: Any, name: str) -> int:
    return _read(config, name, "a positive integer", lambda value: _is_count(value) and value > 0)


def _read_dtype(config: Any, name: str) -> np.dtype:
    return jnp.dtype(_read(config, name, "a floating-point dtype or its name", _is_float_dtype))


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return bool(is_number and math.isfinite(value))


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return bool(is_integer and value >= 0)


def _is_scalar_of_jax(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.shape == ()


def _is_float_dtype(value: Any) -> bool:
    try:
        # NumPy takes `None` for a float64.
        return bool(value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except TypeError:
        return False
