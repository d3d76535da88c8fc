"""K-EXAONE: DeepSeek-V3's experts, windows, and full attention without positional encoding."""

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
_ATTENTIONS = ("sliding_attention", "full_attention")
_COUNT_KEY, _DEPTH_KINDS = "num_nextn_predict_layers", "mtp_layer_types"
_DEPTH_WINDOWS = "mtp_sliding_windows"
_ROUTER: Table = {"feed_forward.router.bias": Tensor("mlp.e_score_correction_bias")}


def make_layer(
    settings: Settings, index: int, names: Collection[str], *, key: PRNGKeyArray
) -> nn.TransformerDecoderLayer:
    """A layer of grouped-query attention, and of SwiGLU or a mixture of experts.

    Depths, which count on, are dense.
    """
    _check_parts(settings, names)
    attention_key, feed_forward_key = jax.random.split(key)
    attention = _attention(settings, index, attention_key)
    if _is_dense(settings, index):
        feed_forward: nn.AbstractFeedForward = make_swiglu(settings, feed_forward_key)
    else:
        feed_forward = make_corrected_mixture(settings, feed_forward_key, _KEYS)
    return layer_of(settings, attention, feed_forward)


def _attention(settings: Settings, index: int, key: PRNGKeyArray) -> nn.GroupedQueryAttention:
    windows, num_layers = _windows(settings), settings.integer("num_hidden_layers")
    own = windows if index < num_layers else _depth_windows(settings)
    # Fresh depths may be more than a configuration has.
    index = index if index < num_layers else index - num_layers
    window = own[index] if index < len(own) else None
    # Where some layers have windows, those without one have no positional encoding.
    rotates = window is not None or not any(windows)
    heads = settings.integer("num_attention_heads")
    return nn.GroupedQueryAttention(
        settings.integer("hidden_size"),
        heads,
        settings.integer("num_key_value_heads", heads),
        settings.head_dim,
        rotary=settings.rotary() if rotates else None,
        norm_epsilon=settings.number("rms_norm_eps"),
        window=window,
        key=key,
    )


def _check_parts(settings: Settings, names: Collection[str]) -> None:
    """**Raises:** `ValueError` for what these layers do not have, or readers differ in."""
    for key in ("routed_scaling_factor", "rms_norm_eps"):
        settings.number(key)
    settings.integer("num_shared_experts", at_least=0)
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters", {})
    said = settings.config if settings.get("rope_theta") is not None else scaling
    if isinstance(said, dict) and "rope_theta" not in said:
        raise settings.error("rope_theta", "a number", None)
    for key, default, wanted in (
        ("hidden_act", "silu", "silu"),
        ("partial_rotary_factor", 1, 1),
        ("logit_scale", 1, 1),
        ("swiglu_limits", None, None),
    ):
        if settings.get(key, default) != wanted:
            raise settings.error(key, f"{wanted!r} in this family", settings.get(key))
    if settings.flag("attention_bias", False) or any(x.endswith("_proj.bias") for x in names):
        raise settings.error(
            "attention_bias",
            "false, and without tensors `…_proj.bias`",
            settings.get("attention_bias"),
        )


def _kinds(settings: Settings, key: str, known: tuple[str, str], length: int) -> list[str]:
    """One for each layer."""
    kinds = settings.get(key)
    is_right = isinstance(kinds, list) and len(kinds) == length
    if not (is_right and all(kind in known for kind in kinds)):
        raise settings.error(key, f"a list of {length} times {' or '.join(known)}", kinds)
    return kinds


def _windows(settings: Settings) -> list[int | None]:
    """Of each layer of the main model."""
    num_layers = settings.integer("num_hidden_layers")
    windows = _sizes(settings, "layer_types", "sliding_windows", num_layers)
    if not any(windows) and settings.config.get("sliding_window", 4096) is not None:
        # Readers differ in whether these layers are rotated.
        wanted = "null, and not left out, where no layer has a window"
        raise settings.error("sliding_window", wanted, settings.get("sliding_window"))
    return windows


def _depth_windows(settings: Settings) -> list[int | None]:
    """Of each depth that there is; they see all if nothing is said."""
    num_depths = settings.integer(_COUNT_KEY, 0, at_least=0)
    if settings.get(_DEPTH_KINDS) is None:
        return [None] * num_depths
    return _sizes(settings, _DEPTH_KINDS, _DEPTH_WINDOWS, num_depths)


def _sizes(settings: Settings, kinds_key: str, sizes_key: str, length: int) -> list[int | None]:
    """Windows of layers, by a list of kinds and one of sizes, or a single size."""
    kinds = _kinds(settings, kinds_key, _ATTENTIONS, length)
    one, sizes = settings.config.get("sliding_window"), settings.get(sizes_key)
    if sizes is None:
        sizes = [one] * length
    windows = []
    for kind, size in zip(kinds, sizes if isinstance(sizes, list) else [], strict=False):
        is_size = type(size) is int and 0 < size < 2**31
        # vLLM takes the list, and transformers the single size.
        if kind == _ATTENTIONS[0] and not (is_size and one in (None, size)):
            key = sizes_key if settings.get(sizes_key) is not None else "sliding_window"
            wanted = "the window of every layer of sliding_attention, the same by both keys"
            raise settings.error(key, wanted, settings.get(key))
        windows.append(size if kind == _ATTENTIONS[0] else None)
    if len(windows) != length:
        raise settings.error(sizes_key, f"a list of {length} windows", sizes)
    return windows


def _is_dense(settings: Settings, index: int) -> bool:
    num_layers = settings.integer("num_hidden_layers")
    if index >= num_layers:
        return True
    if settings.get("mlp_layer_types") is None:
        return index < settings.integer("first_k_dense_replace", 1, at_least=0)
    kinds = _kinds(settings, "mlp_layer_types", ("dense", "sparse"), num_layers)
    return kinds[index] == "dense"


def config_of(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    """The keys of `config.json` that describe a decoder; `save` compares what they give."""
    layers = checked_layers(decoder)
    is_dense = [isinstance(layer.feed_forward, nn.SwiGLU) for layer in layers]
    windows = {layer.attention.window for layer in layers} - {None}
    return {
        **corrected_mixture_config(layers, _KEYS),
        **attention_config(decoder, layers),
        **_windows_config(layers, "layer_types", "sliding_windows"),
        # One for all, if there is one.
        "sliding_window": windows.pop() if len(windows) == 1 else None,
        "mlp_layer_types": ["dense" if dense else "sparse" for dense in is_dense],
        "is_moe_layer": [not dense for dense in is_dense],
        "scoring_func": "sigmoid",
    }


def depths_config(layers: Any, num_depths: int) -> dict[str, Any]:
    """The keys of `config.json` that describe depths, which are alike."""
    return _windows_config([layers.transformer_layer] * num_depths, _DEPTH_KINDS, _DEPTH_WINDOWS)


def _windows_config(layers: list[Any], kinds_key: str, sizes_key: str) -> dict[str, Any]:
    windows = [getattr(layer.attention, "window", None) for layer in layers]
    kinds = [_ATTENTIONS[window is None] for window in windows]
    return {kinds_key: kinds, sizes_key: [window or 0 for window in windows]}


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
        count_key=_COUNT_KEY,
        layers_config=depths_config,
        any_input=False,
    ),
)
"""Names only: there are no recorded numbers of it."""
