"""Ling 2 and Ring 2: GLM-4.5's layers under other names, with queries, keys and values in one."""

from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._dense import FEED_FORWARD, attention_config, layer_of, make_attention, make_swiglu
from ._moe import (
    EXPERTS,
    NEXTN_DEPTHS,
    SHARED_EXPERTS,
    MixtureKeys,
    checked_layers,
    corrected_mixture_config,
    make_corrected_mixture,
)
from ._settings import Settings
from ._steps import Kernel, Part
from ._tables import DECODER, Family, MTPTable, Table, Tensor

_KEYS = MixtureKeys("num_experts", "num_shared_experts", "score_function")
_WANTED = {
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "norm_head": False,
    "moe_router_enable_expert_bias": True,
}
_ATTENTION: Table = {
    "attention_norm.scale": Tensor("input_layernorm.weight"),
    # All queries, then all keys, then all values.
    "attention.query_kernel": Tensor("attention.query_key_value.weight", Part(0)),
    "attention.key_kernel": Tensor("attention.query_key_value.weight", Part(1)),
    "attention.value_kernel": Tensor("attention.query_key_value.weight", Part(2)),
    "attention.query_norm.scale": Tensor("attention.query_layernorm.weight"),
    "attention.key_norm.scale": Tensor("attention.key_layernorm.weight"),
    "attention.out_kernel": Tensor("attention.dense.weight", Kernel(num_inputs=2)),
    "feed_forward_norm.scale": Tensor("post_attention_layernorm.weight"),
    "feed_forward.router.bias": Tensor("mlp.gate.expert_bias"),
}


def make_layer(
    settings: Settings, index: int, names: Collection[str], *, key: PRNGKeyArray
) -> nn.TransformerDecoderLayer:
    """A layer of grouped-query attention, and of SwiGLU or a mixture of experts."""
    _check_parts(settings)
    attention_key, feed_forward_key = jax.random.split(key)
    attention = make_attention(
        settings,
        index,
        names,
        biases="found",
        has_norm=True,
        has_window=False,
        # Readers differ in its default.
        partial_rotary=settings.number("partial_rotary_factor"),
        key=attention_key,
    )
    if index < settings.integer("first_k_dense_replace", 0, at_least=0):
        feed_forward: nn.AbstractFeedForward = make_swiglu(settings, feed_forward_key)
    else:
        feed_forward = make_corrected_mixture(settings, feed_forward_key, _KEYS)
    return layer_of(settings, attention, feed_forward)


def _check_parts(settings: Settings) -> None:
    """**Raises:** `ValueError` for what these layers do not have."""
    for key, wanted in _WANTED.items():
        if settings.get(key, wanted) != wanted:
            raise settings.error(key, f"{wanted} in this family", settings.get(key))
    # Readers differ in which of the two is the shared experts' size.
    key, mlp_size = "moe_shared_expert_intermediate_size", settings.get("moe_intermediate_size")
    if settings.get(key, mlp_size) != mlp_size:
        raise settings.error(key, f"`moe_intermediate_size`, {mlp_size}", settings.get(key))


def config_of(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    """The keys of `config.json` that describe a decoder; `save` compares what they give."""
    layers = checked_layers(decoder)
    config = {
        **corrected_mixture_config(layers, _KEYS),
        "partial_rotary_factor": 1.0,
        **attention_config(decoder, layers),
        **_WANTED,
        "score_function": "sigmoid",
        "model_type": "bailing_moe",
    }
    config["moe_shared_expert_intermediate_size"] = config["moe_intermediate_size"]
    return config


BAILING_MOE_V2 = Family(
    name="bailing_moe_v2",
    architectures=("BailingMoeV2ForCausalLM",),
    make_layer=make_layer,
    config_of=config_of,
    layer={**_ATTENTION, **FEED_FORWARD, **EXPERTS, **SHARED_EXPERTS},
    decoder={**DECODER, "embedding": Tensor("model.word_embeddings.weight")},
    mtp=MTPTable(
        prefix=NEXTN_DEPTHS.prefix,
        table={**NEXTN_DEPTHS.table, "output_norm.scale": Tensor("final_layernorm.weight")},
        config=NEXTN_DEPTHS.config,
        any_input=False,
    ),
)
"""Ling 2 and Ring 2. Names only, no number checked: no recorded numbers of theirs were there."""
