"""Families with mixtures of experts over grouped-query attention: Qwen3-MoE and GLM-4.5."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from .. import nn
from ._dense import (
    ATTENTION,
    BIASES,
    FEED_FORWARD,
    OUT_BIAS,
    QUERY_KEY_NORMS,
    attention_config,
    layer_of,
    make_attention,
    make_swiglu,
)
from ._settings import Settings
from ._steps import Kernel
from ._tables import Family, MTPTable, Table, Tensor

EXPERTS: Table = {
    "feed_forward.router.kernel": Tensor("mlp.gate.weight", Kernel()),
    "feed_forward.experts.gate": Tensor("mlp.experts.{expert}.gate_proj.weight", Kernel()),
    "feed_forward.experts.up": Tensor("mlp.experts.{expert}.up_proj.weight", Kernel()),
    "feed_forward.experts.down": Tensor("mlp.experts.{expert}.down_proj.weight", Kernel()),
}
CORRECTED_ROUTER: Table = {
    "feed_forward.router.bias": Tensor("mlp.gate.e_score_correction_bias"),
}
SHARED_EXPERTS: Table = {
    f"feed_forward.shared_expert.{part}.kernel": Tensor(
        f"mlp.shared_experts.{part}_proj.weight", Kernel()
    )
    for part in ("gate", "up", "down")
}


class MixtureKeys(NamedTuple):
    """The keys of a configuration that families name differently."""

    experts: str
    shared_experts: str
    scores: str


_DEEPSEEK_KEYS = MixtureKeys("n_routed_experts", "n_shared_experts", "scoring_func")


def make_corrected_mixture(
    settings: Settings, key: PRNGKeyArray, keys: MixtureKeys = _DEEPSEEK_KEYS
) -> nn.MixtureOfExperts:
    """A mixture as DeepSeek-V3 has it: sigmoids, bias correction, groups, shared experts."""
    router_key, experts_key, shared_key = jax.random.split(key, 3)
    embed_size, mlp_size = (
        settings.integer(name) for name in ("hidden_size", "moe_intermediate_size")
    )
    num_experts = settings.integer(keys.experts)
    num_shared = settings.integer(keys.shared_experts, 0, at_least=0)
    for name, wanted in ((keys.scores, "sigmoid"), ("topk_method", "noaux_tc")):
        if settings.get(name, wanted) != wanted:
            raise settings.error(name, f"{wanted!r}", settings.get(name))
    with _keys_in_errors(keys):
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
    shared = nn.SwiGLU(embed_size, mlp_size * num_shared, key=shared_key) if num_shared else None
    return nn.MixtureOfExperts(router, experts, shared_expert=shared)


@contextlib.contextmanager
def _keys_in_errors(keys: MixtureKeys) -> Iterator[None]:
    """Errors of a router's arguments name the keys that they come from."""
    names = {
        "num_groups": "n_group",
        "top_groups": "topk_group",
        "top_k": "num_experts_per_tok",
        "num_experts": keys.experts,
    }
    try:
        yield
    except ValueError as error:
        message = str(error)
        for argument, key in names.items():
            message = message.replace(f"`{argument}`", f"`{key}`")
        raise ValueError(message) from None


def corrected_mixture_config(
    layers: list[Any], keys: MixtureKeys = _DEEPSEEK_KEYS
) -> dict[str, Any]:
    """The keys of `make_corrected_mixture`, and of the dense layers before, from all layers."""
    mixtures = _mixtures(layers)
    first = next(mixture for mixture in mixtures if mixture is not None)
    router, mlp_size = first.router, first.experts.gate.shape[2]
    shared = first.shared_expert
    num_dense = next(index for index, mixture in enumerate(mixtures) if mixture is not None)
    return {
        "intermediate_size": _dense_size(layers, mlp_size),
        "moe_intermediate_size": mlp_size,
        "first_k_dense_replace": num_dense,
        keys.experts: router.num_experts,
        keys.shared_experts: 0 if shared is None else shared.up.kernel.shape[1] // mlp_size,
        "num_experts_per_tok": router.top_k,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scaling_factor,
    }


def has_experts(decoder: nn.TransformerDecoder) -> bool:
    """Whether one of a decoder's layers has a mixture of experts."""
    return any(mixture is not None for mixture in _mixtures(_layers(decoder)))


def _layers(decoder: nn.TransformerDecoder) -> list[Any]:
    return [decoder.layer(index) for index in range(decoder.num_layers)]


def _mixtures(layers: list[Any]) -> list[nn.MixtureOfExperts | None]:
    parts = [getattr(layer, "feed_forward", None) for layer in layers]
    return [part if isinstance(part, nn.MixtureOfExperts) else None for part in parts]


def _dense_size(layers: list[Any], otherwise: int) -> int:
    """The inner features of the dense layers; any number does where there are none."""
    parts = [layer.feed_forward for layer in layers]
    sizes = [part.up.kernel.shape[1] for part in parts if isinstance(part, nn.SwiGLU)]
    return sizes[0] if sizes else otherwise


def checked_layers(decoder: nn.TransformerDecoder) -> list[Any]:
    """**Raises:** `ValueError` for layers that these families do not have."""
    layers = _layers(decoder)
    for layer in layers:
        attention = getattr(layer, "attention", None)
        feed_forward = getattr(layer, "feed_forward", None)
        is_known = isinstance(feed_forward, nn.SwiGLU | nn.MixtureOfExperts)
        if not (isinstance(attention, nn.GroupedQueryAttention) and is_known):
            raise ValueError(
                "`model` must have layers of grouped-query attention, and of SwiGLU or a mixture "
                f"of experts, for this layout; got a {type(attention).__name__} and a "
                f"{type(feed_forward).__name__}."
            )
    if all(mixture is None for mixture in _mixtures(layers)):
        raise ValueError(
            "`model` must have a mixture of experts in one of its layers for this layout; got "
            "dense layers alone. Take 'llama', 'qwen2' or 'qwen3'."
        )
    return layers


# Qwen3-MoE


def _make_qwen3_layer(
    settings: Settings, index: int, names: Collection[str], *, key: PRNGKeyArray
) -> nn.TransformerDecoderLayer:
    attention_key, feed_forward_key = jax.random.split(key)
    attention = make_attention(
        settings, index, names, biases="found", has_norm=True, has_window=True, key=attention_key
    )
    dense = settings.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(number) is int for number in dense):
        raise settings.error("mlp_only_layers", "a list of numbers of layers", dense)
    is_sparse = (index + 1) % settings.integer("decoder_sparse_step", 1) == 0
    if index in dense or not is_sparse:
        feed_forward: nn.AbstractFeedForward = make_swiglu(settings, feed_forward_key)
    else:
        feed_forward = _make_qwen3_mixture(settings, feed_forward_key)
    return layer_of(settings, attention, feed_forward)


def _make_qwen3_mixture(settings: Settings, key: PRNGKeyArray) -> nn.MixtureOfExperts:
    router_key, experts_key = jax.random.split(key)
    embed_size, num_experts = settings.integer("hidden_size"), settings.integer("num_experts")
    router = nn.Router(
        embed_size,
        num_experts,
        top_k=settings.integer("num_experts_per_tok", 8),
        normalize=settings.flag("norm_topk_prob", False),
        key=router_key,
    )
    mlp_size = settings.integer("moe_intermediate_size")
    return nn.MixtureOfExperts(
        router, nn.Experts(num_experts, embed_size, mlp_size, key=experts_key)
    )


def _qwen3_config(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    layers = checked_layers(decoder)
    mixtures = _mixtures(layers)
    first = next(mixture for mixture in mixtures if mixture is not None)
    mlp_size = first.experts.gate.shape[2]
    return {
        "intermediate_size": _dense_size(layers, mlp_size),
        "moe_intermediate_size": mlp_size,
        "num_experts": first.router.num_experts,
        "num_experts_per_tok": first.router.top_k,
        "norm_topk_prob": first.router.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, mixture in enumerate(mixtures) if mixture is None],
        **attention_config(decoder, layers),
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    make_layer=_make_qwen3_layer,
    config_of=_qwen3_config,
    layer={**ATTENTION, **BIASES, **OUT_BIAS, **QUERY_KEY_NORMS, **FEED_FORWARD, **EXPERTS},
)

# GLM-4.5


def _make_glm4_layer(
    settings: Settings, index: int, names: Collection[str], *, key: PRNGKeyArray
) -> nn.TransformerDecoderLayer:
    attention_key, feed_forward_key = jax.random.split(key)
    attention = make_attention(
        settings,
        index,
        names,
        biases="said_but_output",
        has_norm=settings.flag("use_qk_norm", False),
        has_window=False,
        partial_rotary=0.5,
        key=attention_key,
    )
    if index < settings.integer("first_k_dense_replace", 1, at_least=0):
        feed_forward: nn.AbstractFeedForward = make_swiglu(settings, feed_forward_key)
    else:
        feed_forward = make_corrected_mixture(settings, feed_forward_key)
    return layer_of(settings, attention, feed_forward)


def _glm4_config(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    layers = checked_layers(decoder)
    return {
        **corrected_mixture_config(layers),
        "partial_rotary_factor": 1.0,
        **attention_config(decoder, layers),
        "use_qk_norm": layers[0].attention.query_norm is not None,
    }


NEXTN_DEPTHS = MTPTable(
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
        # As transformers and SGLang run GLM; vLLM carries the hidden state before the norm.
        "carried_hidden_state": "after_norm",
        "output_norm": "own",
    },
    copies={"embed_tokens.weight": "embedding", "shared_head.head.weight": "head"},
)
"""Depths of DeepSeek-V3 and GLM-4.5, behind the main model's layers."""

GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    make_layer=_make_glm4_layer,
    config_of=_glm4_config,
    layer={
        **ATTENTION,
        **BIASES,
        **QUERY_KEY_NORMS,
        **FEED_FORWARD,
        **EXPERTS,
        **CORRECTED_ROUTER,
        **SHARED_EXPERTS,
    },
    mtp=NEXTN_DEPTHS,
)
