"""Layers of NNX in the shim against an unrolled loop, and the shim in modules of NNX."""

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from flax import nnx
from golden import assert_close
from helpers import align_oracle
from jax import Array
from maxtext import EMBED, SEGMENTS, toy_config, toy_decoder, toy_inputs

from equinox_mtp import linen, nn


class NNXLayer(nnx.Module):
    """A layer with everything that differs from instance to instance, and means nothing."""

    instances = itertools.count(1)

    def __init__(self, config: Any, mesh: Any, model_mode: str, *, rngs: nnx.Rngs):
        number = next(NNXLayer.instances)
        size, rate, slope = config.emb_dim, config.dropout_rate, 0.5

        def initial(key: Array) -> Array:
            return jax.random.normal(key, (size, size)) / np.sqrt(size + 0 * len(self.name))

        self.name = f"layer_{number}"
        self.lock = object()
        self.counter = itertools.count(number)
        # A closure that holds the layer itself, as MaxText's initial values of attention do.
        self.initial = initial
        self.kernel = nnx.Param(initial(rngs.params()), owner=self.name, number=number)
        self.activation = lambda x: jnp.tanh(slope * x)
        self.scale = partial(jnp.multiply, 2.0)
        self.rngs = rngs
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        inputs: Array,
        decoder_segment_ids: Any,
        decoder_positions: Any,
        deterministic: bool,
        model_mode: str,
    ) -> tuple[Array, None]:
        hidden = self.scale(self.activation(inputs @ self.kernel.get_value()))
        return inputs + self.dropout(hidden, deterministic=deterministic), None


def rms_norm(x: Array) -> Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def unrolled(num_depths: int, config: Any, key: Array, *, deterministic: bool) -> Any:
    """Loss, and gradients of each depth's kernels and of the hidden states, without stacking."""
    inputs, decoder = toy_inputs(), toy_decoder()
    aligned = align_oracle(
        *(np.asarray(inputs[name]) for name in ("input_ids", "target_ids")),
        num_depths=num_depths,
        segment_ids=SEGMENTS,
    )
    layers, projections = [], []
    for depth_key in jax.random.split(key, num_depths):
        projection_key, layer_key = jax.random.split(depth_key)
        layers.append(NNXLayer(config, None, "train", rngs=nnx.Rngs(layer_key)))
        projections.append(nn.Linear(2 * EMBED, EMBED, key=projection_key).kernel)

    def loss_fn(kernels: list[Array], projections: list[Array], hidden: Array) -> Array:
        losses = []
        for k, (layer, kernel, projection) in enumerate(
            zip(layers, kernels, projections, strict=True)
        ):
            layer = nnx.clone(layer)
            layer.kernel.set_value(kernel)
            embedding = decoder.embedding[aligned["input_ids"][k]]
            combined = jnp.concatenate([rms_norm(embedding), rms_norm(hidden)], axis=-1)
            hidden, _ = layer(
                combined @ projection, None, None, deterministic=deterministic, model_mode="train"
            )
            logits = jax.nn.log_softmax(rms_norm(hidden) @ decoder.embedding.T)
            ids = aligned["target_ids"][k][..., None]
            token_losses = -jnp.take_along_axis(logits, ids, axis=-1)[..., 0]
            losses.append(jnp.sum(jnp.where(aligned["mask"][k], token_losses, 0.0)))
        return maxtext.LAMBDA * sum(losses, jnp.zeros(())) / aligned["mask"].sum()

    kernels = [layer.kernel.get_value() for layer in layers]
    return jax.value_and_grad(loss_fn, argnums=(0, 1, 2))(
        kernels, projections, inputs["main_hidden_state"]
    )


@pytest.mark.parametrize(
    ("num_depths", "deterministic"),
    [(1, True), (3, True), (3, False)],
    ids=["one", "plain", "dropout"],
)
def test_layers_of_nnx_are_an_unrolled_loop(num_depths: int, deterministic: bool) -> None:
    config = toy_config(num_depths, 0, dropout_rate=0.5)
    key = jax.random.key(3)
    block = linen.MultiTokenPredictionBlock(config, None, NNXLayer, toy_decoder(), rngs=key)
    inputs = toy_inputs(deterministic=deterministic)
    hidden = inputs.pop("main_hidden_state")

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss_fn(differentiated: Any) -> Array:
        block, hidden = differentiated
        collections = block(main_hidden_state=hidden, **inputs)
        return linen.calculate_mtp_loss(collections, config)

    loss, (of_block, of_hidden) = loss_fn((block, hidden))
    expected, (of_kernels, of_projections, of_states) = unrolled(
        num_depths, config, key, deterministic=deterministic
    )
    assert_close(loss, expected)
    assert_close(of_hidden, of_states)
    params = linen.to_linen_params(of_block.block)
    for depth, (kernel, projection) in enumerate(
        zip(of_kernels, of_projections, strict=True), start=1
    ):
        layer = params[f"mtp_layer_{depth}"]
        assert_close(layer[f"mtp_{depth}_transformer_layer"]["kernel"], kernel)
        assert_close(layer[f"mtp_{depth}_projection"]["kernel"], projection)


def test_layers_of_nnx_with_parameters_from_outside() -> None:
    # A block in Linen's form is made without values first, and then anew for each `init`.
    config = toy_config(2, 0, dropout_rate=0.0)
    key = jax.random.key(3)
    block = maxtext.toy_block(config, transformer_layer_module=NNXLayer)
    variables = block.init(key)

    @jax.jit
    @jax.value_and_grad
    def loss_fn(params: Any) -> Array:
        _, out = block.apply({"params": params}, **toy_inputs(), mutable=["mtp_losses"])
        return linen.calculate_mtp_loss(out, config)

    loss, gradients = loss_fn(variables["params"])
    expected, (of_kernels, _, _) = unrolled(2, config, key, deterministic=True)
    assert_close(loss, expected)
    for depth in (1, 2):
        layer = gradients[f"mtp_layer_{depth}"][f"mtp_{depth}_transformer_layer"]
        assert layer.keys() == {"kernel"}
        assert_close(layer["kernel"], of_kernels[depth - 1])


class Metadata(nnx.Module):
    """One variable, one attribute and one function."""

    def __init__(self, rngs: nnx.Rngs, metadata: Any, attributes: Any):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (EMBED,)), **metadata)
        self.rngs = rngs
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, inputs: Array, **_: Any) -> Array:
        return inputs * self.kernel.get_value()


def make_two(metadata: tuple[Any, Any], attributes: tuple[Any, Any]) -> Any:
    numbers = itertools.count()

    def make_layer(rngs: Any) -> Metadata:
        k = next(numbers)
        return Metadata(nnx.Rngs(rngs), metadata[k], attributes[k])

    return linen.MultiTokenPredictionBlock(
        toy_config(2, 0), None, make_layer, toy_decoder(), rngs=jax.random.key(0)
    )


@pytest.mark.parametrize(
    ("metadata", "attributes"),
    [
        (({"owner": "a"}, {"owner": "b"}), ({}, {})),
        (({"number": 1}, {"number": 2}), ({}, {})),
        (tuple({"initial": partial(jnp.full, fill_value=1.0)} for _ in range(2)), ({}, {})),
        (({}, {}), ({"name": "layer_1"}, {"name": "layer_12"})),
        (({}, {}), tuple({"function": partial(jnp.multiply, 2.0)} for _ in range(2))),
    ],
    ids=["text", "integer", "function", "name", "partial"],
)
def test_labels_of_nnx_do_not_count(metadata: Any, attributes: Any) -> None:
    layers = make_two(metadata, attributes).block.layers
    assert layers.transformer_layer.function.kernel.get_value().shape == (2, EMBED)


@pytest.mark.parametrize(
    ("metadata", "attributes", "message"),
    [
        (({"factor": 1.5}, {"factor": 2.5}), ({}, {}), r"\.kernel\.factor` .* 1.5 .* 2.5"),
        (({"a": 1}, {"b": 1}), ({}, {}), r"\.kernel"),
        (
            tuple({"out_sharding": (axis,), "eager_sharding": False} for axis in "xy"),
            ({}, {}),
            r"\.out_sharding.*'x'.* at depth 1, and .*'y'",
        ),
        (({}, {}), ({"name": "relu"}, {"name": "gelu"}), r"\.name` .*'relu' .*'gelu'"),
        (({}, {}), ({"name": "relu"}, {"name": "relu6"}), r"\.name` .*'relu' .*'relu6'"),
        (({}, {}), ({"window": 1}, {"window": 2}), r"\.window` \(static\) is 1 .* 2"),
        (({}, {}), ({"act": nnx.relu}, {"act": nnx.gelu}), r"\.act.*relu.*gelu"),
        (({}, {}), ({"dtype": jnp.float32}, {"dtype": jnp.float16}), r"\.dtype.*float32.*float16"),
    ],
    ids=["number", "keys", "sharding", "name", "numbered", "attribute", "function", "dtype"],
)
def test_what_differs_in_meaning_is_named(metadata: Any, attributes: Any, message: str) -> None:
    with pytest.raises(ValueError, match="depth 2 differs from depth 1: .*" + message) as raised:
        make_two(metadata, attributes)
    assert len(str(raised.value)) < 400


class Holder(nnx.Module):
    """A model of NNX with the shim's block as an attribute."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(maxtext.VOCAB, EMBED, rngs=rngs)
        self.mtp_block = linen.MultiTokenPredictionBlock(
            config, None, NNXLayer, toy_decoder(), rngs=rngs
        )
        self.first = self.mtp_block.mtp_layer_1

    def __call__(self, inputs: dict[str, Any]) -> Array:
        arguments: dict[str, Any] = inputs | {"shared_embedding": self.embed}
        collections = self.mtp_block(**arguments)
        return linen.calculate_mtp_loss(collections, self.config)


def test_a_block_is_data_of_a_module() -> None:
    config = toy_config(2, 0, dropout_rate=0.0)
    model, inputs = Holder(config, nnx.Rngs(0)), toy_inputs()
    expected = model(inputs)
    # What NNX does with a model: take it apart, put it together, and compile it.
    graph, state = nnx.split(model)
    assert_close(nnx.jit(lambda model: model(inputs))(nnx.merge(graph, state)), expected)
    kernels = dict(nnx.to_flat_state(nnx.state(model.mtp_block)))
    path = ("block", "layers", "transformer_layer", "function", "kernel")
    assert kernels[path].get_value().shape == (2, EMBED, EMBED)

    gradient = jax.grad(lambda state: nnx.merge(graph, state)(inputs), allow_int=True)(state)
    reference = eqx.filter_grad(
        lambda block: linen.calculate_mtp_loss(
            block(**inputs | {"shared_embedding": model.embed}), config
        )
    )(model.mtp_block)
    actual = dict(nnx.to_flat_state(gradient["mtp_block"]))[path].get_value()
    of_block = reference.block.layers.transformer_layer.function.kernel.get_value()
    assert_close(actual, of_block)
    assert float(jnp.abs(of_block).max()) > 0


@pytest.mark.parametrize("order", ["flax first", "flax last"])
def test_a_block_is_data_whenever_flax_is_imported(order: str) -> None:
    imports = ["from flax import nnx", "from equinox_mtp import linen"]
    code = "\n".join(
        [
            *(imports if order == "flax first" else reversed(imports)),
            "import jax, maxtext",
            "class Model(nnx.Module):",
            "    def __init__(self):",
            "        self.block = linen.MultiTokenPredictionBlock(maxtext.toy_config(1, 0), None,",
            "            maxtext.ToyLayer, maxtext.toy_decoder(), rngs=jax.random.key(0))",
            "assert nnx.state(Model())",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr


def test_streams_with_a_default_are_not_taken_for_variables() -> None:
    # An instance of `nnx.Rngs` has any attribute that it is asked for, each a stream of its own.
    block = make_two(({}, {}), ({}, {}))
    names = linen.to_linen_params(block.block)["mtp_layer_1"]["mtp_1_transformer_layer"]
    assert names.keys() == {"kernel"}
    assert block.block.layers.transformer_layer.function.rngs.default.key.get_value().shape == (2,)
