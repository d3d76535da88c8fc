"""Which layers can be stacked: functions compared by what they do."""

import functools
import itertools
import math
import operator
import threading
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from equinox_mtp import AbstractDecoderLayer, MTPConfig, MultiTokenPredictionBlock
from equinox_mtp.stacking import stack_layers


class Layer(eqx.Module):
    """An array, and anything beside it."""

    weight: Array
    dynamic: Any
    static: Any = eqx.field(static=True)

    def __init__(self, weight: float, dynamic: Any = None, static: Any = None):
        self.weight = jnp.full(2, weight)
        self.dynamic = dynamic
        self.static = static


def closure(power: Any) -> Callable[[Array], Array]:
    return lambda x: x**power


def with_default(power: float) -> Callable[..., Array]:
    def function(x: Array, power: float = power) -> Array:
        return x**power

    return function


def of_another_closure(power: float) -> Callable[[Array], Array]:
    inner = closure(power)
    return lambda x: inner(x) + 1


def calls_itself(depth: int) -> Callable[[int], int]:
    def function(n: int) -> int:
        return 0 if n == depth else function(n + 1)

    return function


def attributed(value: Any) -> Callable[[Array], Array]:
    def function(x: Array) -> Array:
        return x

    function.rate = value  # pyright: ignore[reportFunctionMemberAccess]
    return function


class Plain:
    """Compared by identity in Python."""

    def __init__(self, rate: float, function: Any = None):
        self.rate = rate
        self.function = function

    def method(self, x: Array) -> Array:
        return x * self.rate


class Slotted:
    """Without a `__dict__`."""

    __slots__ = ("rate",)

    def __init__(self, rate: float):
        self.rate = rate


ALIKE: dict[str, Callable[[], Any]] = {
    "closure": lambda: closure(3.0),
    "nan": lambda: closure(math.nan),
    "default": lambda: with_default(3.0),
    "closure-of-closure": lambda: of_another_closure(3.0),
    "recursion": lambda: calls_itself(3),
    "attribute": lambda: attributed(3.0),
    "closure-array": lambda: closure(np.arange(3.0)),
    "closure-key": lambda: closure(jax.random.key(next(SEEDS))),
    "partial": lambda: functools.partial(closure(3.0), jnp.asarray(1.0)),
    "jit": lambda: jax.jit(closure(3.0)),
    "vmap": lambda: jax.vmap(closure(3.0), in_axes=1),
    "checkpoint": lambda: jax.checkpoint(closure(3.0)),
    "custom-jvp": lambda: jax.custom_jvp(closure(3.0)),
    "object": lambda: Plain(3.0, closure(2.0)),
    "slots": lambda: Slotted(3.0),
    "method": lambda: Plain(3.0).method,
    "containers": lambda: ({"f": closure(3.0)}, [closure(2.0)], None),
    "counter": lambda: itertools.count(next(SEEDS)),
    "sentinel": lambda: (object(), threading.Lock()),
}
SEEDS = itertools.count()


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("field", ["dynamic", "static"])
def test_what_differs_in_identity_alone_is_the_first_layers(kind: str, field: str) -> None:
    layers = [Layer(float(k), **{field: ALIKE[kind]()}) for k in range(3)]
    stacked = stack_layers(layers)
    assert stacked is not None
    np.testing.assert_array_equal(stacked.weight, [[0, 0], [1, 1], [2, 2]])
    first = jax.tree.structure(layers[0])
    assert jax.tree.structure(stacked) == first
    if field == "static":
        assert stacked.static is layers[0].static


DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "number": (1.0, 2.0, "is 1.0 at depth 1, and 2.0 at depth 2"),
    "bool": (True, 1, "is True at depth 1, and 1 at depth 2"),
    "text": ("gelu", "silu", "is 'gelu' at depth 1, and 'silu' at depth 2"),
    "dtype": (jnp.dtype("float32"), jnp.dtype("bfloat16"), "float32.* and .*bfloat16"),
    "functions": (jax.nn.relu, jax.nn.gelu, "relu.*gelu"),
    "module-functions": (with_default, closure, r"`with_default` \(test_stacking.py:\d+\).*`clos"),
    "lambdas": (lambda x: x, lambda x: x + 1, "lambda>.* and another one"),
    "builtin": (math.sin, math.cos, "sin.*cos"),
    "classes": (Plain, Slotted, "Plain.*Slotted"),
    "ufuncs": (np.add, np.multiply, "add.*multiply"),
    "closure": (closure(2.0), closure(3.0), r"\.power` \(static\) is 2.0 at depth 1, and 3.0"),
    "deep": (of_another_closure(2.0), of_another_closure(3.0), r"\.inner\.power` .* 2.0 .* 3.0"),
    "closure-functions": (
        closure(jnp.sin),
        closure(jnp.cos),
        r"\.power\.__wrapped__` .*`sin` .*`cos`",
    ),
    "closure-array": (closure(np.arange(3)), closure(np.arange(1, 4)), r"\.power` .*and another"),
    "default": (with_default(2.0), with_default(3.0), r"__defaults__\[0\]` .* 2.0 .* 3.0"),
    "attribute": (attributed(1), attributed(2), r"\.rate` .* 1 .* 2"),
    "partial": (
        functools.partial(max, default=1),
        functools.partial(max, default=2),
        r"\.keywords\['default'\]` .* 1 .* 2",
    ),
    "partial-names": (
        functools.partial(max, default=1),
        functools.partial(max, key=len),
        "keywords",
    ),
    "partial-function": (functools.partial(max), functools.partial(min), "max.*min"),
    "jit": (jax.jit(closure(2.0)), jax.jit(closure(3.0)), r"power` .* 2.0 .* 3.0"),
    "vmap": (jax.vmap(closure(2.0), 0), jax.vmap(closure(2.0), 1), "in_axes` .* 0 .* 1"),
    "object": (Plain(1.0), Plain(2.0), r"\.rate` .* 1.0 .* 2.0"),
    "slots": (Slotted(1.0), Slotted(2.0), r"\.rate` .* 1.0 .* 2.0"),
    "method": (Plain(1.0).method, Plain(2.0).method, r"__self__\.rate` .* 1.0 .* 2.0"),
    "methods": (Plain(1.0).method, Plain(1.0).__init__, "method.*__init__"),
    "opaque": (operator.itemgetter(1), operator.itemgetter(2), "itemgetter"),
    "container": ((1, 2), (1, 2, 3), r"\(1, 2\) at depth 1, and \(1, 2, 3\)"),
    "keys": ({"a": 1}, {"b": 1}, "'a'.*'b'"),
    "config": (
        MTPConfig(1),
        MTPConfig(1, concat_order="hidden_first"),
        r"\.concat_order` .*'embedding_first' at depth 1, and 'hidden_first'",
    ),
    "none": (None, 1.0, "is None at depth 1, and 1.0"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
@pytest.mark.parametrize("field", ["dynamic", "static"])
def test_what_differs_in_meaning_is_named(kind: str, field: str) -> None:
    first, other, message = DIFFERENT[kind]
    layers = [Layer(1.0, **{field: x}) for x in (first, other)]
    with pytest.raises(ValueError, match=rf"depth 2 differs from depth 1: `\.{field}") as raised:
        stack_layers(layers)
    assert raised.match(message)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (jnp.ones(2), jnp.ones(3), r"`\.dynamic` is f32\[2\] at depth 1, and f32\[3\] at depth 2"),
        (jnp.ones(2), jnp.ones(2, jnp.int32), r"f32\[2\] at depth 1, and i32\[2\]"),
        (jnp.ones(2), 1.0, r"f32\[2\] at depth 1, and 1.0"),
        (jnp.ones(2), np.ones(2), r"f32\[2\] at depth 1, and f64\[2\]\(numpy\)"),
        ({"a": jnp.ones(2)}, {"b": jnp.ones(2)}, "'a'.*'b'"),
        (Layer(1.0, [jnp.ones(2)]), Layer(1.0, [jnp.ones(3)]), r"\.dynamic\.dynamic\[0\]`"),
        (eqx.nn.Dropout(0.5), eqx.nn.Dropout(0.25), r"\.dynamic\.p` .* 0.5 .* 0.25"),
        ("x" * 1000, "y" * 1000, "xxx….* and 'yyy"),
    ],
    ids=["shape", "dtype", "kind", "numpy", "keys", "deep", "leaf", "long"],
)
def test_arrays_differ(first: Any, other: Any, message: str | None) -> None:
    layers = [Layer(1.0, first), Layer(1.0, other)]
    with pytest.raises(ValueError, match=message) as raised:
        stack_layers(layers)
    assert len(str(raised.value)) < 400


def test_keys_and_counters_are_stacked_as_the_arrays_they_are() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [Layer(1.0, (keys[k], jnp.asarray(k))) for k in range(3)]
    stacked = stack_layers(layers)
    assert stacked is not None
    one, other = map(jax.random.key_data, (stacked.dynamic[0], keys))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(stacked.dynamic[1], [0, 1, 2])


def test_no_layers_and_one() -> None:
    assert stack_layers([]) is None
    only = stack_layers([Layer(3.0, closure(1.0))])
    assert only is not None
    assert only.weight.shape == (1, 2)


class ClosureLayer(AbstractDecoderLayer):
    """Holds a function of its own in a static field, as a layer built by a factory does."""

    gain: Array
    function: Callable[[Array], Array] = eqx.field(static=True)

    def __call__(self, hidden_states: Array, **_: Any) -> Array:
        return self.function(hidden_states * self.gain)


@pytest.mark.parametrize("num_depths", [2, 3])
def test_equinox_layers_with_functions_of_their_own_make_a_block(num_depths: int) -> None:
    def make_layer(*, key: Array) -> ClosureLayer:
        return ClosureLayer(jax.random.normal(key, (4,)), closure(2.0))

    block = MultiTokenPredictionBlock(
        MTPConfig(num_depths), make_layer, embed_size=4, key=jax.random.key(0)
    )
    for depth, key in enumerate(jax.random.split(jax.random.key(0), num_depths), start=1):
        layer = block.layer(depth).transformer_layer
        assert isinstance(layer, ClosureLayer)
        _, layer_key = jax.random.split(key)
        expected = make_layer(key=layer_key)
        np.testing.assert_array_equal(layer.gain, expected.gain)
        x = jnp.arange(4.0)
        np.testing.assert_array_equal(layer(x), (x * expected.gain) ** 2)
    powers = itertools.count(2)
    with pytest.raises(ValueError, match=r"\.transformer_layer\.function\.power` .* 2 .* 3"):
        MultiTokenPredictionBlock(
            MTPConfig(num_depths),
            lambda key: ClosureLayer(jnp.ones(4), closure(next(powers))),
            embed_size=4,
            key=jax.random.key(0),
        )


def test_constants_of_layers_that_are_made_while_tracing() -> None:
    """As the initial values of a layer's parameters do, they hold arrays that have no value yet."""

    def shapes(*powers: Any) -> Any:
        # Only arrays leave the trace: what a static field holds there is of no use outside.
        return jax.eval_shape(
            lambda: stack_layers([Layer(1.0, static=closure(power())) for power in powers]).weight  # pyright: ignore
        )

    assert shapes(lambda: jnp.sqrt(2.0), lambda: jnp.sqrt(2.0)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"`.static.power` \(static\) is weak_f32"):
        shapes(lambda: jnp.sqrt(2.0), lambda: jnp.sqrt(jnp.ones(3)))


class Named(eqx.Module):
    """A name that says what is computed."""

    weight: Array
    name: str = eqx.field(static=True)


@pytest.mark.parametrize("other", ["relu6", "top2"])
def test_a_name_in_an_equinox_module_is_no_label(other: str) -> None:
    first = {"relu6": "relu", "top2": "top1"}[other]
    with pytest.raises(ValueError, match=rf"`\.name` .*'{first}' at depth 1, and '{other}'"):
        stack_layers([Named(jnp.ones(2), first), Named(jnp.ones(2), other)])
