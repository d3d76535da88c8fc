"""Qwen3.5, dense or with experts, and Qwen3-Next: Gated DeltaNet and gated attention."""

import dataclasses
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._dense import ATTENTION, FEED_FORWARD, QUERY_KEY_NORMS, layer_of, make_swiglu
from ._hybrid_config import FeedForwards, config_of
from ._moe import EXPERTS
from ._settings import Settings
from ._steps import Convolution, Kernel, Part
from ._tables import Family, Table, Tensor
from ._transformers import transformers_table

_GATED_ATTENTION: Table = {
    **QUERY_KEY_NORMS,
    # Of each head its query, and then its gate.
    "attention.query_kernel": Tensor("self_attn.q_proj.weight", Part(0, groups="query_kernel")),
    "attention.gate_kernel": Tensor("self_attn.q_proj.weight", Part(1, groups="query_kernel")),
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
# Of each head of keys: its query, key, values and gates; and its values' rates and decays.
_DELTA_PROJECTIONS_BY_HEAD: Table = {
    **{
        f"attention.{part}_kernel": Tensor(
            "linear_attn.in_proj_qkvz.weight", Part(order, groups="key_kernel")
        )
        for order, part in enumerate(("query", "key", "value", "gate"))
    },
    **{
        f"attention.{part}_kernel": Tensor(
            "linear_attn.in_proj_ba.weight", Part(order, groups="key_kernel")
        )
        for order, part in enumerate(("beta", "decay"))
    },
}
_SHARED_EXPERT: Table = {
    **{
        f"feed_forward.shared_expert.{part}.kernel": Tensor(
            f"mlp.shared_expert.{part}_proj.weight", Kernel()
        )
        for part in ("gate", "up", "down")
    },
    "feed_forward.shared_gate.kernel": Tensor("mlp.shared_expert_gate.weight", Kernel()),
}
_MATRICES = Kernel(num_stacked=1)
# All experts in one tensor, of each its gate above its up-projection; or one by one.
_PACKED_EXPERTS: Table = {
    **EXPERTS,
    **{
        f"feed_forward.experts.{part}": Tensor(
            f"mlp.experts.{name}", step, other=EXPERTS[f"feed_forward.experts.{part}"]
        )
        for part, name, step in (
            ("gate", "gate_up_proj", Part(0, _MATRICES, axis=1)),
            ("up", "gate_up_proj", Part(1, _MATRICES, axis=1)),
            ("down", "down_proj", _MATRICES),
        )
    },
}


def make_layer(
    settings: Settings,
    index: int,
    names: Collection[str],
    *,
    feed_forwards: FeedForwards,
    fraction: float,
    key: PRNGKeyArray,
) -> nn.TransformerDecoderLayer:
    """A layer of the kind that `layer_types` says; depths, which count on, have full attention.

    `feed_forwards` and `fraction`, of the features that are rotated by default, are a family's.
    """
    _check_parts(settings, names, feed_forwards)
    attention_key, feed_forward_key = jax.random.split(key)
    if _is_full(settings, index):
        attention = _attention(settings, fraction, attention_key)
    else:
        attention = _delta(settings, attention_key)
    is_mixture = feed_forwards == "experts"
    if feed_forwards == "either":
        is_mixture = _is_mixture(settings, index)
    make_feed_forward = _mixture if is_mixture else make_swiglu
    return layer_of(settings, attention, make_feed_forward(settings, feed_forward_key))


def _mixture(settings: Settings, key: PRNGKeyArray) -> nn.MixtureOfExperts:
    router_key, experts_key, shared_key, gate_key = jax.random.split(key, 4)
    embed_size, num_experts = settings.integer("hidden_size"), settings.integer("num_experts")
    router = nn.Router(
        embed_size,
        num_experts,
        top_k=settings.integer("num_experts_per_tok"),
        normalize=settings.flag("norm_topk_prob", True),
        key=router_key,
    )
    mlp_size = settings.integer("moe_intermediate_size")
    shared_size = settings.integer("shared_expert_intermediate_size")
    return nn.MixtureOfExperts(
        router,
        nn.Experts(num_experts, embed_size, mlp_size, key=experts_key),
        shared_expert=nn.SwiGLU(embed_size, shared_size, key=shared_key),
        shared_gate=nn.Linear(embed_size, 1, key=gate_key),
    )


def _is_mixture(settings: Settings, index: int) -> bool:
    """Depths, which count on, have a mixture."""
    if index >= settings.integer("num_hidden_layers"):
        return True
    dense = settings.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise settings.error("mlp_only_layers", "a list of layers", dense)
    return index not in dense and (index + 1) % settings.integer("decoder_sparse_step", 1) == 0


def _attention(settings: Settings, fraction: float, key: PRNGKeyArray) -> nn.GroupedQueryAttention:
    heads = settings.integer("num_attention_heads")
    return nn.GroupedQueryAttention(
        settings.integer("hidden_size"),
        heads,
        settings.integer("num_key_value_heads", heads),
        settings.head_dim,
        rotary=settings.rotary(fraction=fraction),
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


def _check_parts(settings: Settings, names: Collection[str], feed_forwards: FeedForwards) -> None:
    """**Raises:** `ValueError` for what these layers do not have."""
    always = [("norm_topk_prob", True, True)] if feed_forwards == "experts" else []
    for key, default, wanted in (
        *always,
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


def _table_of(layer: Any, *, delta: Table, experts: Table = EXPERTS) -> Table:
    is_delta = isinstance(layer.attention, nn.GatedDeltaNet)
    is_dense = isinstance(layer.feed_forward, nn.SwiGLU)
    attention = {**_DELTA, **delta} if is_delta else _GATED_ATTENTION
    return {**attention, **(FEED_FORWARD if is_dense else {**experts, **_SHARED_EXPERT})}


QWEN3_5 = Family(
    name="qwen3_5",
    architectures=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    make_layer=partial(make_layer, feed_forwards="dense", fraction=0.25),
    config_of=partial(config_of, feed_forwards="dense"),
    layer=ATTENTION,
    layer_of_kind=partial(_table_of, delta=_DELTA_PROJECTIONS),
    scale_offset=1.0,
    text_prefix="model.language_model.",
    other_parts=("model.visual.",),
    mtp=dataclasses.replace(transformers_table(1), count_key="mtp_num_hidden_layers"),
)
QWEN3_5_MOE = dataclasses.replace(
    QWEN3_5,
    name="qwen3_5_moe",
    architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    make_layer=partial(make_layer, feed_forwards="experts", fraction=0.25),
    config_of=partial(config_of, feed_forwards="experts"),
    layer_of_kind=partial(_table_of, delta=_DELTA_PROJECTIONS, experts=_PACKED_EXPERTS),
)
QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    make_layer=partial(make_layer, feed_forwards="either", fraction=0.25),
    config_of=partial(config_of, feed_forwards="either"),
    layer=ATTENTION,
    layer_of_kind=partial(_table_of, delta=_DELTA_PROJECTIONS_BY_HEAD),
    scale_offset=1.0,
    mtp=dataclasses.replace(
        transformers_table(1), count_key="num_nextn_predict_layers", is_implied=True
    ),
)
