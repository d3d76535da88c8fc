"""The shim inside a Flax model, and beside NNX; and without Flax."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from flax import core as flax_core, linen as flax_linen, nnx
from golden import assert_close
from maxtext import VOCAB, ToyLayer, toy_block, toy_config, toy_inputs

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
    # λ = 0.1, and little more than a uniform guess.
    assert 0.05 * np.log(VOCAB) < float(loss) < 0.2 * np.log(VOCAB)
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


def test_without_flax() -> None:
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "from maxtext import toy_block, toy_inputs\n"
        "from equinox_mtp import linen\n"
        "block = toy_block()\n"
        "variables = block.init({'params': __import__('jax').random.key(0)})\n"
        "_, out = block.apply(variables, **toy_inputs(), mutable=True)\n"
        "print(float(linen.calculate_mtp_loss(out, block.config)))\n"
        "assert not [name for name in sys.modules if name.startswith('flax.')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    block = toy_block()
    _, out = block.apply(block.init(jax.random.key(0)), **toy_inputs(), mutable=True)
    assert_close(float(done.stdout), linen.calculate_mtp_loss(out, block.config))


@pytest.mark.parametrize("is_typed", [False, True])
def test_keys_of_both_kinds_draw_alike(is_typed: bool) -> None:
    block = toy_block()
    key = jax.random.key(5) if is_typed else jax.random.PRNGKey(5)
    expected = block.init(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, block.init({"params": key}), expected)


class NNXLayer(nnx.Module):
    """A layer as MaxText has them."""

    def __init__(self, config: Any, mesh: Any, model_mode: str, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(config.emb_dim, config.emb_dim, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(
        self,
        inputs: jax.Array,
        decoder_segment_ids: Any,
        decoder_positions: Any,
        deterministic: bool,
        model_mode: str,
    ) -> tuple[jax.Array, None]:
        hidden = jnp.tanh(self.linear(inputs))
        return inputs + self.dropout(hidden, deterministic=deterministic), None


class NNXDecoder(nnx.Module):
    """A decoder as MaxText has them."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)

    def _apply_embedding(self, shared: nnx.Embed, ids: Any, *_: Any, **__: Any) -> jax.Array:
        return shared(ids)

    def apply_output_head(self, shared: nnx.Embed, hidden_states: Any, *_: Any) -> jax.Array:
        return shared.attend(self.norm(hidden_states))


def test_layers_decoder_and_embedding_of_nnx() -> None:
    config = toy_config()
    decoder, embed = NNXDecoder(nnx.Rngs(1)), nnx.Embed(VOCAB, 8, rngs=nnx.Rngs(2))
    block = maxtext.make_block(config, decoder=decoder, transformer_layer_module=NNXLayer)
    variables = block.init(nnx.Rngs(0))
    layer = variables["params"]["mtp_layer_1"]["mtp_1_transformer_layer"]
    assert {k: v.keys() for k, v in layer.items()} == {"linear": {"kernel", "bias"}}
    params = variables["params"] | {"decoder": linen.decoder_params(decoder)}
    assert params["decoder"]["norm"].keys() == {"scale"}
    table = embed.embedding.get_value()

    def loss_fn(params: Any, table: jax.Array) -> jax.Array:
        shared = nnx.Embed(VOCAB, 8, rngs=nnx.Rngs(2))
        shared.embedding.set_value(table)
        inputs = toy_inputs(shared_embedding=shared)
        _, out = block.apply({"params": params}, **inputs, mutable=True)
        return linen.calculate_mtp_loss(out, config)

    # The same in the library's own terms.
    class Layer(eqx.Module):
        kernel: jax.Array
        bias: jax.Array

        def __call__(self, inputs: jax.Array, **_: Any) -> jax.Array:
            return inputs + jnp.tanh(inputs @ self.kernel + self.bias)

    def make_layer(key: Any) -> Layer:
        return Layer(jnp.zeros((8, 8)), jnp.zeros(8))

    plain = toy_block(transformer_layer_module=make_layer)
    renamed = jax.tree.map(lambda x: x, variables["params"])
    for depth in (1, 2):
        module = renamed[f"mtp_layer_{depth}"]
        name = f"mtp_{depth}_transformer_layer"
        module[name] = module[name]["linear"]
    scale = params["decoder"]["norm"]["scale"]

    def plain_loss(renamed: Any, table: jax.Array) -> jax.Array:
        own = {"decoder": {"norm": {"scale": scale}}}
        inputs = toy_inputs(shared_embedding=table)
        _, out = plain.apply({"params": renamed | own}, **inputs, mutable=True)
        return linen.calculate_mtp_loss(out, config)

    (loss, (of_params, of_table)) = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(params, table)
    expected, (of_renamed, of_plain) = jax.jit(jax.value_and_grad(plain_loss, (0, 1)))(
        renamed, table
    )
    assert_close(loss, expected, 1e-5)
    assert_close(of_table, of_plain, 1e-4)
    kernels = (
        tree["mtp_layer_2"]["mtp_2_projection"]["kernel"] for tree in (of_params, of_renamed)
    )
    assert_close(next(kernels), next(kernels), 1e-4)
    assert float(jnp.abs(of_params["decoder"]["norm"]["scale"]).max()) > 0


@pytest.mark.parametrize("box", ["embed", "param", "partitioned"])
def test_boxed_tables_are_shared_embeddings(box: str) -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    embed = nnx.Embed(VOCAB, 8, rngs=nnx.Rngs(2))
    table = embed.embedding.get_value()
    boxed = {
        "embed": embed,
        "param": embed.embedding,
        "partitioned": flax_linen.Partitioned(table, names=(None, None)),
    }[box]
    actual, expected = (
        block.apply(variables, **toy_inputs(shared_embedding=x), mutable="mtp_losses")[1]
        for x in (boxed, table)
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_rngs_are_asked_once() -> None:
    block = toy_block(rngs=nnx.Rngs(0))
    first, second = block.init(), block.init()
    jax.tree.map(np.testing.assert_array_equal, first, second)
    with pytest.raises(ValueError, match="`rngs` must hold a key for the stream 'params'"):
        block.init(nnx.Rngs(dropout=0))
    _, out = block.apply(first, **toy_inputs(), mutable=True, rngs=nnx.Rngs(params=0))
    assert out["mtp_losses"]["mtp_block"]["losses"].shape == (2,)


def test_unbound_linen_layers_are_named() -> None:
    class Layer(flax_linen.Module):
        @flax_linen.compact
        def __call__(self, inputs: Any) -> Any:
            return flax_linen.Dense(8)(inputs)

    with pytest.raises(TypeError, match="must make a layer that holds its parameters; got the Lin"):
        toy_block(transformer_layer_module=lambda: Layer())
