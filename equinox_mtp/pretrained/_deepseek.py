"""DeepSeek-V3, R1 and V3.1: latent attention and experts, and depths as further layers."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._dense import FEED_FORWARD, layer_of, make_swiglu
from ._moe import (
    CORRECTED_ROUTER,
    EXPERTS,
    NEXTN_DEPTHS,
    SHARED_EXPERTS,
    corrected_mixture_config,
    make_corrected_mixture,
)
from ._settings import Settings, rope_config
from ._steps import Kernel
from ._tables import Family, Table, Tensor

_ATTENTION: Table = {
    "attention_norm.scale": Tensor("input_layernorm.weight"),
    "attention.query_kernel": Tensor("self_attn.q_proj.weight", Kernel()),
    "attention.query_down.kernel": Tensor("self_attn.q_a_proj.weight", Kernel()),
    "attention.query_norm.scale": Tensor("self_attn.q_a_layernorm.weight"),
    "attention.query_up_kernel": Tensor("self_attn.q_b_proj.weight", Kernel()),
    "attention.latent_down.kernel": Tensor("self_attn.kv_a_proj_with_mqa.weight", Kernel()),
    "attention.latent_norm.scale": Tensor("self_attn.kv_a_layernorm.weight"),
    "attention.up_kernel": Tensor("self_attn.kv_b_proj.weight", Kernel()),
    "attention.out_kernel": Tensor("self_attn.o_proj.weight", Kernel(num_inputs=2)),
    "feed_forward_norm.scale": Tensor("post_attention_layernorm.weight"),
}


def make_layer(
    settings: Settings, index: int, names: Collection[str], *, key: PRNGKeyArray
) -> nn.TransformerDecoderLayer:
    """A layer of latent attention, and of SwiGLU or a mixture of experts."""
    _check_parts(settings)
    attention_key, feed_forward_key = jax.random.split(key)
    embed_size, epsilon = settings.integer("hidden_size"), settings.number("rms_norm_eps", 1e-6)
    rotary = settings.rotary(interleaved=settings.flag("rope_interleave", True))
    if rotary.size is not None:
        raise settings.error("partial_rotary_factor", "1 in this family", rotary.size)
    has_rank = settings.get("q_lora_rank") is not None
    if not has_rank and any(name.endswith("self_attn.q_a_proj.weight") for name in names):
        raise settings.error("q_lora_rank", "an integer: queries are compressed here", None)
    attention = nn.MultiHeadLatentAttention(
        embed_size,
        settings.integer("num_attention_heads"),
        q_lora_rank=settings.integer("q_lora_rank") if has_rank else None,
        kv_lora_rank=settings.integer("kv_lora_rank"),
        qk_nope_head_dim=settings.integer("qk_nope_head_dim"),
        qk_rope_head_dim=settings.integer("qk_rope_head_dim"),
        v_head_dim=settings.integer("v_head_dim"),
        rotary=rotary,
        norm_epsilon=epsilon,
        key=attention_key,
    )
    return layer_of(settings, attention, _make_feed_forward(settings, index, feed_forward_key))


def _make_feed_forward(settings: Settings, index: int, key: PRNGKeyArray) -> nn.AbstractFeedForward:
    """SwiGLU in the first layers, and between those with experts if these are not neighbours."""
    num_dense = settings.integer("first_k_dense_replace", 0, at_least=0)
    if index < num_dense or index % settings.integer("moe_layer_freq", 1):
        return make_swiglu(settings, key)
    return make_corrected_mixture(settings, key)


def _check_parts(settings: Settings) -> None:
    """**Raises:** `ValueError` for what these layers do not have."""
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False)):
        if (value := settings.get(key, wanted)) != wanted:
            raise settings.error(key, f"{wanted!r} in this family", value)


def config_of(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    """The keys of `config.json` that describe a decoder; `save` compares what they give.

    **Raises:** `ValueError` if its layers are of other kinds.
    """
    layers: list[Any] = [decoder.layer(index) for index in range(decoder.num_layers)]
    kinds = [type(getattr(layer, "feed_forward", None)) for layer in layers]
    is_latent = [
        isinstance(getattr(layer, "attention", None), nn.MultiHeadLatentAttention)
        for layer in layers
    ]
    if not all(is_latent) or nn.MixtureOfExperts not in kinds:
        raise ValueError(
            "`model` must have layers of multi-head latent attention, and a mixture of experts in "
            "some of them, for this layout; got "
            f"{type(getattr(layers[-1], 'attention', None)).__name__} and {kinds[-1].__name__}."
        )
    return {
        "vocab_size": decoder.embedding.shape[0],
        "hidden_size": decoder.embedding.shape[1],
        "num_hidden_layers": len(layers),
        **_attention_config(layers[0].attention),
        **corrected_mixture_config(layers),
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "rms_norm_eps": layers[0].attention_norm.epsilon,
        "attention_bias": False,
        "tie_word_embeddings": decoder.head is None,
        "use_cache": True,
    }


def _attention_config(attention: nn.MultiHeadLatentAttention) -> dict[str, Any]:
    heads, v_head_dim, _ = attention.out_kernel.shape
    rank = attention.latent_norm.scale.shape[0]
    rope_size = attention.latent_down.kernel.shape[1] - rank
    query_norm, query = attention.query_norm, attention.query_up_kernel
    query = attention.query_kernel if query is None else query
    assert query is not None
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": None if query_norm is None else query_norm.scale.shape[0],
        "kv_lora_rank": rank,
        "qk_nope_head_dim": query.shape[2] - rope_size,
        "qk_rope_head_dim": rope_size,
        "v_head_dim": v_head_dim,
        "rope_interleave": attention.rotary.interleaved,
        **rope_config(attention.rotary, rope_size),
    }


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    make_layer=make_layer,
    config_of=config_of,
    layer={**_ATTENTION, **FEED_FORWARD, **EXPERTS, **CORRECTED_ROUTER, **SHARED_EXPERTS},
    mtp=dataclasses.replace(NEXTN_DEPTHS, any_input=False),
)
