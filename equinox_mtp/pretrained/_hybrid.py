"""Qwen3.5: Gated DeltaNet in most layers, gated attention in the others."""

import dataclasses
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._settings import Settings, rope_config
from ._tables import Convolution, Family, Kernel, MTPTable, Part, Table, Tensor
from ._transformers import transformers_table

_NORMS: Table = {
    "attention_norm.scale": Tensor("input_layernorm.weight"),
    "feed_forward_norm.scale": Tensor("post_attention_layernorm.weight"),
}
_GATED_ATTENTION: Table = {
    # Of each head its query, and then its gate.
    "attention.query_kernel": Tensor("self_attn.q_proj.weight", Part(0, groups="query_kernel")),
    "attention.gate_kernel": Tensor("self_attn.q_proj.weight", Part(1, groups="query_kernel")),
    "attention.key_kernel": Tensor("self_attn.k_proj.weight", Kernel()),
    "attention.value_kernel": Tensor("self_attn.v_proj.weight", Kernel()),
    "attention.out_kernel": Tensor("self_attn.o_proj.weight", Kernel(num_inputs=2)),
    "attention.query_norm.scale": Tensor("self_attn.q_norm.weight"),
    "attention.key_norm.scale": Tensor("self_attn.k_norm.weight"),
}
_DELTA: Table = {
    "attention.query_convolution": Tensor("linear_attn.conv1d.weight", Part(0, Convolution())),
    "attention.key_convolution": Tensor("linear_attn.conv1d.weight", Part(1, Convolution())),
    "attention.value_convolution": Tensor("linear_attn.conv1d.weight", Part(2, Convolution())),
    "attention.a_log": Tensor("linear_attn.A_log"),
    "attention.dt_bias": Tensor("linear_attn.dt_bias"),
    "attention.output_norm.scale": Tensor("linear_attn.norm.weight"),
    "attention.out_kernel": Tensor("linear_attn.out_proj.weight", Kernel(num_inputs=2)),
}
_DELTA_PROJECTIONS: Table = {
    "attention.query_kernel": Tensor("linear_attn.in_proj_qkv.weight", Part(0)),
    "attention.key_kernel": Tensor("linear_attn.in_proj_qkv.weight", Part(1)),
    "attention.value_kernel": Tensor("linear_attn.in_proj_qkv.weight", Part(2)),
    "attention.gate_kernel": Tensor("linear_attn.in_proj_z.weight", Kernel()),
    "attention.beta_kernel": Tensor("linear_attn.in_proj_b.weight", Kernel()),
    "attention.decay_kernel": Tensor("linear_attn.in_proj_a.weight", Kernel()),
}
_SWIGLU: Table = {
    "feed_forward.gate.kernel": Tensor("mlp.gate_proj.weight", Kernel()),
    "feed_forward.up.kernel": Tensor("mlp.up_proj.weight", Kernel()),
    "feed_forward.down.kernel": Tensor("mlp.down_proj.weight", Kernel()),
}


def make_layer(
    settings: Settings, index: int, names: Collection[str], *, key: PRNGKeyArray
) -> nn.TransformerDecoderLayer:
    """A layer of the kind that `layer_types` says; depths, which count on, have full attention."""
    _check_parts(settings, names)
    attention_key, feed_forward_key = jax.random.split(key)
    embed_size, epsilon = settings.integer("hidden_size"), settings.number("rms_norm_eps", 1e-6)
    make_attention = _attention if _is_full(settings, index) else _delta
    return nn.TransformerDecoderLayer.of(
        make_attention(settings, attention_key),
        nn.SwiGLU(embed_size, settings.integer("intermediate_size"), key=feed_forward_key),
        attention_norm=nn.RMSNorm(embed_size, epsilon=epsilon),
        feed_forward_norm=nn.RMSNorm(embed_size, epsilon=epsilon),
    )


def _attention(settings: Settings, key: PRNGKeyArray) -> nn.GroupedQueryAttention:
    heads = settings.integer("num_attention_heads")
    return nn.GroupedQueryAttention(
        settings.integer("hidden_size"),
        heads,
        settings.integer("num_key_value_heads", heads),
        settings.head_dim,
        rotary=settings.rotary(),
        gate=True,
        norm_epsilon=settings.number("rms_norm_eps", 1e-6),
        key=key,
    )


def _delta(settings: Settings, key: PRNGKeyArray) -> nn.GatedDeltaNet:
    return nn.GatedDeltaNet(
        settings.integer("hidden_size"),
        settings.integer("linear_num_key_heads"),
        settings.integer("linear_num_value_heads"),
        settings.integer("linear_key_head_dim"),
        settings.integer("linear_value_head_dim"),
        width=settings.integer("linear_conv_kernel_dim", 4),
        norm_epsilon=settings.number("rms_norm_eps", 1e-6),
        key=key,
    )


def _is_full(settings: Settings, index: int) -> bool:
    num_layers = settings.integer("num_hidden_layers")
    if index >= num_layers:
        return True
    kinds = settings.get("layer_types")
    if kinds is None:
        return (index + 1) % settings.integer("full_attention_interval", 4) == 0
    kind = kinds[index] if isinstance(kinds, list) and len(kinds) == num_layers else None
    if kind not in ("linear_attention", "full_attention"):
        wanted = f"{num_layers} times linear_attention or full_attention"
        raise settings.error("layer_types", wanted, kinds)
    return kind == "full_attention"


def _check_parts(settings: Settings, names: Collection[str]) -> None:
    """**Raises:** `ValueError` for what these layers do not have."""
    for key, default, wanted in (
        ("hidden_act", "silu", "silu"),
        ("attention_bias", False, False),
        ("attn_output_gate", True, True),
        ("mtp_use_dedicated_embeddings", False, False),
    ):
        if settings.get(key, default) != wanted:
            raise settings.error(key, f"{wanted!r} in this family", settings.get(key))
    if any(name.endswith("_proj.bias") for name in names):
        raise settings.error(
            "attention_bias",
            "false, and without tensors `…_proj.bias`",
            settings.get("attention_bias"),
        )


def config_of(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    """The keys of `config.json` that describe a decoder, from its first layer of each kind.

    `save` compares what these keys give with the whole model.

    **Raises:** `ValueError` if its layers are of other kinds.
    """
    layers: list[Any] = [decoder.layer(index) for index in range(decoder.num_layers)]
    kinds: dict[type, Any] = {nn.GatedDeltaNet: None, nn.GroupedQueryAttention: None}
    for layer in reversed(layers):
        attention, feed_forward = (getattr(layer, x, None) for x in ("attention", "feed_forward"))
        if type(attention) not in kinds or not isinstance(feed_forward, nn.SwiGLU):
            raise ValueError(
                "`model` must have layers of Gated DeltaNet or grouped-query attention, and "
                f"SwiGLU, for this layout; got a {type(attention).__name__} and a "
                f"{type(feed_forward).__name__}."
            )
        kinds[type(attention)] = attention
    delta, full = kinds.values()
    if delta is None or full is None:
        raise ValueError(
            "`model` must have layers of both Gated DeltaNet and grouped-query attention for this "
            f"layout; got {len(layers)} of one kind."
        )
    embed_size, heads, head_dim = full.query_kernel.shape
    rope = rope_config(full.rotary, head_dim)
    names = {True: "full_attention", False: "linear_attention"}
    return {
        "model_type": "qwen3_5_text",
        "vocab_size": decoder.embedding.shape[0],
        "hidden_size": embed_size,
        "intermediate_size": layers[0].feed_forward.up.kernel.shape[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": full.key_kernel.shape[1],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": layers[0].attention_norm.epsilon,
        "attention_bias": False,
        "attn_output_gate": full.gate_kernel is not None,
        "tie_word_embeddings": decoder.head is None,
        "use_cache": True,
        "layer_types": [
            names[isinstance(layer.attention, nn.GroupedQueryAttention)] for layer in layers
        ],
        "linear_conv_kernel_dim": delta.key_convolution.shape[0],
        "linear_key_head_dim": delta.key_kernel.shape[2],
        "linear_value_head_dim": delta.value_kernel.shape[2],
        "linear_num_key_heads": delta.key_kernel.shape[1],
        "linear_num_value_heads": delta.value_kernel.shape[1],
        **rope,
        "rope_parameters": {
            "rope_type": "default",
            **(rope["rope_scaling"] or {}),
            "rope_theta": full.rotary.theta,
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        },
    }


def _layer_table(layer: Any, *, delta: Table, feed_forward: Table) -> Table:
    is_delta = isinstance(layer.attention, nn.GatedDeltaNet)
    return {**_NORMS, **({**_DELTA, **delta} if is_delta else _GATED_ATTENTION), **feed_forward}


_MTP: MTPTable = transformers_table(1)

QWEN3_5 = Family(
    name="qwen3_5",
    architectures=("Qwen3_5ForCausalLM",),
    make_layer=make_layer,
    config_of=config_of,
    layer=partial(_layer_table, delta=_DELTA_PROJECTIONS, feed_forward=_SWIGLU),
    scale_offset=1.0,
    mtp=dataclasses.replace(_MTP, count_key="mtp_num_hidden_layers"),
)
