"""K-EXAONE: DeepSeek-V3's mixtures of experts, windows, and full attention without positions."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._dense import (
    ATTENTION,
    FEED_FORWARD,
    QUERY_KEY_NORMS,
    attention_config,
    layer_of,
    make_attention,
    make_swiglu,
)
from ._moe import (
    EXPERTS,
    SHARED_EXPERTS,
    MixtureKeys,
    checked_layers,
    corrected_mixture_config,
    make_corrected_mixture,
)
from ._settings import Settings
from ._tables import Family, Table, Tensor
from ._transformers import transformers_table

_KEYS = MixtureKeys("num_experts", "num_shared_experts", "scoring_func")
_ROUTER: Table = {"feed_forward.router.bias": Tensor("mlp.e_score_correction_bias")}


def make_layer(
    settings: Settings, index: int, names: Collection[str], *, key: PRNGKeyArray
) -> nn.TransformerDecoderLayer:
    """A layer of grouped-query attention, and of SwiGLU or a mixture of experts.

    Depths, which count on, are dense.
    """
    _check_parts(settings)
    attention_key, feed_forward_key = jax.random.split(key)
    attention = make_attention(
        settings,
        index,
        names,
        biases="found",
        has_norm=True,
        has_window=True,
        rotates_all=not _has_windows(settings),
        key=attention_key,
    )
    if _is_dense(settings, index):
        feed_forward: nn.AbstractFeedForward = make_swiglu(settings, feed_forward_key)
    else:
        feed_forward = make_corrected_mixture(settings, feed_forward_key, _KEYS)
    return layer_of(settings, attention, feed_forward)


def _check_parts(settings: Settings) -> None:
    """**Raises:** `ValueError` for what these layers do not have, or readers differ in."""
    settings.number("routed_scaling_factor")
    if settings.get("swiglu_limits") is not None:
        raise settings.error("swiglu_limits", "left out", settings.get("swiglu_limits"))
    if settings.get("logit_scale", 1) != 1:
        raise settings.error("logit_scale", "1", settings.get("logit_scale"))


def _kinds(settings: Settings, key: str, known: tuple[str, str]) -> list[str]:
    """One for each layer of the main model."""
    kinds, num_layers = settings.get(key), settings.integer("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not {*kinds} <= {*known}:
        raise settings.error(key, f"{num_layers} times {' or '.join(known)}", kinds)
    return kinds


def _has_windows(settings: Settings) -> bool:
    """Whether some layers have windows; then those without one know of no positions."""
    kinds = _kinds(settings, "layer_types", ("sliding_attention", "full_attention"))
    has_windows = "sliding_attention" in kinds
    if has_windows != (settings.config.get("sliding_window", 4096) is not None):
        # Readers differ in which layers are rotated otherwise.
        wanted = "a number if layers have windows, and null if none has"
        raise settings.error("sliding_window", wanted, settings.get("sliding_window"))
    return has_windows


def _is_dense(settings: Settings, index: int) -> bool:
    if index >= settings.integer("num_hidden_layers"):
        return True
    if settings.get("mlp_layer_types") is None:
        return index < settings.integer("first_k_dense_replace", 1, at_least=0)
    return _kinds(settings, "mlp_layer_types", ("dense", "sparse"))[index] == "dense"


def config_of(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    """The keys of `config.json` that describe a decoder; `save` compares what they give."""
    layers = checked_layers(decoder)
    names = {True: "dense", False: "sparse"}
    windows = {
        "sliding_window": None,
        "layer_types": ["full_attention"] * len(layers),
        **attention_config(decoder, layers),
    }
    return {
        **corrected_mixture_config(layers, _KEYS),
        **windows,
        "mlp_layer_types": [names[isinstance(x.feed_forward, nn.SwiGLU)] for x in layers],
        "scoring_func": "sigmoid",
    }


EXAONE_MOE = Family(
    name="exaone_moe",
    architectures=("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"),
    make_layer=make_layer,
    config_of=config_of,
    layer={
        **ATTENTION,
        **QUERY_KEY_NORMS,
        **FEED_FORWARD,
        **EXPERTS,
        **_ROUTER,
        **SHARED_EXPERTS,
    },
    mtp=dataclasses.replace(
        transformers_table(1),
        count_key="num_nextn_predict_layers",
        kinds_key="mtp_layer_types",
        any_input=False,
    ),
)
"""Names only, no number checked: no recorded numbers of its own were there."""
