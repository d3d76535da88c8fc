"""What a user reads who passes something wrong, without the import hook of the tests."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Every call is wrong; the message must begin with the argument, be short, and not print a model.
CALLS = {
    "input_ids": "model(jnp.ones((2, 4)), ids)",
    "target_ids": "model(ids, ids[:, :2])",
    "target_mask": "model(ids, ids, jnp.ones((2, 4)))",
    "position_ids": "model(ids, ids, position_ids=ids[0])",
    "z_loss_weight": "model(ids, ids, z_loss_weight='small')",
    "targets": "model(ids, ids, targets=ids)",
    "model": "emtp.speculative.measure_acceptance(decoder, ids)",
    "hidden_states": "emtp.linear_cross_entropy(ids, weight, ids)",
    "head": "emtp.linear_cross_entropy(hidden, 3, ids)",
    "weights": "emtp.summed_linear_cross_entropy(hidden, weight, ids, 'all')",
    "x": "emtp.roll_and_mask(jnp.ones(3))",
    "shift": "emtp.roll_and_mask(ids, 'left')",
    "losses": "emtp.calculate_mtp_loss(model)",
    "acceptance": "emtp.calculate_mtp_acceptance_rate(model, None)",
    "weight": "emtp.LinearHead(ids)",
    "decoder": "block(model, hidden, targets)",
    "make_layer": "emtp.MultiTokenPredictionBlock(config, 3, embed_size=8, key=key)",
    "tokens": "emtp.inputs_and_targets([[1, 2]])",
    "num_depths": "emtp.align_targets(ids, ids, num_depths=1.5)",
    "order": "emtp.sharding.reorder(ids, np.ones(4))",
    "query": "emtp.nn.causal_attention(hidden, hidden, hidden, position_ids=ids)",
    "embedding": "emtp.nn.embed_tokens(hidden, ids)",
}
# The classes' own checks, which no annotation makes.
VALUES = {
    "`num_depths` must be an integer": "emtp.MTPConfig(1.5)",
    "`num_depths` must be at least 0": "emtp.MTPConfig(-1)",
    "`repeated_layer` must be True or False": "emtp.MTPConfig(repeated_layer=1)",
    "`concat_order` must be": "emtp.MTPConfig(concat_order='embedding')",
    "`checkpoint_policy` must be": "emtp.MTPConfig(checkpoint_policy='dots')",
    "`vocab_size` must be": "transformer(vocab_size=0)",
    "`num_layers` must be an integer": "transformer(num_layers=2.0)",
    "`rope_theta` must be above 0": "transformer(rope_theta=-1.0)",
    "`rope_theta` must be finite": "transformer(rope_theta=np.inf)",
    "`norm_epsilon` must be": "transformer(norm_epsilon=np.nan)",
    "`attention` must be a function": "transformer(attention='flash')",
    "`tie_embeddings` must be True or False": "transformer(tie_embeddings='no')",
    "`checkpoint_policy` must be a function": "transformer(checkpoint_policy='no')",
    "`dtype` must be": "transformer(dtype='float16')",
    "`dropout_rate` must be": "transformer(dropout_rate=1.0)",
    "`index` must be at least 0 and at most 1": "decoder.layer(2)",
    "`index` must be at least 0": "decoder.layer(-1)",
    "`x` must have the 8 features": "emtp.nn.RMSNorm(8)(jnp.ones((2, 7)))",
    "`embed_size` must be at least 1": "emtp.nn.RMSNorm(0)",
    "`in_features` must be at least 1": "emtp.nn.Linear(0, 3, key=key)",
    "`depth` must be an integer": "block.layer(1.5)",
    "`depth_weights` must be finite and not negative": (
        "emtp.calculate_mtp_loss(emtp.MTPLosses(jnp.ones(99), jnp.ones(99)),"
        " depth_weights=-np.ones(99))"
    ),
    "`shift` must be zero or negative": "emtp.roll_and_mask(ids, 1)",
    "`head` must be a matrix": (
        "emtp.linear_cross_entropy(hidden, __import__('equinox').nn.Linear(8, 11, key=key), ids)"
    ),
    "`order` must hold each of": "emtp.sharding.reorder(ids, np.array([0, 0, 1, 2]))",
    "`target_ids` must lie in 0 … 10": "model(np.array([[1, 2]]), np.array([[3, 11]]))",
    "`targets` must have shape": "block(decoder, hidden, bad_targets)",
    "`MTPTargets` must have fields of one shape": "emtp.MTPTargets(ids[None], ids[None], ids, ids)",
    "`objective` must reduce": (
        "eqx.filter_jit(model)(ids, ids, objective=lambda losses: losses.losses)"
    ),
}
# The first lines, in full: nobody should have to read annotations as Python writes them.
LINES = {
    "emtp.nn.causal_attention(*qkv, position_ids=ids, implementation='flash')": (
        "`implementation` must be 'dense' or 'tiled' or 'cudnn' or 'splash' or None; got 'flash'."
    ),
    "emtp.calculate_mtp_loss(emtp.MTPLosses(jnp.ones(1), jnp.ones(1)), reduction='sum')": (
        "`reduction` must be 'pooled' or 'mean_of_depths'; got 'sum'."
    ),
    "emtp.calculate_mtp_loss(model)": (
        "`losses` must be MTPLosses; got "
        "MTPModel( decoder=TransformerDecoder( embedding=f32[11,8], layers=TransformerDe…."
    ),
    "emtp.pretrained.load('x', preset='paper', num_depths=1.5)": (
        "`num_depths` must be int or None; got 1.5."
    ),
    "emtp.sharding.use_rules('data')": (
        "`rules` must be sharding.ShardingRules or None; got 'data'."
    ),
    "emtp.pretrained.load('x', mesh=4)": "`mesh` must be Mesh or None; got 4.",
    "emtp.pretrained.load('x', families=4)": (
        "`families` must be Sequence[pretrained.Family]; got 4."
    ),
}

SCRIPT = """
    import json, sys
    from functools import partial
    import equinox as eqx, jax, jax.numpy as jnp, numpy as np
    import equinox_mtp as emtp

    def transformer(**fields):
        sizes = dict(vocab_size=11, embed_size=8, num_layers=2, num_heads=2)
        return emtp.nn.TransformerConfig(**(sizes | fields))

    qkv = [jnp.ones((2, 4, 2, 8))] * 3
    key, config, ids = jax.random.key(0), emtp.MTPConfig(1), jnp.ones((2, 4), jnp.int32)
    make_layer = partial(emtp.nn.TransformerDecoderLayer, transformer())

    @eqx.filter_jit  # as one program it compiles sooner
    def make():
        decoder = emtp.nn.TransformerDecoder(transformer(), key=key)
        block = emtp.MultiTokenPredictionBlock(config, make_layer, embed_size=8, key=key)
        return decoder, block

    decoder, block = make()
    model, hidden, weight = emtp.MTPModel(decoder, block), jnp.ones((2, 4, 8)), jnp.ones((11, 8))
    targets = emtp.align_targets(ids, ids, num_depths=1)
    bad_targets = emtp.align_targets(ids, ids, num_depths=2)
    messages = {}
    for call in json.load(sys.stdin):
        try:
            eval(call)
            messages[call] = "no error"
        except Exception as error:
            messages[call] = f"{type(error).__name__}: {error}"
    json.dump(messages, sys.stdout)
"""


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    calls = [*CALLS.values(), *VALUES.values(), *LINES]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("argument", CALLS)
def test_a_wrong_argument_is_named_first_and_in_few_words(
    argument: str, messages: dict[str, str]
) -> None:
    kind, _, message = messages[CALLS[argument]].partition(": ")
    assert kind in ("TypeCheckError", "TypeError", "ValueError"), message
    assert message.startswith(f"`{argument}` must be"), message
    assert len(message.splitlines()) <= 6
    assert len(message) < 400


@pytest.mark.parametrize("beginning", VALUES)
def test_a_wrong_value_is_an_error_of_the_library_itself(
    beginning: str, messages: dict[str, str]
) -> None:
    kind, _, message = messages[VALUES[beginning]].partition(": ")
    assert kind == "ValueError", message
    assert message.startswith(beginning), message
    assert len(message) < 400


@pytest.mark.parametrize("call", LINES)
def test_types_are_in_plain_words(call: str, messages: dict[str, str]) -> None:
    _, _, message = messages[call].partition(": ")
    assert message.splitlines()[0] == LINES[call]
