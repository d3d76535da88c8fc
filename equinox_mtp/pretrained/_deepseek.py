"""DeepSeek-V3, R1 and V3.1: latent attention and experts, and depths as further layers."""

from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._settings import Settings, rope_config
from ._tables import Family, Kernel, MTPTable, Table, Tensor

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
}
_FEED_FORWARD: Table = {
    "feed_forward_norm.scale": Tensor("post_attention_layernorm.weight"),
    "feed_forward.gate.kernel": Tensor("mlp.gate_proj.weight", Kernel()),
    "feed_forward.up.kernel": Tensor("mlp.up_proj.weight", Kernel()),
    "feed_forward.down.kernel": Tensor("mlp.down_proj.weight", Kernel()),
    "feed_forward.router.kernel": Tensor("mlp.gate.weight", Kernel()),
    "feed_forward.router.bias": Tensor("mlp.gate.e_score_correction_bias"),
    **{
        f"feed_forward.experts.{part}": Tensor(
            f"mlp.experts.{{expert}}.{part}_proj.weight", Kernel()
        )
        for part in ("gate", "up", "down")
    },
    **{
        f"feed_forward.shared_expert.{part}.kernel": Tensor(
            f"mlp.shared_experts.{part}_proj.weight", Kernel()
        )
        for part in ("gate", "up", "down")
    },
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
    return nn.TransformerDecoderLayer.of(
        attention,
        _feed_forward(settings, index, feed_forward_key),
        attention_norm=nn.RMSNorm(embed_size, epsilon=epsilon),
        feed_forward_norm=nn.RMSNorm(embed_size, epsilon=epsilon),
    )


def _feed_forward(settings: Settings, index: int, key: PRNGKeyArray) -> nn.AbstractFeedForward:
    """SwiGLU in the first layers, and between those with experts if these are not neighbours."""
    embed_size = settings.integer("hidden_size")
    num_dense = settings.integer("first_k_dense_replace", 0, at_least=0)
    if index < num_dense or index % settings.integer("moe_layer_freq", 1):
        return nn.SwiGLU(embed_size, settings.integer("intermediate_size"), key=key)
    router_key, experts_key, shared_key = jax.random.split(key, 3)
    num_experts = settings.integer("n_routed_experts")
    mlp_size = settings.integer("moe_intermediate_size")
    num_shared = settings.integer("n_shared_experts", 0, at_least=0)
    router = nn.Router(
        embed_size,
        num_experts,
        top_k=settings.integer("num_experts_per_tok"),
        scores="sigmoid",
        bias=True,
        num_groups=settings.integer("n_group", 1),
        top_groups=settings.integer("topk_group", 1),
        normalize=settings.flag("norm_topk_prob", True),
        scaling_factor=settings.number("routed_scaling_factor", 1.0),
        key=router_key,
    )
    experts = nn.Experts(num_experts, embed_size, mlp_size, key=experts_key)
    # Several shared experts are stored as one, as wide as all of them.
    shared = nn.SwiGLU(embed_size, num_shared * mlp_size, key=shared_key) if num_shared else None
    return nn.MixtureOfExperts(router, experts, shared_expert=shared)


def _check_parts(settings: Settings) -> None:
    """**Raises:** `ValueError` for what these layers do not have."""
    for key, wanted in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
    ):
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
    num_dense = next((i for i, kind in enumerate(kinds) if kind is not nn.SwiGLU), len(kinds))
    if not all(is_latent) or nn.MixtureOfExperts not in kinds:
        raise ValueError(
            "`model` must have layers of multi-head latent attention, and a mixture of experts in "
            "some of them, for this layout; got "
            f"{type(getattr(layers[-1], 'attention', None)).__name__} and {kinds[-1].__name__}."
        )
    attention, mixture = layers[0].attention, layers[num_dense].feed_forward
    mlp_size = mixture.experts.gate.shape[2]
    dense_size = layers[0].feed_forward.up.kernel.shape[1] if num_dense else mlp_size
    return {
        "vocab_size": decoder.embedding.shape[0],
        "hidden_size": decoder.embedding.shape[1],
        "intermediate_size": dense_size,
        "moe_intermediate_size": mlp_size,
        "num_hidden_layers": len(layers),
        **_attention_config(attention),
        **_experts_config(mixture),
        "first_k_dense_replace": num_dense,
        "moe_layer_freq": 1,
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


def _experts_config(mixture: nn.MixtureOfExperts) -> dict[str, Any]:
    router, shared = mixture.router, mixture.shared_expert
    num_experts, _, mlp_size = mixture.experts.gate.shape
    return {
        "n_routed_experts": num_experts,
        "n_shared_experts": None if shared is None else shared.up.kernel.shape[1] // mlp_size,
        "num_experts_per_tok": router.top_k,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scaling_factor,
        "scoring_func": router.scores,
        "topk_method": "noaux_tc",
    }


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    make_layer=make_layer,
    config_of=config_of,
    layer={**_ATTENTION, **_FEED_FORWARD},
    mtp=MTPTable(
        prefix="model.layers.{layer}.",
        table={
            "embedding_norm.scale": Tensor("enorm.weight"),
            "hidden_state_norm.scale": Tensor("hnorm.weight"),
            "projection_layer.kernel": Tensor("eh_proj.weight", Kernel()),
            "output_norm.scale": Tensor("shared_head.norm.weight"),
        },
        config={
            "concat_order": "embedding_first",
            "input_hidden_state": "after_norm",
            "carried_hidden_state": "after_norm",
            "output_norm": "own",
        },
        any_input=False,
        copies={"embed_tokens.weight": "embedding", "shared_head.head.weight": "head"},
    ),
)
