"""The Linen-style shim against the original's numbers, its layouts, and the library's own block."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import golden
import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from golden import assert_close, quick_jit
from helpers import align_oracle, assert_rejects
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray

import equinox_mtp as emtp
from equinox_mtp import linen, nn

COLLECTIONS = ["mtp_losses", "mtp_acceptance"]
CASES = [("a", 1), ("a", 2), ("c", 1)]
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-D{case[1]}")


# The original's numbers


@pytest.fixture
def _full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def one_hot_logits(predictions: np.ndarray) -> np.ndarray:
    return np.eye(256, dtype=np.float32)[predictions]


@pytest.mark.usefixtures("_full_precision")
@all_cases
def test_golden_values_and_gradients(case: tuple[str, int]) -> None:
    name, num_depths = case
    numbers = golden.load_numbers(name)
    config = maxtext.make_config(num_depths)
    block = maxtext.make_block(config)
    args, rows = maxtext.golden_inputs(name)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss_fn(params: Any, embedding: Array, hidden_states: Array) -> tuple[Array, Any]:
        _, collections = block.apply(
            {"params": params}, embedding, hidden_states, *args[2:], mutable=COLLECTIONS, **rows
        )
        return linen.calculate_mtp_loss(collections, config), collections

    params = maxtext.golden_params(num_depths)
    (loss, collections), gradients = loss_fn(params, *args[:2])
    assert_close(loss, numbers[f"D{num_depths}/mtp_loss"])
    assert collections.keys() == {"mtp_losses"}
    collected = collections["mtp_losses"]["mtp_block"]
    assert_close(collected["losses"], numbers[f"D{num_depths}/losses"])
    np.testing.assert_array_equal(collected["weights"], numbers[f"D{num_depths}/weights"])

    recorded = {
        key.removeprefix(f"D{num_depths}/grad/"): value
        for key, value in numbers.items()
        if key.startswith(f"D{num_depths}/grad/")
    }
    named = {
        key if key.startswith("decoder.") else f"mtp_block.{key}": value
        for key, value in gradients[0].items()
    }
    named |= {"token_embedder.embedding": gradients[1], "main_hidden_state": gradients[2]}
    assert named.keys() == recorded.keys()
    for key, expected in recorded.items():
        assert_close(named[key], expected)


@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize(
    ("name", "num_depths", "eval_depth"), [("a", 1, 1), ("a", 2, 1), ("a", 2, 2), ("c", 1, 1)]
)
def test_golden_acceptance(name: str, num_depths: int, eval_depth: int) -> None:
    numbers = golden.load_numbers(name)
    config = maxtext.make_config(num_depths, eval_depth)
    block = maxtext.make_block(config)
    args, rows = maxtext.golden_inputs(name)

    @quick_jit
    def run(params: Any) -> Any:
        return block.apply({"params": params}, *args, mutable=COLLECTIONS, **rows)[1]

    outputs = dict(run(maxtext.golden_params(num_depths)))
    recorded = f"D{num_depths}/eval{eval_depth}/"
    collected = outputs["mtp_acceptance"]["mtp_block"]
    for entry in ("mtp_preds", "mtp_mask"):
        expected = numbers[recorded + entry]
        np.testing.assert_array_equal(collected[entry], expected)
        assert (collected[entry].shape, collected[entry].dtype) == (expected.shape, expected.dtype)
    for suffix, logits in (
        ("", numbers["in/main_logits"] if name == "a" else None),
        ("_biased", one_hot_logits(numbers[recorded + "main_preds_biased"])),
    ):
        if logits is None:
            continue
        outputs["logits"] = jnp.asarray(logits)
        rate = linen.calculate_mtp_acceptance_rate(outputs, config)
        assert_close(rate, numbers[f"{recorded}acceptance_rate{suffix}"])


@pytest.mark.usefixtures("_full_precision")
def test_golden_through_the_modules() -> None:
    # The original's constructors, called outside of `jit`.
    numbers = golden.load_numbers("c")
    args, rows = maxtext.golden_inputs("c")
    params = maxtext.golden_params(1)
    of_decoder = {k.partition(".")[2]: v for k, v in params.items() if k.startswith("decoder.")}
    of_block = {k: v for k, v in params.items() if k.startswith("mtp_layer")}
    block = linen.MultiTokenPredictionBlock(
        config=maxtext.make_config(1, 1),
        mesh=None,
        transformer_layer_module=nn.TransformerDecoderLayer,
        decoder=linen.with_decoder_params(maxtext.make_decoder(), of_decoder),
        rngs=jax.random.key(0),
    )
    block = eqx.tree_at(lambda m: m.block, block, linen.from_linen_params(of_block, block.block))
    collections = block(*args, **rows)
    assert_close(collections["mtp_losses"]["mtp_block"]["losses"], numbers["D1/losses"])
    np.testing.assert_array_equal(
        collections["mtp_acceptance"]["mtp_block"]["mtp_preds"], numbers["D1/eval1/mtp_preds"]
    )
    embedding, hidden_states, *_ = args
    shifted = jnp.asarray(numbers["D1/rolled_input_ids"][0])
    hidden = block.mtp_layer_1(
        prev_hidden_state=hidden_states,
        target_token_embedding=embedding[shifted],
        **{name: rows[name] for name in ("position_ids", "decoder_segment_ids", "deterministic")},
    )
    assert_close(hidden, numbers["D1/hidden"][0])
    with pytest.raises(AttributeError, match="mtp_layer_one"):
        _ = block.mtp_layer_one
    with pytest.raises(ValueError, match="`depth` must lie in 1 … 1"):
        _ = block.mtp_layer_2


# A model that compiles quickly

VOCAB, EMBED, BATCH, SEQ = 11, 8, 2, 7


class ToyLayer(emtp.AbstractDecoderLayer):
    """Quick to compile; tells positions, documents and dropout apart."""

    gain: Array

    def __init__(self, *, key: PRNGKeyArray):
        self.gain = jax.random.normal(key, (EMBED,))

    def __call__(
        self,
        hidden_states: Array,
        *,
        position_ids: Array,
        segment_ids: Array | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Array:
        x = hidden_states * self.gain.astype(hidden_states.dtype)
        x += 0.1 * position_ids[..., None].astype(x.dtype)
        if segment_ids is not None:
            x += 0.01 * segment_ids[..., None].astype(x.dtype)
        if not inference:
            assert key is not None
            x += jax.random.normal(key, x.shape, x.dtype)
        return jnp.tanh(x)


class MaxTextLayer(eqx.Module):
    """The same with the original's constructor and call."""

    inner: ToyLayer
    seen: Any = eqx.field(static=True)

    def __init__(self, config: Any, mesh: Any, model_mode: str, rngs: PRNGKeyArray):
        assert config.emb_dim == EMBED
        self.inner = ToyLayer(key=rngs)
        self.seen = []

    def __call__(
        self,
        inputs: Array,
        decoder_segment_ids: Array | None,
        decoder_positions: Array,
        deterministic: bool,
        model_mode: str,
    ) -> tuple[Array, None]:
        assert model_mode in ("train", "eval")
        outputs = self.inner(
            inputs,
            position_ids=decoder_positions,
            segment_ids=decoder_segment_ids,
            inference=deterministic,
        )
        return outputs, None


class ToyDecoder(emtp.AbstractDecoder):
    """Tied embeddings, with a norm before the head."""

    embedding: Array
    norm: nn.RMSNorm

    def embed(self, input_ids: Array, position_ids: Array) -> Array:
        return self.embedding[input_ids]

    def __call__(self, input_ids: Array, **arguments: Any) -> Array:
        return self.embedding[input_ids]

    def final_norm(self, hidden_states: Array) -> Array:
        return self.norm(hidden_states)

    def output_head(self) -> Array:
        return self.embedding


def toy_config(num_depths: int = 2, eval_depth: int = 2, **overrides: Any) -> Any:
    return maxtext.make_config(num_depths, eval_depth, **{"emb_dim": EMBED, **overrides})


def toy_decoder() -> ToyDecoder:
    embedding = np.random.default_rng(7).normal(size=(VOCAB, EMBED))
    return ToyDecoder(jnp.asarray(embedding, jnp.float32), nn.RMSNorm(EMBED))


def toy_block(config: Any = None, **arguments: Any) -> linen.LinenBlock:
    return maxtext.make_block(
        toy_config() if config is None else config,
        **{"decoder": toy_decoder(), "transformer_layer_module": ToyLayer, **arguments},
    )


SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)


def toy_inputs(**overrides: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (BATCH, SEQ + 1)).astype(np.int32)
    return {
        "shared_embedding": None,
        "main_hidden_state": jnp.asarray(rng.normal(size=(BATCH, SEQ, EMBED)), jnp.float32),
        "input_ids": jnp.asarray(tokens[:, :-1]),
        "target_ids": jnp.asarray(tokens[:, 1:]),
        "target_mask": jnp.asarray(SEGMENTS),
        "position_ids": jnp.asarray(np.tile(np.arange(SEQ, dtype=np.int32), (BATCH, 1))),
        "decoder_segment_ids": jnp.asarray(SEGMENTS),
        "model_mode": "train",
        "deterministic": True,
        **overrides,
    }


def library_output(block: linen.LinenBlock, variables: Any, inputs: dict[str, Any]) -> Any:
    """What the library's own block says of the same."""
    like = eqx.filter_eval_shape(
        lambda key: emtp.MultiTokenPredictionBlock(
            emtp.MTPConfig.preset("maxtext", block.config.mtp_num_layers),
            ToyLayer,
            embed_size=EMBED,
            key=key,
        ),
        jax.random.key(0),
    )
    rows = {"segment_ids": inputs["decoder_segment_ids"], "position_ids": inputs["position_ids"]}
    targets = emtp.align_targets(
        *(inputs[name] for name in ("input_ids", "target_ids", "target_mask")),
        num_depths=block.config.mtp_num_layers,
        **rows,
    )
    module = linen.from_linen_params(variables, like)
    return eqx.filter_jit(module)(
        toy_decoder(), inputs["main_hidden_state"], targets, inference=True, **rows
    )


# Which collections are filled


@pytest.mark.parametrize(
    ("model_mode", "eval_depth", "with_targets", "filled"),
    [
        ("train", 0, True, {"mtp_losses"}),
        ("train", 2, True, {"mtp_losses", "mtp_acceptance"}),
        ("train", 2, False, {"mtp_acceptance"}),
        ("eval", 0, True, set()),
        ("eval", 1, True, {"mtp_acceptance"}),
        ("prefill", 1, False, {"mtp_acceptance"}),
    ],
)
def test_collections_are_filled_when_the_original_fills_them(
    model_mode: str, eval_depth: int, with_targets: bool, filled: set[str]
) -> None:
    block = toy_block(toy_config(2, eval_depth))
    inputs = toy_inputs(model_mode=model_mode)
    if not with_targets:
        inputs["target_ids"] = None
    variables = block.init(jax.random.key(0))
    output, collections = block.apply(variables, **inputs, mutable=COLLECTIONS)
    assert output == {}
    assert collections.keys() == filled
    library = library_output(block, variables, toy_inputs())
    if "mtp_losses" in filled:
        collected = collections["mtp_losses"]["mtp_block"]
        assert_close(collected["losses"], library.losses.losses)
        np.testing.assert_array_equal(collected["weights"], library.losses.weights)
    if "mtp_acceptance" in filled:
        collected = collections["mtp_acceptance"]["mtp_block"]
        depth = slice(eval_depth - 1, eval_depth)
        np.testing.assert_array_equal(collected["mtp_preds"], library.acceptance.predictions[depth])
        np.testing.assert_array_equal(collected["mtp_mask"], library.acceptance.mask[depth])


@pytest.mark.parametrize(
    ("mutable", "names"),
    [
        (True, {"params", "mtp_losses", "mtp_acceptance"}),
        ([], set()),
        ("mtp_losses", {"mtp_losses"}),
        (("params", "mtp_acceptance"), {"params", "mtp_acceptance"}),
        ({"unheard_of"}, set()),
    ],
)
def test_mutable_says_what_is_returned(mutable: Any, names: set[str]) -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    output, collections = block.apply(variables, **toy_inputs(), mutable=mutable)
    assert output == {}
    assert collections.keys() == names
    if "params" in names:
        assert collections["params"] is variables["params"]


def test_without_mutable_there_is_the_output_alone() -> None:
    block = toy_block()
    assert block.apply(block.init(jax.random.key(0)), **toy_inputs()) == {}


@pytest.mark.parametrize("mask_dtype", [np.int32, np.int8, bool, np.float32, None])
def test_masks_keep_their_dtype(mask_dtype: Any) -> None:
    block = toy_block()
    mask = None if mask_dtype is None else jnp.asarray(SEGMENTS.astype(mask_dtype))
    _, collections = block.apply(
        block.init(jax.random.key(0)), **toy_inputs(target_mask=mask), mutable=True
    )
    expected = align_oracle(
        *(np.asarray(toy_inputs()[name]) for name in ("input_ids", "target_ids")),
        num_depths=2,
        segment_ids=SEGMENTS,
    )["mask"]
    collected = collections["mtp_acceptance"]["mtp_block"]["mtp_mask"]
    np.testing.assert_array_equal(collected, expected[1:])
    assert collected.dtype == (np.int32 if mask_dtype is None else mask_dtype)
    weights = collections["mtp_losses"]["mtp_block"]["weights"]
    np.testing.assert_array_equal(weights, expected.sum((1, 2)))


def test_without_depths_nothing_is_collected() -> None:
    config = toy_config(0, 0)
    block = toy_block(config)
    variables = block.init(jax.random.key(0))
    assert variables == {"params": {}}
    output = block.apply(variables, **toy_inputs(), mutable=COLLECTIONS)
    assert output == ({}, {})
    assert linen.calculate_mtp_loss(output[1], config) == 0


def test_packed_documents_do_not_leak_as_they_do_in_the_original() -> None:
    block = toy_block()
    inputs = toy_inputs()
    _, collections = block.apply(block.init(jax.random.key(0)), **inputs, mutable=True)
    # The original shifts the segment ids themselves from depth to depth, and compares neighbours.
    segments, mask = SEGMENTS.copy(), SEGMENTS != 0
    original = []
    for _ in range(2):
        following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
        same = (segments == following) & (segments != 0)
        mask = np.where(same, np.pad(mask[:, 1:], ((0, 0), (0, 1))), False)
        original.append(mask.sum())
        segments = following
    weights = collections["mtp_losses"]["mtp_block"]["weights"]
    expected = align_oracle(
        *(np.asarray(inputs[name]) for name in ("input_ids", "target_ids")),
        num_depths=2,
        segment_ids=SEGMENTS,
    )["mask"]
    np.testing.assert_array_equal(weights, expected.sum((1, 2)))
    assert weights[0] == original[0]
    # It scores the last token of a document at depth 2, across its end.
    assert weights[1] < original[1]


# Linen's methods


def test_init_draws_the_same_from_every_form_of_a_key() -> None:
    key = jax.random.key(3)
    block = toy_block(rngs={"params": key})
    expected = block.init(key)["params"]

    class Rngs:
        def params(self) -> PRNGKeyArray:
            return key

    for rngs in (jax.random.PRNGKey(3), {"params": key}, {"default": key}, Rngs(), None):
        params = block.init(rngs)["params"]
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    other = block.init(jax.random.key(4))["params"]
    kernel = ("mtp_layer_1", "mtp_1_projection", "kernel")
    assert not np.array_equal(get(other, kernel), get(expected, kernel))


def get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("rngs", [{"dropout": jax.random.key(0)}, None])
def test_init_without_a_key_raises(rngs: Any) -> None:
    with pytest.raises(ValueError, match="`rngs` must hold a key for the stream 'params'"):
        toy_block().init(rngs)


@pytest.mark.parametrize("rngs", [7, jnp.zeros(2), jax.random.split(jax.random.key(0)), "key"])
def test_init_from_something_else_raises(rngs: Any) -> None:
    with pytest.raises(TypeError, match="`rngs` must be a key, a mapping"):
        toy_block().init(rngs)


def test_init_checks_the_arguments_of_the_call() -> None:
    block = toy_block()
    output, variables = block.init_with_output(jax.random.key(0), **toy_inputs())
    assert output == {}
    jax.tree.map(np.testing.assert_array_equal, variables, block.init(jax.random.key(0)))
    with pytest.raises(TypeError):
        block.init(jax.random.key(0), **toy_inputs(segments=None))
    with pytest.raises(Exception, match="input_ids"):
        block.init(jax.random.key(0), **toy_inputs(input_ids=jnp.zeros((BATCH, SEQ + 1), int)))


def test_bound_block_is_apply() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    bound = block.bind(variables, mutable="mtp_losses")
    output, collections = bound(**toy_inputs())
    assert output == {}
    expected = block.apply(variables, **toy_inputs(), mutable="mtp_losses")[1]
    jax.tree.map(np.testing.assert_array_equal, collections, expected)
    assert bound.unbind() == (block, variables)
    assert block.bind(variables)(**toy_inputs()) == {}


def test_a_block_without_variables_cannot_run() -> None:
    with pytest.raises(TypeError, match=r"use `block.apply\(variables"):
        toy_block()(**toy_inputs())
    for variables in ({}, {"mtp_losses": {}}):
        with pytest.raises(ValueError, match="`variables` must hold the collection 'params'"):
            toy_block().apply(variables, **toy_inputs())
    assert_rejects("variables", toy_block().apply, None, **toy_inputs())


def test_dropout_takes_its_own_key() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    run = quick_jit(
        lambda key: block.apply(
            variables,
            **toy_inputs(deterministic=False),
            mutable="mtp_losses",
            rngs={"params": jax.random.key(0), "dropout": key},
        )[1]["mtp_losses"]["mtp_block"]["losses"]
    )
    first, again, other = (run(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.all(np.abs(np.asarray(first - other)) > 1e-3)


def test_nothing_can_be_changed() -> None:
    block = toy_block()
    with pytest.raises(dataclasses.FrozenInstanceError):
        block.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    variables = block.init(jax.random.key(0))
    before = jax.tree.map(np.array, variables)
    block.apply(variables, **toy_inputs(), mutable=True)
    assert jax.tree.structure(before) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_repr_and_table() -> None:
    block = toy_block()
    assert repr(block) == (
        "LinenBlock(name='mtp_block', mtp_num_layers=2, emb_dim=8, dtype=float32, "
        "transformer_layer_module=ToyLayer, decoder=ToyDecoder, mesh=None)"
    )
    first, header, _, *rows, total = block.tabulate(jax.random.key(0)).splitlines()
    assert first == repr(block)
    assert header.split() == ["path", "shape", "dtype", "parameters"]
    assert [row.split() for row in rows][2] == [
        *("mtp_layer_1/mtp_1_projection/kernel", "[16,", "8]", "float32", "128")
    ]
    assert total.split() == ["total", str(2 * (8 + 8 + 128 + 8))]


# Dtypes


def test_dtypes_are_those_of_the_configuration() -> None:
    block = toy_block(toy_config(dtype="bfloat16", weight_dtype=jnp.bfloat16))
    variables = block.init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
    hidden_states = toy_inputs()["main_hidden_state"].astype(jnp.bfloat16)
    _, collections = block.apply(
        variables, **toy_inputs(main_hidden_state=hidden_states), mutable=True
    )
    losses = collections["mtp_losses"]["mtp_block"]["losses"]
    assert losses.dtype == jnp.float32
    exact = toy_block(toy_config())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    _, expected = exact.apply(wide, **toy_inputs(), mutable=True)
    assert_close(losses, expected["mtp_losses"]["mtp_block"]["losses"], 0.02)


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
        ("dtype", "int32"),
        ("dtype", "no dtype"),
        ("weight_dtype", None),
    ],
)
def test_what_makes_no_sense_in_a_configuration_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`config\.{name}` must be .*; got"):
        toy_block(toy_config(**{name: value}))


@pytest.mark.parametrize("name", ["num_query_heads", "num_kv_heads", "head_dim", "mlp_dim"])
def test_sizes_of_the_reference_layer_are_read(name: str) -> None:
    config = maxtext.make_config()
    delattr(config, name)
    with pytest.raises(ValueError, match=f"must have the attribute `{name}`"):
        maxtext.make_block(config)


@pytest.mark.parametrize("value", [-0.1, "0.1", float("inf"), None])
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
        (MaxTextLayer, ("inner", "gain")),
        (partial(MaxTextLayer, mesh=None), ("inner", "gain")),
        (function_layer, None),
    ],
    ids=["class", "factory", "original-class", "partial", "function"],
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


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (7, "must be a class or a function that makes a layer.*got a `int`"),
        (ToyLayer(key=jax.random.key(0)), "must be a class or a function.*got a `ToyLayer`"),
        (lambda: 3, "must make a layer that can be called; got a `int`"),
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


# Transformations


def test_vmap_over_apply() -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    inputs = toy_inputs()
    hidden_states = inputs.pop("main_hidden_state")

    def losses(variables: Any, hidden_states: Array) -> Array:
        _, out = block.apply(variables, **inputs, main_hidden_state=hidden_states, mutable=True)
        return out["mtp_losses"]["mtp_block"]["losses"]

    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x + 1]), variables)
    batched = quick_jit(jax.vmap(losses, in_axes=(0, None)))(several, hidden_states)
    for index in range(3):
        one = jax.tree.map(lambda x, index=index: x[index], several)
        assert_close(batched[index], losses(one, hidden_states))
    gradients = quick_jit(jax.vmap(jax.grad(lambda v: losses(v, hidden_states).sum())))(several)
    one = jax.tree.map(lambda x: x[1], several)
    expected = quick_jit(jax.grad(lambda v: losses(v, hidden_states).sum()))(one)
    jax.tree.map(lambda x, y: assert_close(x[1], y), gradients, expected)


# Shifting across shards


def context_mesh(name: str = "context") -> Mesh:
    return jax.make_mesh((4,), (name,), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


@pytest.mark.parametrize("shift", [0, -1, -3, -5])
def test_shifting_fetches_across_a_context_axis(shift: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(1, 100, (2, 16)).astype(np.int32)
    segments = np.sort(rng.integers(0, 4, (2, 16)), axis=1)[:, ::-1].astype(np.int32).copy()
    specs: dict[str, Any] = {"in_specs": P(None, "context"), "out_specs": P(None, "context")}
    mapped = jax.shard_map(lambda x: linen.roll_and_mask(x, shift), mesh=context_mesh(), **specs)
    np.testing.assert_array_equal(jax.jit(mapped)(x), emtp.roll_and_mask(x, shift))
    mapped = jax.shard_map(
        lambda x, s: linen.roll_and_mask_by_segment(x, s, shift), mesh=context_mesh(), **specs
    )
    expected = emtp.roll_and_mask_by_segment(x, segments, shift)
    np.testing.assert_array_equal(jax.jit(mapped)(x, segments), expected)


def test_shifting_stays_within_rows_on_other_axes() -> None:
    x = np.arange(16, dtype=np.int32)[None] + 1
    specs: dict[str, Any] = {"in_specs": P(None, "data"), "out_specs": P(None, "data")}
    mapped = jax.shard_map(linen.roll_and_mask, mesh=context_mesh("data"), **specs)
    expected = np.pad(x.reshape(4, 4)[:, 1:], ((0, 0), (0, 1))).reshape(1, 16)
    np.testing.assert_array_equal(jax.jit(mapped)(x), expected)
    np.testing.assert_array_equal(linen.roll_and_mask(x), np.pad(x[:, 1:], ((0, 0), (0, 1))))
    np.testing.assert_array_equal(linen.roll_and_mask_by_segment(x, None), linen.roll_and_mask(x))


# Meshes


@pytest.mark.parametrize("with_rules", [False, True])
def test_embeddings_are_laid_out_on_a_mesh(with_rules: bool) -> None:
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    rules = [
        ("activation_batch", ["replica", "data"]),
        ("activation_length", "context"),
        ("activation_embed", ()),
    ]
    overrides: dict[str, Any] = {"logical_axis_rules": rules} if with_rules else {}
    config = toy_config(**overrides)
    block, plain = toy_block(config, mesh=mesh), toy_block(config)
    variables = plain.init(jax.random.key(0))
    run = jax.jit(lambda v: block.apply(v, **toy_inputs(), mutable=True)[1])
    text = run.lower(variables).as_text()
    expected = '[{"data"}, {}, {}]' if with_rules else '[{"data"}, {}, {"tensor"}]'
    assert expected in text
    jax.tree.map(
        lambda x, y: assert_close(x, y),
        run(variables),
        plain.apply(variables, **toy_inputs(), mutable=True)[1],
    )
    assert "'data': 2" in repr(block)


def test_explicit_axes_are_left_to_jax() -> None:
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2]
    )
    block, plain = toy_block(mesh=mesh), toy_block()
    variables = plain.init(jax.random.key(0))
    run = jax.jit(lambda v: block.apply(v, **toy_inputs(), mutable=True)[1])
    jax.tree.map(
        lambda x, y: assert_close(x, y),
        run(variables),
        plain.apply(variables, **toy_inputs(), mutable=True)[1],
    )


# What was collected


@pytest.mark.parametrize(
    ("losses", "weights"),
    [
        (jnp.asarray([3.0, 5.0]), jnp.asarray([2.0, 6.0])),
        ((jnp.float32(3), jnp.float32(5)), (jnp.float32(2), jnp.float32(6))),
        ([np.float32(3), np.float32(5)], [np.float32(2), np.float32(6)]),
        ((jnp.asarray([3.0, 5.0]),), (jnp.asarray([2.0, 6.0]),)),
        (jnp.asarray(8.0), jnp.asarray(8.0)),
    ],
)
def test_loss_of_every_form(losses: Any, weights: Any) -> None:
    outputs = {"mtp_losses": {"mtp_block": {"losses": losses, "weights": weights}}}
    loss = linen.calculate_mtp_loss(outputs, maxtext.make_config())
    assert_close(loss, maxtext.LAMBDA * 8 / 8)


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"mtp_losses": {}, "mtp_acceptance": {}},
        {"mtp_losses": None},
        {"mtp_losses": {"mtp_block": {}}, "mtp_acceptance": {"mtp_block": {}}},
        {"mtp_losses": {"mtp_block": {"losses": (), "weights": ()}}},
        {"mtp_losses": {"mtp_block": {"losses": jnp.zeros(0), "weights": jnp.zeros(0)}}},
        {"mtp_losses": {"mtp_block": {"losses": jnp.zeros(2), "weights": jnp.zeros(2)}}},
        {"mtp_acceptance": {"mtp_block": {"mtp_preds": (), "mtp_mask": ()}}},
    ],
)
def test_nothing_collected_is_zero(outputs: Any) -> None:
    config = maxtext.make_config(1, 1)
    assert linen.calculate_mtp_loss(outputs, config) == 0.0
    assert linen.calculate_mtp_acceptance_rate(outputs, config) == 0.0


@pytest.mark.parametrize("eval_depth", [1, 2, 3])
@pytest.mark.parametrize("form", ["array", "tuple", "flat"])
def test_acceptance_of_every_form(eval_depth: int, form: str) -> None:
    rng = np.random.default_rng(eval_depth)
    predictions, main = rng.integers(0, 3, (2, 2, 9))
    mask = rng.integers(0, 2, (2, 9)).astype(np.int32)
    accepted = total = 0
    for b, i in np.ndindex(2, 9):
        if mask[b, i]:
            total += 1
            reference = main[b, i + eval_depth] if i + eval_depth < 9 else 0
            accepted += predictions[b, i] == reference
    forms = {
        "array": (predictions.astype(np.float32)[None], mask[None]),
        "tuple": ((jnp.asarray(predictions, jnp.float32)[None],), (jnp.asarray(mask)[None],)),
        "flat": (jnp.asarray(predictions, jnp.float32), jnp.asarray(mask)),
    }
    preds, masks = forms[form]
    outputs = {
        "mtp_acceptance": {"mtp_block": {"mtp_preds": preds, "mtp_mask": masks}},
        "logits": jnp.asarray(one_hot_logits(main)),
    }
    rate = linen.calculate_mtp_acceptance_rate(outputs, maxtext.make_config(3, eval_depth))
    assert_close(rate, 100 * accepted / total)


def test_collections_of_another_block_raise() -> None:
    config = maxtext.make_config(1, 1)
    other = {"other": {"losses": jnp.ones(1), "weights": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"must hold 'mtp_block'; got \['other'\]"):
        linen.calculate_mtp_loss({"mtp_losses": other}, config)
    with pytest.raises(ValueError, match=r"must hold 'mtp_block'; got \['other'\]"):
        linen.calculate_mtp_acceptance_rate({"mtp_acceptance": other}, config)
    assert_rejects("intermediate_outputs", linen.calculate_mtp_loss, ({}, {}), config)
    collected = {"mtp_preds": jnp.ones((1, 2, 3)), "mtp_mask": jnp.ones((1, 2, 3))}
    with pytest.raises(ValueError, match="must hold the main model's logits under 'logits'"):
        linen.calculate_mtp_acceptance_rate({"mtp_acceptance": {"mtp_block": collected}}, config)
