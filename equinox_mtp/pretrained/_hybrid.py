"""Qwen3.5 and Qwen3-Next: Gated DeltaNet in most layers, gated attention in the others."""

import dataclasses
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._dense import ATTENTION, FEED_FORWARD, QUERY_KEY_NORMS, layer_of, make_swiglu
from ._moe import EXPERTS
from ._settings import Settings, rope_config
from ._tables import Convolution, Family, Kernel, Part, Table, Tensor
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
_MIXTURE: Table = {
    **EXPERTS,
    **{
        f"feed_forward.shared_expert.{part}.kernel": Tensor(
            f"mlp.shared_expert.{part}_proj.weight", Kernel()
        )
        for part in ("gate", "up", "down")
    },
    "feed_forward.shared_gate.kernel": Tensor("mlp.shared_expert_gate.weight", Kernel()),
}


def make_layer(
    settings: Settings,
    index: int,
    names: Collection[str],
    *,
    has_mixture: bool,
    fraction: float,
    key: PRNGKeyArray,
) -> nn.TransformerDecoderLayer:
    """A layer of the kind that `layer_types` says; depths, which count on, have full attention.

    `has_mixture` and `fraction`, of the features that are rotated by default, are a family's.
    """
    _check_parts(settings, names)
    attention_key, feed_forward_key = jax.random.split(key)
    if _is_full(settings, index):
        attention = _attention(settings, fraction, attention_key)
    else:
        attention = _delta(settings, attention_key)
    is_mixture = has_mixture and _is_mixture(settings, index)
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


def config_of(decoder: nn.TransformerDecoder, *, has_mixture: bool) -> dict[str, Any]:
    """The keys of `config.json` that describe a decoder, from its first layer of each kind.

    `save` compares what these keys give with the whole model.

    **Raises:** `ValueError` if its layers are of other kinds.
    """
    layers: list[Any] = [decoder.layer(index) for index in range(decoder.num_layers)]
    full = _first(layers, "attention", nn.GroupedQueryAttention)
    delta = _first(layers, "attention", nn.GatedDeltaNet)
    embed_size, heads, head_dim = full.query_kernel.shape
    names = {True: "full_attention", False: "linear_attention"}
    kinds = [names[isinstance(x.attention, nn.GroupedQueryAttention)] for x in layers]
    return {
        "vocab_size": decoder.embedding.shape[0],
        "hidden_size": embed_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": full.key_kernel.shape[1],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": layers[0].attention_norm.epsilon,
        "attention_bias": False,
        "tie_word_embeddings": decoder.head is None,
        "use_cache": True,
        "layer_types": kinds,
        "linear_conv_kernel_dim": delta.key_convolution.shape[0],
        "linear_key_head_dim": delta.key_kernel.shape[2],
        "linear_value_head_dim": delta.value_kernel.shape[2],
        "linear_num_key_heads": delta.key_kernel.shape[1],
        "linear_num_value_heads": delta.value_kernel.shape[1],
        **_rope_config(full.rotary, head_dim),
        **(_mixture_config(layers) if has_mixture else _dense_config(layers)),
    }


def _first(layers: list[Any], part: str, kind: type) -> Any:
    """The part of the first layer that has one of a kind."""
    found = [x for x in (getattr(layer, part, None) for layer in layers) if isinstance(x, kind)]
    if not found:
        others = sorted({type(getattr(layer, part, None)).__name__ for layer in layers})
        raise ValueError(
            f"`model` must have a layer with a {kind.__name__} for this layout; got "
            f"{', '.join(others)}."
        )
    return found[0]


def _rope_config(rotary: nn.Rotary, head_dim: int) -> dict[str, Any]:
    """In the older form and the newer one."""
    older = {"partial_rotary_factor": 1.0, **rope_config(rotary, head_dim)}
    newer = {"rope_type": "default", **(older["rope_scaling"] or {})}
    newer |= {name: older[name] for name in ("rope_theta", "partial_rotary_factor")}
    return {**older, "rope_parameters": newer}


def _dense_config(layers: list[Any]) -> dict[str, Any]:
    feed_forward = _first(layers, "feed_forward", nn.SwiGLU)
    mlp_size = feed_forward.up.kernel.shape[1]
    # The name of the text model alone.
    return {"model_type": "qwen3_5_text", "intermediate_size": mlp_size, "attn_output_gate": True}


def _mixture_config(layers: list[Any]) -> dict[str, Any]:
    mixture = _first(layers, "feed_forward", nn.MixtureOfExperts)
    if mixture.shared_expert is None:
        raise ValueError("`model` must have a shared expert for this layout; got none.")
    dense = [i for i, x in enumerate(layers) if not isinstance(x.feed_forward, type(mixture))]
    mlp_size = layers[dense[0]].feed_forward.up.kernel.shape[1] if dense else 1
    return {
        "intermediate_size": mlp_size,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "num_experts": mixture.router.num_experts,
        "num_experts_per_tok": mixture.router.top_k,
        "norm_topk_prob": mixture.router.normalize,
        "moe_intermediate_size": mixture.experts.up.shape[2],
        "shared_expert_intermediate_size": mixture.shared_expert.up.kernel.shape[1],
    }


def _table_of(layer: Any, *, delta: Table) -> Table:
    is_delta = isinstance(layer.attention, nn.GatedDeltaNet)
    is_dense = isinstance(layer.feed_forward, nn.SwiGLU)
    attention = {**_DELTA, **delta} if is_delta else _GATED_ATTENTION
    return {**attention, **(FEED_FORWARD if is_dense else _MIXTURE)}


QWEN3_5 = Family(
    name="qwen3_5",
    architectures=("Qwen3_5ForCausalLM",),
    make_layer=partial(make_layer, has_mixture=False, fraction=0.25),
    config_of=partial(config_of, has_mixture=False),
    layer=ATTENTION,
    layer_of_kind=partial(_table_of, delta=_DELTA_PROJECTIONS),
    scale_offset=1.0,
    mtp=dataclasses.replace(transformers_table(1), count_key="mtp_num_hidden_layers"),
)
QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    make_layer=partial(make_layer, has_mixture=True, fraction=0.25),
    config_of=partial(config_of, has_mixture=True),
    layer=ATTENTION,
    layer_of_kind=partial(_table_of, delta=_DELTA_PROJECTIONS_BY_HEAD),
    scale_offset=1.0,
    mtp=dataclasses.replace(
        transformers_table(1), count_key="num_nextn_predict_layers", is_implied=True
    ),
)
