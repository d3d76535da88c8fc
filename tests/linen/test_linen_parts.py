"""What the shim is made of: configurations, decoders and layers of every kind."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from golden import assert_close, quick_jit
from jax.sharding import AxisType
from jaxtyping import Array, PRNGKeyArray
from maxtext import (
    BATCH,
    EMBED,
    SEGMENTS,
    SEQ,
    VOCAB,
    MaxTextLayer,
    ToyDecoder,
    ToyLayer,
    get,
    toy_block,
    toy_config,
    toy_decoder,
    toy_inputs,
)

import equinox_mtp as emtp
from equinox_mtp import linen

COLLECTIONS = ["mtp_losses", "mtp_acceptance"]


# Configurations


@pytest.mark.parametrize(
    "name",
    [
        "mtp_num_layers",
        "mtp_eval_target_module",
        "emb_dim",
        "normalization_layer_epsilon",
        "dtype",
        "weight_dtype",
    ],
)
def test_what_a_configuration_lacks_is_named(name: str) -> None:
    config = toy_config()
    delattr(config, name)
    with pytest.raises(
        ValueError, match=f"`config` must have the attribute `{name}`.*got a `SimpleNamespace`"
    ):
        toy_block(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mtp_num_layers", -1),
        ("mtp_num_layers", 1.5),
        ("mtp_num_layers", True),
        ("mtp_eval_target_module", 3),
        ("mtp_eval_target_module", -1),
        ("emb_dim", 0),
        ("emb_dim", "8"),
        ("normalization_layer_epsilon", 0.0),
        ("normalization_layer_epsilon", float("nan")),
        ("mtp_final_norm", "no"),
        ("dtype", "int32"),
        ("dtype", "no dtype"),
        ("weight_dtype", None),
    ],
)
def test_what_makes_no_sense_in_a_configuration_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`config\.{name}` must be .*; got"):
        toy_block(toy_config(**{name: value}))


@pytest.mark.parametrize("name", ["num_query_heads", "num_kv_heads", "head_dim", "mlp_dim"])
def test_a_mapping_is_no_configuration(name: str) -> None:
    with pytest.raises(ValueError, match=r"Pass `types.SimpleNamespace\(\*\*config\)`"):
        maxtext.make_block({name: 1})


def test_heads_that_do_not_divide_are_named() -> None:
    config = maxtext.make_config(num_kv_heads=3)
    with pytest.raises(ValueError, match=r"`config\.num_kv_heads` must divide `num_query_heads`"):
        maxtext.make_block(config)


@pytest.mark.parametrize("rules", ["abc", 5, ["abc"], [("activation_batch",)]])
def test_axis_rules_that_are_no_pairs_raise(rules: Any) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"`config\.logical_axis_rules` must be pairs"):
        toy_block(toy_config(logical_axis_rules=rules), mesh=mesh)


@pytest.mark.parametrize("name", ["num_query_heads", "num_kv_heads", "head_dim", "mlp_dim"])
def test_sizes_of_the_reference_layer_are_read(name: str) -> None:
    config = maxtext.make_config()
    delattr(config, name)
    with pytest.raises(ValueError, match=f"must have the attribute `{name}`"):
        maxtext.make_block(config)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5)])
def test_loss_scaling_of_every_type(value: Any) -> None:
    outputs = {"mtp_losses": {"mtp_block": {"losses": jnp.ones(2), "weights": jnp.ones(2)}}}
    config = maxtext.make_config(mtp_loss_scaling_factor=value)
    assert float(linen.calculate_mtp_loss(outputs, config)) == 0.5


@pytest.mark.parametrize("value", [-0.1, np.float64(-1), "0.1", float("inf"), None])
def test_loss_scaling_that_makes_no_sense_is_named(value: Any) -> None:
    outputs = {"mtp_losses": {"mtp_block": {"losses": jnp.ones(2), "weights": jnp.ones(2)}}}
    with pytest.raises(ValueError, match=r"`config\.mtp_loss_scaling_factor` must be a number"):
        linen.calculate_mtp_loss(outputs, maxtext.make_config(mtp_loss_scaling_factor=value))


# Decoders


def test_shared_embedding_takes_the_place_of_the_decoders() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    table = toy_decoder().embedding

    @quick_jit
    @jax.grad
    def gradient(table: Array | None, variables: Any) -> Array:
        _, out = block.apply(variables, **toy_inputs(shared_embedding=table), mutable=True)
        return linen.calculate_mtp_loss(out, block.config)

    shared = gradient(table, variables)
    # The same through `params["decoder"]`, and by the library.
    params = variables["params"] | {"decoder": linen.decoder_params(block.decoder)}

    @quick_jit
    @jax.grad
    def of_params(params: Any) -> Array:
        _, out = block.apply({"params": params}, **toy_inputs(), mutable=True)
        return linen.calculate_mtp_loss(out, block.config)

    gradients = of_params(params)
    assert_close(shared, gradients["decoder"]["embedding"])
    assert float(jnp.abs(gradients["decoder"]["norm"]["scale"]).max()) > 1e-4
    small = 1e-2 * np.eye(VOCAB, EMBED)[:2]

    def loss(table: Array) -> float:
        _, out = block.apply(variables, **toy_inputs(shared_embedding=table), mutable=True)
        return float(linen.calculate_mtp_loss(out, block.config))

    for row in range(2):
        step = jnp.zeros_like(table).at[row].set(jnp.asarray(small[row], jnp.float32))
        change = loss(table + step) - loss(table - step)
        np.testing.assert_allclose(change, 2 * jnp.sum(step * shared), rtol=2e-3, atol=1e-7)


def test_module_with_an_embedding_is_one() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))

    class Embed:
        embedding = 2 * toy_decoder().embedding

    outputs = [
        block.apply(variables, **toy_inputs(shared_embedding=shared), mutable=True)[1]
        for shared in (Embed(), Embed.embedding, None)
    ]
    first, second, own = (out["mtp_losses"]["mtp_block"]["losses"] for out in outputs)
    np.testing.assert_array_equal(first, second)
    assert np.all(np.asarray(first) != np.asarray(own))


def test_shared_embedding_that_fits_nowhere_raises() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"`shared_embedding` must have the shape \(11, 8\)"):
        block.apply(variables, **toy_inputs(shared_embedding=jnp.zeros((12, 8))))

    class Wrapper(emtp.AbstractDecoder):
        decoder: emtp.AbstractDecoder

        def embed(self, input_ids: Array, position_ids: Array) -> Array:
            return self.decoder.embed(input_ids, position_ids)

        def __call__(self, input_ids: Array, **arguments: Any) -> Any:
            return self.decoder(input_ids, **arguments)

        def final_norm(self, hidden_states: Array) -> Array:
            return self.decoder.final_norm(hidden_states)

        def output_head(self) -> Any:
            return self.decoder.output_head()

    block = toy_block(decoder=Wrapper(toy_decoder()))
    with pytest.raises(TypeError, match="`shared_embedding` must be `None` for a decoder without"):
        block.apply(variables, **toy_inputs(shared_embedding=jnp.zeros((11, 8))))


def test_decoder_without_the_methods_raises() -> None:
    with pytest.raises(TypeError, match="`decoder` must have the method `_apply_embedding`"):
        toy_block(decoder=object())

    class Half:
        def _apply_embedding(self) -> None: ...

    with pytest.raises(TypeError, match="`decoder` must have the method `apply_output_head`"):
        toy_block(decoder=Half())
    with pytest.raises(TypeError, match="the method `apply_output_projection`"):
        toy_block(toy_config(mtp_final_norm=True), decoder=Half())


def test_decoder_that_is_no_pytree_lends_its_methods() -> None:
    # As an NNX module, or one of plain Python.
    decoder = toy_decoder()

    class Plain:
        def _apply_embedding(self, shared: Any, ids: Array, positions: Array, *_: Any, **__: Any):
            return decoder.embedding[ids]

        def apply_output_head(self, shared: Any, hidden_states: Array, *_: Any) -> Array:
            return decoder.norm(hidden_states) @ decoder.embedding.T

    plain, own = toy_block(decoder=Plain()), toy_block()
    variables = own.init(jax.random.key(0))
    out, expected = (
        block.apply(variables, **toy_inputs(), mutable=True)[1] for block in (plain, own)
    )
    jax.tree.map(lambda x, y: assert_close(x, y), out, expected)
    params = variables["params"] | {"decoder": {"norm": {"scale": jnp.ones(EMBED)}}}
    with pytest.raises(ValueError, match="norm/scale: not known"):
        plain.apply({"params": params}, **toy_inputs())


@pytest.mark.parametrize("kind", ["abstract", "original"])
def test_depths_with_their_own_norm(kind: str) -> None:
    config = toy_config(mtp_final_norm=True)
    decoder = toy_decoder()

    class Original(eqx.Module):
        decoder: ToyDecoder

        def _apply_embedding(self, shared: Any, ids: Array, *_: Any, **__: Any) -> Array:
            return self.decoder.embedding[ids]

        def apply_output_projection(self, shared: Any, hidden_states: Array, *_: Any) -> Array:
            return hidden_states @ self.decoder.embedding.T

    block = toy_block(config, decoder=Original(decoder) if kind == "original" else decoder)
    variables = block.init(jax.random.key(0))
    scale = jnp.linspace(0.5, 1.5, EMBED)
    for depth in (1, 2):
        layer = variables["params"][f"mtp_layer_{depth}"]
        layer[f"mtp_{depth}_final_norm"]["scale"] = scale * depth
    _, collections = block.apply(variables, **toy_inputs(), mutable=True)
    like = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig(2, output_norm="own"), ToyLayer, embed_size=EMBED, key=jax.random.key(1)
    )
    inputs = toy_inputs()
    rows = {"segment_ids": inputs["decoder_segment_ids"], "position_ids": inputs["position_ids"]}
    targets = emtp.align_targets(inputs["input_ids"], inputs["target_ids"], num_depths=2, **rows)
    expected = linen.from_linen_params(variables, like)(
        decoder, inputs["main_hidden_state"], targets, inference=True, **rows
    )
    assert_close(collections["mtp_losses"]["mtp_block"]["losses"], expected.losses.losses)


# Layers


def function_layer(
    *,
    inputs: Array,
    decoder_segment_ids: Array | None,
    decoder_positions: Array,
    deterministic: bool,
    model_mode: str,
) -> Array:
    layer = eqx.tree_at(lambda m: m.gain, ToyLayer(key=jax.random.key(0)), jnp.ones(EMBED))
    return layer(
        inputs,
        position_ids=decoder_positions,
        segment_ids=decoder_segment_ids,
        inference=deterministic,
    )


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (ToyLayer, ("gain",)),
        (lambda key: ToyLayer(key=key), ("gain",)),
        (lambda **given: ToyLayer(key=given["key"]), ("gain",)),
        (MaxTextLayer, ("inner", "gain")),
        (partial(MaxTextLayer, mesh=None), ("inner", "gain")),
        (function_layer, None),
    ],
    ids=["class", "factory", "any-arguments", "original-class", "partial", "function"],
)
def test_every_kind_of_layer(module: Any, names: tuple[str, ...] | None) -> None:
    block = toy_block(transformer_layer_module=module)
    variables = block.init(jax.random.key(0))
    reference = toy_block().init(jax.random.key(0))
    for depth in (1, 2):
        path = (f"mtp_layer_{depth}", f"mtp_{depth}_transformer_layer")
        if names is None:
            assert f"mtp_{depth}_transformer_layer" not in variables["params"][path[0]]
            get(reference["params"], path)["gain"] = jnp.ones(EMBED)
        else:
            get(reference["params"], path)["gain"] = get(variables["params"], (*path, *names))
    for mode in ("train", "eval"):
        inputs = toy_inputs(model_mode=mode)
        _, out = block.apply(variables, **inputs, mutable=True)
        _, expected = toy_block().apply(reference, **inputs, mutable=True)
        for name in COLLECTIONS:
            assert (name in out) == (name in expected)
            jax.tree.map(lambda x, y: assert_close(x, y), out.get(name, {}), expected.get(name, {}))


class HiddenArrays:
    """Of plain Python."""

    def __init__(self, rngs: PRNGKeyArray):
        self.gain = jax.random.normal(rngs, (EMBED,))

    def __call__(self, inputs: Array, **_: Any) -> Array:
        return inputs * self.gain


class TableLayer(eqx.Module):
    """Holds integers beside its parameters."""

    gain: Array
    table: Array

    def __init__(self, key: PRNGKeyArray):
        self.gain = jnp.ones(EMBED)
        self.table = jnp.arange(SEQ) % 2

    def __call__(self, inputs: Array, **_: Any) -> Array:
        return inputs * self.gain * self.table[:, None]


def test_arrays_of_integers_are_no_parameters() -> None:
    block = toy_block(transformer_layer_module=TableLayer)
    variables = block.init(jax.random.key(0))
    assert get(variables["params"]["mtp_layer_1"], ("mtp_1_transformer_layer",)).keys() == {"gain"}

    @quick_jit
    @jax.grad
    def gradient(variables: Any) -> Array:
        _, out = block.apply(variables, **toy_inputs(), mutable=True)
        return linen.calculate_mtp_loss(out, block.config)

    layer = gradient(variables)["params"]["mtp_layer_1"]
    assert float(jnp.abs(layer["mtp_1_projection"]["kernel"]).max()) > 0


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (7, "must be a class or a function that makes a layer.*got a `int`"),
        (ToyLayer(key=jax.random.key(0)), "must be a class or a function.*got a `ToyLayer`"),
        (lambda: 3, "must make a layer that can be called; got a `int`"),
        (HiddenArrays, "layer whose arrays JAX can see; got a `HiddenArrays`, which is no pytree"),
    ],
)
def test_what_makes_no_layer_raises(module: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        toy_block(transformer_layer_module=module)


def test_layer_module_has_the_originals_parts() -> None:
    layer = linen.MultiTokenPredictionLayer(
        toy_config(), None, 2, MaxTextLayer, rngs={"params": jax.random.key(0)}
    )
    assert layer.layer_number == 2
    np.testing.assert_array_equal(layer.embedding_norm.scale, np.ones(EMBED))
    np.testing.assert_array_equal(layer.hidden_state_norm.scale, np.ones(EMBED))
    assert layer.projection_layer.kernel.shape == (2 * EMBED, EMBED)
    assert isinstance(layer.transformer_layer, MaxTextLayer)
    rng = np.random.default_rng(0)
    hidden, embedding = (
        jnp.asarray(rng.normal(size=(BATCH, SEQ, EMBED)), jnp.float32) for _ in range(2)
    )
    rows = {name: toy_inputs()[name] for name in ("position_ids", "decoder_segment_ids")}
    out = layer(hidden, embedding, **rows, deterministic=True, model_mode="eval")
    h, e = (np.asarray(x, np.float64) for x in (hidden, embedding))
    normed = [x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) for x in (e, h)]
    kernel, gain = layer.projection_layer.kernel, layer.transformer_layer.inner.gain
    x = np.concatenate(normed, axis=-1) @ np.asarray(kernel, np.float64) * np.asarray(gain)
    x += 0.1 * np.arange(SEQ)[None, :, None] + 0.01 * SEGMENTS[..., None]
    assert_close(out, np.tanh(x))
