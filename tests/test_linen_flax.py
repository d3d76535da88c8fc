"""The shim inside a Flax model, and beside NNX; and without Flax."""

import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from flax import core as flax_core, linen as flax_linen, nnx
from golden import assert_close
from test_linen import VOCAB, ToyLayer, toy_block, toy_config, toy_inputs

from equinox_mtp import linen, nn


class Model(flax_linen.Module):
    """A model in Linen that holds the shim's parameters and collections as its own."""

    config: Any

    @flax_linen.compact
    def __call__(self, inputs: dict[str, Any]) -> jax.Array:
        size = self.config.emb_dim
        embed = flax_linen.Embed(VOCAB, size, name="token_embedder")
        # What the block borrows is read before its loops: Flax wants no module called inside.
        table = embed.embedding
        norm = self.param("decoder_norm", flax_linen.initializers.ones, (size,))

        class Decoder:
            def _apply_embedding(self, shared: Any, ids: Any, *_: Any, **__: Any) -> jax.Array:
                return shared[ids]

            def apply_output_head(self, shared: Any, hidden_states: Any, *_: Any) -> jax.Array:
                square = jnp.mean(hidden_states**2, axis=-1, keepdims=True)
                return (hidden_states / jnp.sqrt(square + 1e-5) * norm) @ shared.T

        block = maxtext.make_block(
            self.config, decoder=Decoder(), transformer_layer_module=ToyLayer
        )
        params = self.param("mtp_block", lambda key: block.init(key)["params"])
        inputs = {**inputs, "shared_embedding": table}
        mutable = [c for c in ("mtp_losses", "mtp_acceptance") if self.is_mutable_collection(c)]
        _, collected = block.apply({"params": params}, **inputs, mutable=mutable)
        if not self.is_initializing():
            for collection, blocks in collected.items():
                for name, entries in blocks.items():
                    self.put_variable(collection, name, entries)
        return embed.attend(inputs["main_hidden_state"])


def test_inside_a_linen_model() -> None:
    config = toy_config()
    model = Model(config)
    inputs = toy_inputs()
    variables = model.init(jax.random.key(0), inputs)
    assert variables.keys() == {"params"}
    assert variables["params"].keys() == {"token_embedder", "decoder_norm", "mtp_block"}

    @jax.jit
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, outputs = model.apply(
            {"params": params}, inputs, mutable=["mtp_losses", "mtp_acceptance"]
        )
        return linen.calculate_mtp_loss(outputs, config), {**outputs, "logits": logits}

    (loss, outputs), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    assert 0 < float(loss) < 2 * np.log(VOCAB)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(gradients))
    assert outputs["mtp_losses"]["mtp_block"]["losses"].shape == (2,)
    assert 0 <= float(linen.calculate_mtp_acceptance_rate(outputs, config)) <= 100

    # The model's variables are the shim's: the same loss from its own `apply`.
    class Tied(eqx.Module):
        norm: nn.RMSNorm

        def _apply_embedding(self, shared: Any, ids: Any, *_: Any, **__: Any) -> jax.Array:
            return shared[ids]

        def apply_output_head(self, shared: Any, hidden_states: Any, *_: Any) -> jax.Array:
            return self.norm(hidden_states) @ shared.T

    block = maxtext.make_block(
        config, decoder=Tied(nn.RMSNorm(8)), transformer_layer_module=ToyLayer
    )
    table = variables["params"]["token_embedder"]["embedding"]
    of_block = variables["params"]["mtp_block"]
    boxed = jax.tree.map(lambda x: flax_linen.Partitioned(x, names=(None,) * x.ndim), of_block)
    for params in (of_block, boxed, flax_core.freeze({"mtp_block": of_block})):
        inputs = toy_inputs(shared_embedding=table)
        _, own = block.apply({"params": params}, **inputs, mutable="mtp_losses")
        assert_close(linen.calculate_mtp_loss(own, config), loss)


def test_mutable_is_linens() -> None:
    class Plain(flax_linen.Module):
        @flax_linen.compact
        def __call__(self) -> dict[str, Any]:
            self.param("kernel", flax_linen.initializers.ones, (2,))
            if self.is_mutable_collection("mtp_losses"):
                self.put_variable("mtp_losses", "losses", jnp.ones(1))
            return {}

    block = toy_block(toy_config(eval_depth=0))
    variables = block.init(jax.random.key(0))
    flax_variables = {"params": {"kernel": jnp.ones(2)}}
    for mutable in (
        False,
        True,
        [],
        "params",
        "mtp_losses",
        ["mtp_losses", "params"],
        flax_core.DenyList("params"),
        flax_core.DenyList(["mtp_losses"]),
    ):
        expected = Plain().apply(flax_variables, mutable=mutable)
        actual = block.apply(variables, **toy_inputs(), mutable=mutable)
        if mutable is False:
            assert actual == expected == {}
        else:
            assert actual[0] == expected[0] == {}
            assert actual[1].keys() == expected[1].keys()


def test_beside_nnx() -> None:
    class Block(nnx.Module):
        """Holds the shim's parameters as variables of NNX."""

        def __init__(self, params: Any):
            self.mtp_block = nnx.data(jax.tree.map(nnx.Param, params))

    block = toy_block()
    rngs = nnx.Rngs(0)
    variables = block.init(rngs)
    expected = block.init({"params": nnx.Rngs(0).params()})
    jax.tree.map(np.testing.assert_array_equal, variables, expected)

    state = nnx.state(Block(variables["params"]), nnx.Param)
    like = block._skeleton.block
    reference = linen.from_linen_params(variables, like)
    for params in (state, nnx.to_pure_dict(state)):
        loaded = linen.from_linen_params(params, like)
        jax.tree.map(np.testing.assert_array_equal, loaded, reference)
    # And back: NNX takes the shim's tree for its own.
    changed = Block(jax.tree.map(lambda x: 2 * x, linen.to_linen_params(reference)))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, 2 * y),
        linen.from_linen_params(nnx.state(changed, nnx.Param), like),
        reference,
    )


def test_flax_is_never_imported() -> None:
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import equinox_mtp.linen, equinox_mtp\n"
        "assert not [name for name in sys.modules if name.startswith('flax.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_typed", [False, True])
def test_keys_of_both_kinds_draw_alike(is_typed: bool) -> None:
    block = toy_block()
    key = jax.random.key(5) if is_typed else jax.random.PRNGKey(5)
    expected = block.init(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, block.init({"params": key}), expected)
