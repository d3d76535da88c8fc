"""The `config.json` of Qwen3.5 and Qwen3-Next, from a decoder: the inverse of `_hybrid.py`."""

from typing import Any, Literal

from .. import nn
from ._settings import rope_config

FeedForwards = Literal["dense", "experts", "either"]
"""The feed-forward networks of a family: all dense, all mixtures of experts, or some of each."""


def config_of(decoder: nn.TransformerDecoder, *, feed_forwards: FeedForwards) -> dict[str, Any]:
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
        **_FEED_FORWARDS[feed_forwards](layers),
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


def _experts_config(layers: list[Any]) -> dict[str, Any]:
    # Probabilities are always normalized: readers know no `norm_topk_prob`.
    sizes = _mixture_sizes(_first(layers, "feed_forward", nn.MixtureOfExperts))
    return {"model_type": "qwen3_5_moe_text", "attn_output_gate": True, **sizes}


def _either_config(layers: list[Any]) -> dict[str, Any]:
    mixture = _first(layers, "feed_forward", nn.MixtureOfExperts)
    dense = [i for i, x in enumerate(layers) if not isinstance(x.feed_forward, type(mixture))]
    mlp_size = layers[dense[0]].feed_forward.up.kernel.shape[1] if dense else 1
    return {
        "intermediate_size": mlp_size,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "norm_topk_prob": mixture.router.normalize,
        **_mixture_sizes(mixture),
    }


def _mixture_sizes(mixture: nn.MixtureOfExperts) -> dict[str, Any]:
    if mixture.shared_expert is None:
        raise ValueError("`model` must have a shared expert for this layout; got none.")
    return {
        "num_experts": mixture.router.num_experts,
        "num_experts_per_tok": mixture.router.top_k,
        "moe_intermediate_size": mixture.experts.up.shape[2],
        "shared_expert_intermediate_size": mixture.shared_expert.up.kernel.shape[1],
    }


_FEED_FORWARDS = {"dense": _dense_config, "experts": _experts_config, "either": _either_config}
