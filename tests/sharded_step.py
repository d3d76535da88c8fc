"""A whole training step, on one device and on a mesh."""

from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax
from golden import quick_jit
from helpers import assert_close
from hlo import compile_for

import equinox_mtp as emtp
from equinox_mtp import MTPConfig, MTPModel, nn, sharding

# All sizes differ, also those of the parts on each device: compiled programs are searched for them.
DEPTHS, BATCH, SEQ, EMBED, VOCAB = 3, 8, 72, 16, 104
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 2
KV_FEATURES = KV_HEADS * HEAD_DIM
TOKEN_TILE, VOCAB_TILE = 8, 40
MESHES = {
    "fsdp": {"fsdp": 8},
    "data_fsdp": {"data": 2, "fsdp": 4},
    "data_tensor": {"data": 2, "tensor": 4},
    "data_context": {"data": 2, "context": 4},
    "data_tensor_context": {"data": 2, "context": 2, "tensor": 2},
}


class Rows(NamedTuple):
    """A batch in the order of the text."""

    input_ids: Any
    target_ids: Any
    target_mask: Any
    position_ids: Any
    segment_ids: Any


def make_rows(seed: int = 0) -> Rows:
    """Packed documents of all lengths, and padding at the end of some rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (BATCH, SEQ + 1))
    segment_ids = np.zeros((BATCH, SEQ + 1), np.int32)
    position_ids = np.zeros((BATCH, SEQ + 1), np.int32)
    for row in range(BATCH):
        start, document = 0, 0
        while start < SEQ + 1 - (row % 3) * 5:
            length = int(rng.integers(1, 30))
            document += 1
            segment_ids[row, start : start + length] = document
            position_ids[row, start : start + length] = np.arange(SEQ + 1)[:length][
                : max(0, SEQ + 1 - start)
            ]
            start += length
    inputs = emtp.inputs_and_targets(tokens, segment_ids=segment_ids)
    return Rows(*inputs, position_ids[:, :-1], segment_ids[:, :-1])


def make_model(**options: Any) -> MTPModel:
    config = nn.TransformerConfig(
        vocab_size=VOCAB,
        embed_size=EMBED,
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mlp_size=32,
        **options,
    )
    decoder_key, block_key = jax.random.split(jax.random.key(0))
    return MTPModel(
        nn.TransformerDecoder(config, key=decoder_key),
        emtp.MultiTokenPredictionBlock(
            MTPConfig.preset("deepseek_v3", DEPTHS),
            partial(nn.TransformerDecoderLayer, config),
            embed_size=EMBED,
            key=block_key,
        ),
    )


def loss_fn(model: MTPModel, rows: Rows, targets: Any = None) -> tuple[jax.Array, Any]:
    output = model(
        rows.input_ids,
        rows.target_ids,
        rows.target_mask,
        position_ids=rows.position_ids,
        segment_ids=rows.segment_ids,
        targets=targets,
        predictions=False,
    )
    loss = output.main.mean + emtp.calculate_mtp_loss(output.mtp.losses, scaling_factor=0.3)
    return loss, (output.main, output.mtp.losses)


class Step(NamedTuple):
    loss: Any
    sums: Any
    grads: Any
    model: Any
    moments: Any


OPTIMIZER = optax.adamw(1e-2)


def train_step(model: MTPModel, optimizer_state: Any, rows: Rows, targets: Any = None) -> Step:
    value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
    (loss, sums), grads = value_and_grad(model, rows, targets)
    updates, moments = OPTIMIZER.update(grads, optimizer_state, eqx.filter(model, eqx.is_array))
    return Step(loss, sums, grads, eqx.apply_updates(model, updates), moments)


@cache
def on_one_device() -> Step:
    model = make_model()
    moments = OPTIMIZER.init(eqx.filter(model, eqx.is_array))
    return quick_jit(train_step)(model, moments, make_rows())


def assert_same_step(actual: Step, expected: Step) -> None:
    for name in ("loss", "sums", "grads", "moments"):
        x, y = (jax.tree.leaves(getattr(step, name)) for step in (actual, expected))
        for a, b in zip(x, y, strict=True):
            assert_close(a, b, 1e-5)


class TiledDecoder(emtp.AbstractDecoder):
    """The reference decoder with so small tiles that a row of logits is larger than one."""

    decoder: nn.TransformerDecoder

    def embed(self, input_ids: Any, position_ids: Any) -> Any:
        return self.decoder.embed(input_ids, position_ids)

    def __call__(self, input_ids: Any, **arguments: Any) -> Any:
        return self.decoder(input_ids, **arguments)

    def final_norm(self, hidden_states: Any) -> Any:
        return self.decoder.final_norm(hidden_states)

    def output_head(self) -> emtp.LinearHead:
        return emtp.LinearHead(self.decoder.embedding, token_tile=TOKEN_TILE, vocab_tile=VOCAB_TILE)


def run_on(mesh: Any, model: MTPModel, rows: Rows, targets: Any = None) -> tuple[Step, str]:
    decoder: Any = model.decoder
    model = sharding.shard_model(MTPModel(TiledDecoder(decoder), model.block), mesh)
    with jax.set_mesh(mesh), sharding.use_rules():
        moments = sharding.shard_model(OPTIMIZER.init(eqx.filter(model, eqx.is_array)), mesh)
        rows, targets = sharding.shard_batch((rows, targets), mesh)
        compiled, program = compile_for(eqx.filter_jit(train_step), model, moments, rows, targets)
        return compiled(model, moments, rows, targets), program
