"""The dense families: Llama, Qwen2, Qwen3, MiMo. They differ in biases and norms of attention."""

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._settings import Settings, rope_config
from ._tables import Family, Flat, Kernel, MTPTable, Table, Tensor

_LAYER: Table = {
    "attention_norm.scale": Tensor("input_layernorm.weight"),
    "attention.query_kernel": Tensor("self_attn.q_proj.weight", Kernel()),
    "attention.key_kernel": Tensor("self_attn.k_proj.weight", Kernel()),
    "attention.value_kernel": Tensor("self_attn.v_proj.weight", Kernel()),
    "attention.out_kernel": Tensor("self_attn.o_proj.weight", Kernel(num_inputs=2)),
    "feed_forward_norm.scale": Tensor("post_attention_layernorm.weight"),
    "feed_forward.gate.kernel": Tensor("mlp.gate_proj.weight", Kernel()),
    "feed_forward.up.kernel": Tensor("mlp.up_proj.weight", Kernel()),
    "feed_forward.down.kernel": Tensor("mlp.down_proj.weight", Kernel()),
}
_BIASES: Table = {
    "attention.query_bias": Tensor("self_attn.q_proj.bias", Flat()),
    "attention.key_bias": Tensor("self_attn.k_proj.bias", Flat()),
    "attention.value_bias": Tensor("self_attn.v_proj.bias", Flat()),
}
_NORMS: Table = {
    "attention.query_norm.scale": Tensor("self_attn.q_norm.weight"),
    "attention.key_norm.scale": Tensor("self_attn.k_norm.weight"),
}


def make_layer(
    settings: Settings,
    index: int,
    names: Collection[str],
    *,
    has_norm: bool,
    key: PRNGKeyArray,
) -> nn.TransformerDecoderLayer:
    """A layer of grouped-query attention and SwiGLU."""
    activation = settings.get("hidden_act", "silu")
    if activation != "silu":
        raise settings.error("hidden_act", "'silu'", activation)
    attention_key, feed_forward_key = jax.random.split(key)
    embed_size, epsilon = settings.integer("hidden_size"), settings.number("rms_norm_eps", 1e-6)
    heads = settings.integer("num_attention_heads")
    attention = nn.GroupedQueryAttention(
        embed_size,
        heads,
        settings.integer("num_key_value_heads", heads),
        settings.head_dim,
        rotary=settings.rotary(),
        bias=any(name.endswith("self_attn.q_proj.bias") for name in names),
        norm_epsilon=epsilon if has_norm else None,
        window=_window(settings, index),
        key=attention_key,
    )
    return nn.TransformerDecoderLayer.of(
        attention,
        nn.SwiGLU(embed_size, settings.integer("intermediate_size"), key=feed_forward_key),
        attention_norm=nn.RMSNorm(embed_size, epsilon=epsilon),
        feed_forward_norm=nn.RMSNorm(embed_size, epsilon=epsilon),
    )


def _window(settings: Settings, index: int) -> int | None:
    """The layers from `max_window_layers` on have a window, or those of `layer_types`."""
    kinds = settings.get("layer_types")
    if isinstance(kinds, list):
        kind = kinds[index] if index < len(kinds) else "full_attention"
        if kind not in ("full_attention", "sliding_attention"):
            raise settings.error("layer_types", "full_attention or sliding_attention", kind)
        return settings.integer("sliding_window") if kind == "sliding_attention" else None
    if not settings.flag("use_sliding_window", False) or settings.get("sliding_window") is None:
        return None
    first = settings.integer("max_window_layers", 0, at_least=0)
    return settings.integer("sliding_window") if index >= first else None


def config_of(decoder: nn.TransformerDecoder, *, has_bias: bool, has_norm: bool) -> dict[str, Any]:
    """The keys of `config.json` that describe a decoder of these layers.

    **Raises:** `ValueError` if its layers are of other kinds, or differ in more than a window.
    """
    layers: list[Any] = [decoder.layer(index) for index in range(decoder.num_layers)]
    for layer in layers:
        attention, feed_forward = (
            getattr(layer, "attention", None),
            getattr(layer, "feed_forward", None),
        )
        is_dense = isinstance(attention, nn.GroupedQueryAttention)
        if not (is_dense and isinstance(feed_forward, nn.SwiGLU)):
            raise ValueError(
                "`model` must have layers of grouped-query attention and SwiGLU for this layout; "
                f"got a {type(attention).__name__} and a {type(feed_forward).__name__}."
            )
        for what, has, wanted in (
            ("biases", attention.query_bias is not None, has_bias),
            ("query and key norms", attention.query_norm is not None, has_norm),
        ):
            if has and not wanted:
                raise ValueError(
                    f"`layout` has no {what} in attention, and `model` has. Take the layout of "
                    "the folder it came from."
                )
            if wanted and not has and what != "biases":
                raise ValueError(
                    f"`layout` has {what} in attention, and `model` has none. Take the layout of "
                    "the folder it came from."
                )
    first = layers[0].attention
    if any(layer.attention.rotary != first.rotary for layer in layers):
        raise ValueError("`model` must have the same rotary embedding in all layers; it differs.")
    embed_size, heads, head_dim = first.query_kernel.shape
    windows = [layer.attention.window for layer in layers]
    config = {
        "vocab_size": decoder.embedding.shape[0],
        "hidden_size": embed_size,
        "intermediate_size": layers[0].feed_forward.up.kernel.shape[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": first.key_kernel.shape[1],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": layers[0].attention_norm.epsilon,
        "attention_bias": first.query_bias is not None,
        "tie_word_embeddings": decoder.head is None,
        "use_cache": True,
        **rope_config(first.rotary, head_dim),
    }
    if any(windows):
        sizes = {window for window in windows if window}
        if len(sizes) > 1:
            raise ValueError(f"`model` must have windows of one size; got {sorted(sizes)}.")
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        config |= {"sliding_window": sizes.pop(), "use_sliding_window": True, "layer_types": kinds}
    return config


MTP_LAYER: Table = {
    "embedding_norm.scale": Tensor("token_layernorm.weight"),
    "hidden_state_norm.scale": Tensor("hidden_layernorm.weight"),
    "projection_layer.kernel": Tensor("input_proj.weight", Kernel()),
    "output_norm.scale": Tensor("final_layernorm.weight"),
}

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    make_layer=partial(make_layer, has_norm=False),
    config_of=partial(config_of, has_bias=False, has_norm=False),
    layer=_LAYER,
)
QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    make_layer=partial(make_layer, has_norm=False),
    config_of=partial(config_of, has_bias=True, has_norm=False),
    layer={**_LAYER, **_BIASES},
    needs_biases=True,
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    make_layer=partial(make_layer, has_norm=True),
    config_of=partial(config_of, has_bias=True, has_norm=True),
    layer={**_LAYER, **_BIASES, **_NORMS},
)
MIMO = Family(
    name="mimo",
    architectures=("MiMoForCausalLM",),
    make_layer=partial(make_layer, has_norm=False),
    config_of=partial(config_of, has_bias=True, has_norm=False),
    layer={**_LAYER, **_BIASES},
    needs_biases=True,
    mtp=MTPTable(
        prefix="model.mtp_layers.{depth}.",
        table=MTP_LAYER,
        config={
            "concat_order": "hidden_first",
            # As vLLM runs it; SGLang takes the hidden state after the norm.
            "input_hidden_state": "before_norm",
            "carried_hidden_state": "after_norm",
            "output_norm": "own",
        },
    ),
)
