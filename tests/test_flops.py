"""Operations of a token against XLA's own count of a compiled step, and against sums by hand.

XLA counts the body of a loop once (`cost_analysis`, JAX 0.10.2 on CPU), so here loops are compiled
unrolled. Attention takes each query to the keys that it sees, and to no others, as is counted; the
library's own computes more pairs, in the tiles that the mask cuts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_rejects
from hlo import compile_for, products
from jax import lax
from jaxtyping import Array, PRNGKeyArray

import equinox_mtp as emtp
from equinox_mtp import nn
from equinox_mtp.sharding import DEFAULT_RULES, make_mesh, use_rules

BATCH, SEQ, EMBED, MLP, VOCAB = 8, 8, 192, 320, 512
KEYS = jax.random.split(jax.random.key(0), 9)


def seen_attention(
    query: Array, key: Array, value: Array, *, scale: Any = None, window: Any = None, **_: Any
) -> Array:
    """Causal attention that multiplies no pair of which the query does not see the key."""
    groups, out = query.shape[2] // key.shape[2], []
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    for i in range(query.shape[1]):
        first = 0 if window is None else max(0, i + 1 - window)
        seen = slice(first, i + 1)
        logits = scale * jnp.einsum("bhd,bkhd->bhk", query[:, i], key[:, seen])
        weights = jax.nn.softmax(logits)
        out.append(jnp.einsum("bhk,bkhd->bhd", weights, value[:, seen]))
    return jnp.stack(out, axis=1)


def grouped_query(*, kv_heads: int = 2, **options: Any) -> nn.AbstractAttention:
    options = {"attention": seen_attention, "key": KEYS[0], **options}
    return nn.GroupedQueryAttention(EMBED, 4, kv_heads, 24, **options)


def latent(q_lora_rank: int | None) -> nn.AbstractAttention:
    return nn.MultiHeadLatentAttention(
        EMBED,
        4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=32,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=16,
        attention=seen_attention,
        key=KEYS[1],
    )


def swiglu() -> nn.AbstractFeedForward:
    return nn.SwiGLU(EMBED, MLP, key=KEYS[2])


def mixture() -> nn.AbstractFeedForward:
    """Of eight experts, of which the first two get all tokens, by their bias."""
    router = nn.Router(EMBED, 8, top_k=2, scores="sigmoid", bias=True, key=KEYS[3])
    router = eqx.tree_at(lambda r: r.bias, router, jnp.where(jnp.arange(8) < 2, 9.0, 0.0))
    return nn.MixtureOfExperts(
        router,
        nn.Experts(8, EMBED, MLP, key=KEYS[4]),
        shared_expert=nn.SwiGLU(EMBED, 64, key=KEYS[5]),
        shared_gate=nn.Linear(EMBED, 1, key=KEYS[6]),
    )


PARTS: dict[str, tuple[Callable[[], nn.AbstractAttention], Callable[[], Any]]] = {
    "dense": (partial(grouped_query, kv_heads=4), swiglu),
    "grouped-query": (grouped_query, swiglu),
    "window": (partial(grouped_query, window=5), swiglu),
    "gated": (partial(grouped_query, gate=True, bias=True, norm_epsilon=1e-6), swiglu),
    "latent": (partial(latent, 48), swiglu),
    "latent without a rank of queries": (partial(latent, None), swiglu),
    "mixture": (partial(latent, 48), mixture),
    "gated delta": (lambda: nn.GatedDeltaNet(EMBED, 2, 4, 24, 16, key=KEYS[7]), swiglu),
}


def make_layer(kind: str) -> nn.TransformerDecoderLayer:
    attention, feed_forward = PARTS[kind]
    norm = nn.RMSNorm(EMBED)
    return nn.TransformerDecoderLayer.of(
        attention(), feed_forward(), attention_norm=norm, feed_forward_norm=norm
    )


def make_model(
    kind: str, num_depths: int, *, repeated_layer: bool = False, num_layers: int = 1
) -> emtp.MTPModel:
    config = emtp.MTPConfig(
        num_depths=num_depths,
        repeated_layer=repeated_layer,
        checkpoint_policy=jax.checkpoint_policies.everything_saveable,
    )
    embedding = jax.random.normal(KEYS[8], (VOCAB, EMBED)) / EMBED**0.5
    layers = [make_layer(kind)] * num_layers
    decoder = nn.TransformerDecoder.of(layers, embedding=embedding, norm=nn.RMSNorm(EMBED))
    block = emtp.MultiTokenPredictionBlock(
        config, lambda key: make_layer(kind), embed_size=EMBED, key=KEYS[0]
    )
    return emtp.MTPModel(decoder, block)


def unrolled_loop(lower: Any, upper: Any, body: Any, init: Any) -> Any:
    """The loops over tiles of rows: those of the mixture above are known."""
    # Two experts have a half of all rows each: tiles of the largest size, two for each of them.
    tiles = {BATCH * SEQ // 2: 4}.get(body.keywords["size"], 0)
    for step in range(tiles):
        init = body(lower + step, init)
    return init


class Counted(NamedTuple):
    """Operations of a step for a token: of matrix products, and all."""

    products: float
    total: float


def counted_by_xla(model: emtp.MTPModel, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Of the forward and the backward pass."""
    tokens = np.arange(BATCH * (SEQ + 1)).reshape(BATCH, SEQ + 1) % VOCAB
    batch = emtp.make_batch(tokens.astype(np.int32))
    params, static = eqx.partition(model, eqx.is_array)

    def loss(params: Any) -> Array:
        output = eqx.combine(params, static)(batch, predictions=False)
        return output.main.mean + output.mtp.loss

    with monkeypatch.context() as patch:
        patch.setattr(lax, "scan", partial(lax.scan, unroll=True))
        patch.setattr(lax, "fori_loop", unrolled_loop)
        # Of the head's gradient for all depths, which is scaled and not computed again.
        patch.setattr(lax, "cond", lambda _, taken, other, *operands: taken(*operands))
        compiled, program = compile_for(jax.jit(jax.value_and_grad(loss)), params)
    found = products(program)
    # What is left of loops are additions to rows of the embedding's gradient.
    assert all(product.times == 1 for product in found)
    num_tokens = BATCH * SEQ
    total = compiled.cost_analysis()["flops"]
    return Counted(sum(product.flops for product in found) / num_tokens, total / num_tokens)


# Each kind of layer once in the decoder and once in a depth; what depths add, of one kind.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {"num_depths": 1}) for kind in PARTS},
    "no depths, two layers": ("grouped-query", {"num_depths": 0, "num_layers": 2}),
    "three depths": ("grouped-query", {"num_depths": 3}),
    "one layer for three depths": ("grouped-query", {"num_depths": 3, "repeated_layer": True}),
}
# Each compiles for more than five seconds.
SLOW = {"dense", "latent", "mixture", "gated delta", "three depths", "one layer for three depths"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES],
)
def test_as_many_as_xla_compiles(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = CASES[case]
    model = make_model(kind, **options)
    flops = emtp.flops_per_token(model, seq_len=SEQ)
    assert len(flops.depths) == options["num_depths"]
    counted = counted_by_xla(model, monkeypatch)
    # Products of single numbers, as in the row's first attention, are no products in XLA; what
    # else it counts are operations on single numbers.
    assert 0.99 * flops.training <= counted.products <= flops.training
    assert flops.training <= counted.total <= 1.05 * flops.training


def test_the_formula_of_attention_takes_the_whole_square(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = emtp.flops_per_token(make_model("dense", 0), seq_len=SEQ).training
    attention = partial(grouped_query, kv_heads=4, attention=nn.causal_attention)
    monkeypatch.setitem(PARTS, "dense", (attention, swiglu))
    model = make_model("dense", 0)
    unseen_keys = SEQ - (SEQ + 1) / 2
    square = 3 * 4 * 24 * 4 * unseen_keys
    assert emtp.flops_per_token(model, seq_len=SEQ).training == seen
    assert counted_by_xla(model, monkeypatch).products == seen + square


# By hand


def test_deepseek_v3() -> None:
    """The sizes of arXiv 2412.19437, §4.2; "37B activated for each token"."""
    seq_len, embed, heads, vocab = 4096, 7168, 128, 129_280

    def make(key: PRNGKeyArray) -> emtp.MTPModel:
        def layer(feed_forward: nn.AbstractFeedForward) -> nn.TransformerDecoderLayer:
            attention = nn.MultiHeadLatentAttention(
                embed,
                heads,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                key=key,
            )
            norm = nn.RMSNorm(embed)
            return nn.TransformerDecoderLayer.of(
                attention, feed_forward, attention_norm=norm, feed_forward_norm=norm
            )

        dense = layer(nn.SwiGLU(embed, 18_432, key=key))
        router = nn.Router(embed, 256, top_k=8, scores="sigmoid", bias=True, key=key)
        experts, shared = nn.Experts(256, embed, 2048, key=key), nn.SwiGLU(embed, 2048, key=key)
        sparse = layer(nn.MixtureOfExperts(router, experts, shared_expert=shared))
        table, norm = jnp.zeros((vocab, embed)), nn.RMSNorm(embed)
        layers = [dense] * 3 + [sparse] * 58
        decoder = nn.TransformerDecoder.of(layers, embedding=table, norm=norm, head=table)
        config = emtp.MTPConfig.preset("deepseek_v3", num_depths=1)
        block = emtp.MultiTokenPredictionBlock(
            config, lambda key: sparse, embed_size=embed, key=key
        )
        return emtp.MTPModel(decoder, block)

    flops = emtp.flops_per_token(eqx.filter_eval_shape(make, jax.random.key(0)), seq_len=seq_len)
    queries = embed * 1536 + 1536 * heads * 192
    keys_and_values = embed * (512 + 64) + 512 * heads * (128 + 128)
    attention = queries + keys_and_values + heads * 128 * embed
    pairs = heads * (4097 / 2) * (192 + 128)
    dense_mlp = 3 * embed * 18_432
    sparse_mlp = (8 + 1) * 3 * embed * 2048 + embed * 256
    decoder = 61 * (attention + pairs) + 3 * dense_mlp + 58 * sparse_mlp
    assert flops.decoder == 2 * decoder
    assert flops.head == 2 * embed * vocab
    assert flops.depths == (2 * (2 * embed**2 + attention + pairs + sparse_mlp),)
    assert flops.training == 3 * (flops.decoder + 2 * flops.head + flops.depths[0])
    activated = decoder - 61 * pairs + embed * vocab
    assert activated == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("seq_len", [1, 8, 33])
def test_keys_that_are_seen(seq_len: int, window: int | None) -> None:
    attention = grouped_query(window=window)
    seen = [sum(0 <= i - j < (window or seq_len) for j in range(seq_len)) for i in range(seq_len)]
    matrices = 2 * EMBED * 24 * (4 + 2 + 2 + 4)
    of_pairs = 2 * 2 * 24 * 4 * sum(seen) / seq_len
    assert attention.flops_per_token(seq_len) == pytest.approx(matrices + of_pairs)


@pytest.mark.parametrize("seq", [1, 9, 64, 100])
def test_chunks_of_the_gated_delta_rule(seq: int) -> None:
    layer = nn.GatedDeltaNet(EMBED, 2, 4, 24, 16, key=KEYS[7])
    features = 2 * (2 * 24) + 4 * 16
    outer = 2 * EMBED * (features + 4 * 16 + 2 * 4 + 4 * 16) + 2 * 4 * features
    query, value, decay = (
        jnp.ones((1, seq, 2, 24)),
        jnp.ones((1, seq, 4, 16)),
        jnp.ones((1, seq, 4)),
    )
    rule = jax.jit(nn.gated_delta_rule)
    _, program = compile_for(rule, query, query, value, decay, decay)
    counted = sum(product.flops for product in products(program)) / seq
    expected = layer.flops_per_token(seq) - outer
    # In a chunk of one position most products are of single numbers.
    assert counted == pytest.approx(expected, rel=0.01) if seq > 1 else counted < expected


# Other people's modules, and shapes


class ForeignLayer(emtp.AbstractDecoderLayer):
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: Array

    def __call__(self, hidden_states: Array, **_: Any) -> Array:
        up = jax.vmap(jax.vmap(self.up))(hidden_states)
        return hidden_states + jax.nn.relu(up) @ self.down


class ForeignDecoder(emtp.AbstractDecoder):
    table: eqx.nn.Embedding
    layers: list[ForeignLayer]
    head: eqx.nn.Linear
    kind_of_head: str

    def embed(self, input_ids: Array, position_ids: Array) -> Array:
        return self.table.weight[input_ids]

    def __call__(self, input_ids: Array, *, position_ids: Array, **_: Any) -> Array:
        hidden_states = self.embed(input_ids, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states

    def final_norm(self, hidden_states: Array) -> Array:
        return hidden_states

    def output_head(self) -> Any:
        match self.kind_of_head:
            case "matrix":
                return self.head.weight
            case "with a bias":
                return emtp.LinearHead(self.head.weight, self.head.bias)
        return lambda hidden_states: jax.vmap(jax.vmap(self.head))(hidden_states)


def make_foreign(kind_of_head: str = "matrix") -> emtp.MTPModel:
    def make_layer(key: PRNGKeyArray) -> ForeignLayer:
        up = eqx.nn.Linear(12, 20, key=key)
        return ForeignLayer(eqx.nn.LayerNorm(12), up, jnp.ones((20, 12)))

    embedding = eqx.nn.Embedding(31, 12, key=KEYS[0])
    head = eqx.nn.Linear(12, 31, key=KEYS[1])
    decoder = ForeignDecoder(
        embedding, [make_layer(KEYS[2]), make_layer(KEYS[3])], head, kind_of_head
    )
    block = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig(num_depths=2), make_layer, embed_size=12, key=KEYS[4]
    )
    return emtp.MTPModel(decoder, block)


@pytest.mark.parametrize("kind_of_head", ["matrix", "with a bias", "function"])
def test_other_peoples_modules_count_by_their_matrices(kind_of_head: str) -> None:
    layer = 2 * (12 * 20 + 20 * 12)
    expected = emtp.FlopsPerToken(
        decoder=2 * layer, head=2 * 12 * 31, depths=(layer + 2 * 24 * 12,) * 2
    )
    assert emtp.flops_per_token(make_foreign(kind_of_head), seq_len=7) == expected
    shapes = eqx.filter_eval_shape(make_foreign, kind_of_head)
    assert emtp.flops_per_token(shapes, seq_len=7) == expected


def test_layers_that_answer_for_themselves() -> None:
    class Attends(ForeignLayer):
        def flops_per_token(self, seq_len: int) -> float:
            return 1000.0 * seq_len

    model = make_foreign()
    layers = [Attends(layer.norm, layer.up, layer.down) for layer in model.decoder.layers]  # pyright: ignore[reportAttributeAccessIssue]
    block = emtp.MultiTokenPredictionBlock(
        model.block.config, lambda key: layers[0], embed_size=12, key=KEYS[4]
    )
    flops = emtp.flops_per_token(emtp.MTPModel(model.decoder, block), seq_len=7)
    assert flops.depths == (7000 + 2 * 24 * 12,) * 2


@pytest.mark.parametrize("kind", PARTS)
def test_shapes_and_decoding_layout_give_the_same(kind: str) -> None:
    model = make_model(kind, 2, num_layers=2)
    expected = emtp.flops_per_token(model, seq_len=SEQ)
    shapes = eqx.filter_eval_shape(lambda: model)
    assert emtp.flops_per_token(shapes, seq_len=SEQ) == expected
    decoding = emtp.MTPModel(model.decoder.for_decoding(), model.block)  # pyright: ignore[reportAttributeAccessIssue]
    assert emtp.flops_per_token(decoding, seq_len=SEQ) == expected
    assert all(isinstance(x, float) for x in (*expected[:2], *expected.depths))


def test_on_a_mesh_with_rules() -> None:
    model = make_model("mixture", 1)
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2})
    expected = emtp.flops_per_token(model, seq_len=SEQ)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        assert emtp.flops_per_token(model, seq_len=SEQ) == expected


@pytest.mark.parametrize("seq_len", [0, -1, 2.5])
def test_wrong_arguments(seq_len: Any) -> None:
    model = make_foreign()
    assert_rejects("model", emtp.flops_per_token, model.decoder, seq_len=8)
    if seq_len == 2.5:
        assert_rejects("seq_len", emtp.flops_per_token, model, seq_len=seq_len)
    else:
        with pytest.raises(ValueError, match=r"^`seq_len` must be"):
            emtp.flops_per_token(model, seq_len=seq_len)
