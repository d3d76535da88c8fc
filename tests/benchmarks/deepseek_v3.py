"""DeepSeek-V3 in this library's layers, in any size (arXiv 2412.19437, §4.2)."""

import dataclasses
import functools

import jax

import equinox_mtp as emtp
from equinox_mtp import nn


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Those of a model, by the names of DeepSeek-V3's configuration; the released one's."""

    embed: int = 7168
    dense_layers: int = 3
    expert_layers: int = 58
    heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    mlp: int = 18_432
    expert_mlp: int = 2048
    experts: int = 256
    top_k: int = 8
    num_groups: int = 8
    top_groups: int = 4
    vocab: int = 129_280
    dtype: str = "bfloat16"

    def divided(self, by: int) -> "Sizes":
        """With features, heads, experts and ids divided by a number."""
        names = ("embed", "heads", "q_lora_rank", "kv_lora_rank", "mlp", "expert_mlp", "vocab")
        smaller = {name: getattr(self, name) // by for name in names}
        experts = max(self.experts // by, self.num_groups)
        return dataclasses.replace(self, **smaller, experts=experts)


def make_model(sizes: Sizes, attention: nn.AttentionFunction) -> emtp.MTPModel:
    """A decoder and one prediction depth, with experts."""
    keys = jax.random.split(jax.random.key(0), 4)
    dense, sparse = (
        make_layer(sizes, attention, has_experts=x, key=keys[0]) for x in (False, True)
    )
    table = jax.random.normal(keys[1], (sizes.vocab, sizes.embed))
    decoder = nn.TransformerDecoder.of(
        [dense] * sizes.dense_layers + [sparse] * sizes.expert_layers,
        embedding=table,
        norm=nn.RMSNorm(sizes.embed),
        head=table,
        dtype=sizes.dtype,
        checkpoint_policy=None,
    )
    block = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig.preset("deepseek_v3", num_depths=1),
        functools.partial(make_layer, sizes, attention, has_experts=True),
        embed_size=sizes.embed,
        key=keys[2],
    )
    return emtp.MTPModel(decoder, block)


def make_layer(
    sizes: Sizes, attention: nn.AttentionFunction, *, has_experts: bool, key: jax.Array
) -> nn.TransformerDecoderLayer:
    """A layer of DeepSeek-V3."""
    keys = jax.random.split(key)
    latent_attention = nn.MultiHeadLatentAttention(
        sizes.embed,
        sizes.heads,
        q_lora_rank=sizes.q_lora_rank,
        kv_lora_rank=sizes.kv_lora_rank,
        qk_nope_head_dim=sizes.qk_nope_head_dim,
        qk_rope_head_dim=sizes.qk_rope_head_dim,
        v_head_dim=sizes.v_head_dim,
        attention=attention,
        key=keys[0],
    )
    return nn.TransformerDecoderLayer.of(
        latent_attention,
        make_mixture(sizes, keys[1])
        if has_experts
        else nn.SwiGLU(sizes.embed, sizes.mlp, key=keys[1]),
        attention_norm=nn.RMSNorm(sizes.embed),
        feed_forward_norm=nn.RMSNorm(sizes.embed),
    )


def make_mixture(sizes: Sizes, key: jax.Array) -> nn.MixtureOfExperts:
    """Its experts, of which a token passes a few and the shared one."""
    keys = jax.random.split(key, 3)
    router = nn.Router(
        sizes.embed,
        sizes.experts,
        top_k=sizes.top_k,
        scores="sigmoid",
        bias=True,
        num_groups=sizes.num_groups,
        top_groups=sizes.top_groups,
        scaling_factor=2.5,
        key=keys[0],
    )
    return nn.MixtureOfExperts(
        router,
        nn.Experts(sizes.experts, sizes.embed, sizes.expert_mlp, key=keys[1]),
        shared_expert=nn.SwiGLU(sizes.embed, sizes.expert_mlp, key=keys[2]),
    )
