"""The dense families: Llama, Qwen2, Qwen3, MiMo. They differ in biases and norms of attention."""

from collections.abc import Collection
from functools import partial
from typing import Any, Literal

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._settings import Settings, rope_config
from ._steps import Flat, Kernel
from ._tables import Family, MTPTable, Table, Tensor

ATTENTION: Table = {
    "attention_norm.scale": Tensor("input_layernorm.weight"),
    "attention.query_kernel": Tensor("self_attn.q_proj.weight", Kernel()),
    "attention.key_kernel": Tensor("self_attn.k_proj.weight", Kernel()),
    "attention.value_kernel": Tensor("self_attn.v_proj.weight", Kernel()),
    "attention.out_kernel": Tensor("self_attn.o_proj.weight", Kernel(num_inputs=2)),
    "feed_forward_norm.scale": Tensor("post_attention_layernorm.weight"),
}
FEED_FORWARD: Table = {
    "feed_forward.gate.kernel": Tensor("mlp.gate_proj.weight", Kernel()),
    "feed_forward.up.kernel": Tensor("mlp.up_proj.weight", Kernel()),
    "feed_forward.down.kernel": Tensor("mlp.down_proj.weight", Kernel()),
}
BIASES: Table = {
    "attention.query_bias": Tensor("self_attn.q_proj.bias", Flat()),
    "attention.key_bias": Tensor("self_attn.k_proj.bias", Flat()),
    "attention.value_bias": Tensor("self_attn.v_proj.bias", Flat()),
}
OUT_BIAS: Table = {"attention.out_bias": Tensor("self_attn.o_proj.bias")}
QUERY_KEY_NORMS: Table = {
    "attention.query_norm.scale": Tensor("self_attn.q_norm.weight"),
    "attention.key_norm.scale": Tensor("self_attn.k_norm.weight"),
}

_LAYER: Table = {**ATTENTION, **FEED_FORWARD}

Biases = Literal["always", "said", "said_but_output", "found"]
"""Which biases attention has in a family: queries, keys and values always; all, the output's too or
not, if `attention_bias` says so; or those that there are tensors of."""


def make_layer(
    settings: Settings,
    index: int,
    names: Collection[str],
    *,
    biases: Biases,
    has_norm: bool,
    has_window: bool,
    interleaved: bool = False,
    key: PRNGKeyArray,
) -> nn.TransformerDecoderLayer:
    """A layer of grouped-query attention and SwiGLU.

    `biases`, `has_norm` and `has_window` say what a family has, and `interleaved` that neighbours
    are rotated together.
    """
    attention_key, feed_forward_key = jax.random.split(key)
    attention = make_attention(
        settings,
        index,
        names,
        biases=biases,
        has_norm=has_norm,
        has_window=has_window,
        interleaved=interleaved,
        key=attention_key,
    )
    return layer_of(settings, attention, make_swiglu(settings, feed_forward_key))


def layer_of(
    settings: Settings, attention: nn.AbstractAttention, feed_forward: nn.AbstractFeedForward
) -> nn.TransformerDecoderLayer:
    """A layer of these parts, with a norm in front of each."""
    embed_size, epsilon = settings.integer("hidden_size"), settings.number("rms_norm_eps", 1e-6)
    return nn.TransformerDecoderLayer.of(
        attention,
        feed_forward,
        attention_norm=nn.RMSNorm(embed_size, epsilon=epsilon),
        feed_forward_norm=nn.RMSNorm(embed_size, epsilon=epsilon),
    )


def make_swiglu(settings: Settings, key: PRNGKeyArray) -> nn.SwiGLU:
    """The dense feed-forward network."""
    embed_size, mlp_size = (settings.integer(x) for x in ("hidden_size", "intermediate_size"))
    return nn.SwiGLU(embed_size, mlp_size, key=key)


def make_attention(
    settings: Settings,
    index: int,
    names: Collection[str],
    *,
    biases: Biases,
    has_norm: bool,
    has_window: bool,
    partial_rotary: float | None = None,
    interleaved: bool = False,
    key: PRNGKeyArray,
) -> nn.GroupedQueryAttention:
    """Grouped-query attention; see `make_layer`.

    `partial_rotary` is the default of `partial_rotary_factor`; `None` for families without it.
    """
    has_bias, has_out_bias = _biases(settings, names, biases)
    _check_parts(settings, names)
    embed_size, epsilon = settings.integer("hidden_size"), settings.number("rms_norm_eps", 1e-6)
    heads = settings.integer("num_attention_heads")
    fraction = 1.0 if partial_rotary is None else partial_rotary
    rotary = settings.rotary(interleaved=interleaved, fraction=fraction)
    if rotary.size is not None and partial_rotary is None:
        raise settings.error("partial_rotary_factor", "1 in this family", rotary.size)
    window = _window(settings, index)
    if window is not None and not has_window:
        raise settings.error("use_sliding_window", "false in this family", True)
    return nn.GroupedQueryAttention(
        embed_size,
        heads,
        settings.integer("num_key_value_heads", heads),
        settings.head_dim,
        rotary=rotary,
        bias=has_bias,
        out_bias=has_out_bias,
        norm_epsilon=epsilon if has_norm else None,
        window=window,
        key=key,
    )


def _biases(settings: Settings, names: Collection[str], biases: Biases) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and whether the output has one."""
    found, found_out = (
        any(name.endswith(f"self_attn.{part}_proj.bias") for name in names) for part in "qo"
    )
    if biases == "found":
        return found, found_out
    said = settings.flag("attention_bias", False)
    if biases == "said":
        if (found or found_out) and not said:
            raise settings.error("attention_bias", "true: attention has biases here", said)
        return said, said
    if biases == "said_but_output" and found and not said:
        raise settings.error("attention_bias", "true: attention has biases here", said)
    if found_out:
        raise settings.error(
            "attention_bias",
            "left out, and tensors `self_attn.o_proj.bias` with it: this family's attention output "
            "has no bias",
            said,
        )
    return said or biases == "always", False


def _check_parts(settings: Settings, names: Collection[str]) -> None:
    """**Raises:** `ValueError` for what these layers do not have."""
    activation = settings.get("hidden_act", "silu")
    if activation != "silu":
        raise settings.error("hidden_act", "'silu'", activation)
    if any(name.endswith("_proj.bias") and "mlp." in name for name in names):
        raise settings.error(
            "mlp_bias", "false: only attention has biases here", settings.get("mlp_bias")
        )


def _window(settings: Settings, index: int) -> int | None:
    """The window of a layer; depths, which count on, have none unless `mtp_layer_types` says so."""
    num_layers = settings.integer("num_hidden_layers")
    is_depth = index >= num_layers
    kinds = settings.get("mtp_layer_types" if is_depth else "layer_types")
    if isinstance(kinds, list):
        index -= num_layers if is_depth else 0
        kind = kinds[index] if index < len(kinds) else "full_attention"
        if kind not in ("full_attention", "sliding_attention"):
            raise settings.error("layer_types", "full_attention or sliding_attention", kind)
        is_sliding = kind == "sliding_attention"
    else:
        is_sliding = not is_depth and settings.flag("use_sliding_window", False)
        # The defaults are those of transformers.
        is_sliding = is_sliding and index >= settings.integer("max_window_layers", 28, at_least=0)
    if not is_sliding or settings.config.get("sliding_window", 4096) is None:
        return None
    return settings.integer("sliding_window", 4096)


def config_of(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    """The keys of `config.json` that describe a dense decoder, taken from its first layer.

    `save` compares what these keys give with the whole model.

    **Raises:** `ValueError` if its layers are of other kinds.
    """
    layers: list[Any] = [decoder.layer(index) for index in range(decoder.num_layers)]
    for layer in layers:
        attention = getattr(layer, "attention", None)
        feed_forward = getattr(layer, "feed_forward", None)
        is_dense = isinstance(attention, nn.GroupedQueryAttention)
        if not (is_dense and isinstance(feed_forward, nn.SwiGLU)):
            raise ValueError(
                "`model` must have layers of grouped-query attention and SwiGLU for this layout; "
                f"got a {type(attention).__name__} and a {type(feed_forward).__name__}."
            )
    mlp_size = layers[0].feed_forward.up.kernel.shape[1]
    return {"intermediate_size": mlp_size, **attention_config(decoder, layers)}


def attention_config(decoder: nn.TransformerDecoder, layers: list[Any]) -> dict[str, Any]:
    """The keys for everything but the feed-forward networks."""
    first = layers[0].attention
    embed_size, heads, head_dim = first.query_kernel.shape
    rotaries = [layer.attention.rotary for layer in layers]
    config = {
        "vocab_size": decoder.embedding.shape[0],
        "hidden_size": embed_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": first.key_kernel.shape[1],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": layers[0].attention_norm.epsilon,
        "attention_bias": first.query_bias is not None or first.out_bias is not None,
        "tie_word_embeddings": decoder.head is None,
        "use_cache": True,
        **rope_config(next(filter(None, rotaries), nn.Rotary()), head_dim),
    }
    windows = [layer.attention.window for layer in layers]
    if any(windows):
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        window = max(window for window in windows if window)
        config |= {"sliding_window": window, "use_sliding_window": True, "layer_types": kinds}
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
    make_layer=partial(make_layer, biases="said", has_norm=False, has_window=False),
    config_of=config_of,
    layer={**_LAYER, **BIASES, **OUT_BIAS},
)
QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    make_layer=partial(make_layer, biases="always", has_norm=False, has_window=True),
    config_of=config_of,
    layer={**_LAYER, **BIASES},
    needs_biases=True,
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    make_layer=partial(make_layer, biases="found", has_norm=True, has_window=True),
    config_of=config_of,
    layer={**_LAYER, **BIASES, **OUT_BIAS, **QUERY_KEY_NORMS},
)
MIMO = Family(
    name="mimo",
    architectures=("MiMoForCausalLM",),
    make_layer=partial(make_layer, biases="always", has_norm=False, has_window=True),
    config_of=config_of,
    layer={**_LAYER, **BIASES},
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
