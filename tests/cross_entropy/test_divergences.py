"""Divergences from a teacher, against full logits in float64."""

from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal, num_matrix_products
from hlo import collectives, compile_for
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import equinox_mtp as emtp
from equinox_mtp import LinearHead, linear_divergence
from equinox_mtp.cross_entropy import Divergence

KINDS = get_args(Divergence)
DEPTH, BATCH, SEQ, EMBED, VOCAB = 2, 2, 9, 6, 23
DRAFT_VOCAB = np.asarray([0, 3, 4, 11, 17, 22])


class Case(NamedTuple):
    """Arrays of NumPy in float64, or of JAX."""

    hidden: Any
    teacher: Any
    weight: Any
    bias: Any
    teacher_weight: Any
    cotangent: Any


def make_case(seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    return Case(
        rng.standard_normal((DEPTH, BATCH, SEQ, EMBED)),
        rng.standard_normal((BATCH, SEQ, EMBED)),
        rng.standard_normal((VOCAB, EMBED)),
        rng.standard_normal(VOCAB),
        rng.standard_normal((VOCAB, EMBED)),
        rng.random((DEPTH, BATCH, SEQ)) * (rng.random((DEPTH, BATCH, SEQ)) < 0.8),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def drafted(logits: np.ndarray, draft_vocab: np.ndarray | None) -> np.ndarray:
    """The distribution over all ids of a student that drafts from some."""
    if draft_vocab is None:
        return softmax(logits)
    probabilities = np.zeros(VOCAB)
    probabilities[draft_vocab] = softmax(logits[draft_vocab])
    return probabilities


def divergence_oracle(kind: str, p: np.ndarray, q: np.ndarray) -> float:
    """One token's divergence, an id at a time; KL(p ‖ q) over those that q knows."""
    alpha = sum(min(x, y) for x, y in zip(p, q, strict=True))

    def kl(x: np.ndarray, y: np.ndarray) -> float:
        return sum(a * np.log(a / b) for a, b in zip(x, y, strict=True) if a * b > 0)

    if kind == "hybrid":
        weight = np.exp(-3 * alpha)
        return weight * kl(p, q) + (1 - weight) * (1 - alpha)
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "total_variation": 1 - alpha,
        "negative_log_acceptance": -np.log(alpha),
    }[kind]


def oracle(
    kind: str,
    case: Case,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    teacher_weight: np.ndarray | None = None,
    draft_vocab: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Divergence and acceptance of every token, in a loop."""
    of_teacher = case.weight if teacher_weight is None else teacher_weight
    values, accepted = np.zeros((2, DEPTH, BATCH, SEQ))

    def logits(weight: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        logits = weight @ hidden + case.bias
        return logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)

    for at in np.ndindex(DEPTH, BATCH, SEQ):
        p = softmax(logits(of_teacher, case.teacher[at[1:]]) / temperature)
        q = drafted(logits(case.weight, case.hidden[at]) / temperature, draft_vocab)
        values[at], accepted[at] = divergence_oracle(kind, p, q), np.minimum(p, q).sum()
    return values, accepted


def on_device(case: Case, dtype: Any = jnp.float32) -> Case:
    return Case(*(jnp.asarray(x, dtype) for x in case))


def weighted(
    kind: Any,
    case: Any,
    hidden: Any,
    weight: Any,
    bias: Any,
    *,
    weights: Any = None,
    draft_vocab: Any = None,
    **options: Any,
) -> jax.Array:
    """The sum to differentiate, by hidden states, the head's matrix and its bias."""
    teacher_head = LinearHead(case.weight, bias=case.bias, soft_cap=options.get("soft_cap"))
    token = linear_divergence(
        hidden,
        case.teacher,
        LinearHead(weight, bias=bias, token_tile=8, **options),
        divergence=kind,
        teacher_head=teacher_head,
        draft_vocab=draft_vocab,
        temperature=1.5,
        weights=weights,
    )
    return jnp.sum(token.divergence * case.cotangent)


@pytest.mark.parametrize("draft_vocab", [None, DRAFT_VOCAB], ids=["all", "some"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: Any, soft_cap: float | None, draft_vocab: np.ndarray | None) -> None:
    case = make_case()
    for temperature, teacher_weight in ((1.0, None), (0.7, case.teacher_weight)):
        given = on_device(case)
        head = LinearHead(given.weight, bias=given.bias, soft_cap=soft_cap, token_tile=8)
        other = None
        if teacher_weight is not None:
            other = LinearHead(jnp.float32(teacher_weight), bias=given.bias, soft_cap=soft_cap)
        token = jax.jit(partial(linear_divergence, divergence=kind))(
            given.hidden,
            given.teacher,
            head,
            teacher_head=other,
            temperature=temperature,
            draft_vocab=draft_vocab,
        )
        values, accepted = oracle(
            kind,
            case,
            temperature=temperature,
            soft_cap=soft_cap,
            teacher_weight=teacher_weight,
            draft_vocab=draft_vocab,
        )
        assert_close(token.divergence, values, rtol=2e-5, atol=2e-6)
        assert_close(token.acceptance, accepted)


@pytest.mark.parametrize(
    ("soft_cap", "draft_vocab"), [(None, None), (2.0, None), (2.0, DRAFT_VOCAB)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: Any, soft_cap: float | None, draft_vocab: np.ndarray | None) -> None:
    """In float64 against finite differences of full logits; the hybrid's factor is held."""
    case = make_case()
    options: Any = {"soft_cap": soft_cap, "draft_vocab": draft_vocab}
    _, accepted = oracle(kind, case, temperature=1.5, **options)

    def of(name: str, index: tuple[int, ...], step: float) -> float:
        moved = getattr(case, name).copy()
        moved[index] += step
        # The teacher stays as it is.
        values = np.zeros((DEPTH, BATCH, SEQ))
        student = case._replace(**{name: moved})
        for at in np.ndindex(DEPTH, BATCH, SEQ):
            distributions = []
            for holder, hidden in ((case, case.teacher[at[1:]]), (student, student.hidden[at])):
                logits = holder.weight @ hidden + holder.bias
                logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
                ids = draft_vocab if distributions else None
                distributions.append(drafted(logits / 1.5, ids))
            if kind == "hybrid":
                factor = np.exp(-3 * accepted[at])
                values[at] = factor * divergence_oracle("forward_kl", *distributions)
                values[at] += (1 - factor) * divergence_oracle("total_variation", *distributions)
            else:
                values[at] = divergence_oracle(kind, *distributions)
        return float(np.sum(values * case.cotangent))

    with jax.enable_x64(True):
        given = on_device(case, jnp.float64)
        gradients = jax.jit(jax.grad(partial(weighted, kind, given, **options), argnums=(0, 1, 2)))(
            given.hidden, given.weight, given.bias
        )
    rng = np.random.default_rng(1)
    for name, gradient in zip(("hidden", "weight", "bias"), gradients, strict=True):
        for _ in range(4):
            index = tuple(rng.integers(0, size) for size in gradient.shape)
            expected = (of(name, index, 1e-6) - of(name, index, -1e-6)) / 2e-6
            np.testing.assert_allclose(gradient[index], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_change_no_gradient(kind: Any) -> None:
    given = on_device(make_case())
    arguments = (given.hidden, given.weight, given.bias)
    by_all = (0, 1, 2)
    without = jax.jit(jax.grad(partial(weighted, kind, given), by_all))(*arguments)
    rng = np.random.default_rng(2)
    for weights in (2.5 * given.cotangent, jnp.float32(rng.random(given.cotangent.shape))):
        function = partial(weighted, kind, given, weights=weights)
        for x, y in zip(jax.jit(jax.grad(function, by_all))(*arguments), without, strict=True):
            assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_products() -> None:
    """Three with a frozen head; four with a head whose weights were given; three more without."""
    given = on_device(make_case())

    def loss(weights: Any, hidden: Any, weight: Any) -> jax.Array:
        token = linear_divergence(hidden, given.teacher, weight, weights=weights)
        return jnp.sum(token.divergence)

    # The teacher's product, and for each depth the student's and its gradients: a depth is a step
    # of a loop, and so counts once.
    ones = jnp.ones((DEPTH, BATCH, SEQ))
    frozen = jax.grad(loss, argnums=1)
    assert num_matrix_products(frozen, None, given.hidden, given.weight) == 3
    assert num_matrix_products(frozen, ones, given.hidden, given.weight) == 3
    assert num_matrix_products(loss, None, given.hidden, given.weight) == 2
    both = jax.grad(loss, argnums=(1, 2))
    assert num_matrix_products(both, None, given.hidden, given.weight) == 6


def test_no_gradient_for_the_teacher() -> None:
    given = on_device(make_case())

    def loss(teacher: Any, weight: Any) -> jax.Array:
        token = linear_divergence(given.hidden, teacher, given.weight, teacher_head=weight)
        return jnp.sum(token.divergence)

    for gradient in jax.grad(loss, argnums=(0, 1))(given.teacher, given.teacher_weight):
        assert_equal(gradient, np.zeros(gradient.shape, np.float32))


def test_bfloat16_is_near() -> None:
    case = make_case()
    given = on_device(case, jnp.bfloat16)
    exact = Case(*(np.asarray(x, np.float64) for x in given))
    exact = exact._replace(bias=np.zeros(VOCAB))
    for kind in ("forward_kl", "total_variation"):
        token = linear_divergence(given.hidden, given.teacher, given.weight, divergence=kind)
        assert token.divergence.dtype == jnp.float32
        assert_close(token.divergence, oracle(kind, exact)[0], rtol=1e-4, atol=1e-5)
        gradient = jax.jit(jax.grad(partial(hidden_loss, kind)))(given.hidden, given)
        single = Case(*(x.astype(jnp.float32) for x in given))
        expected = jax.jit(jax.grad(partial(hidden_loss, kind)))(single.hidden, single)
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, expected, rtol=2e-2, atol=2e-2)


def hidden_loss(kind: Any, hidden: Any, case: Any) -> jax.Array:
    token = linear_divergence(hidden, case.teacher, case.weight, divergence=kind)
    return jnp.sum(token.divergence)


def test_float16_gradients_do_not_vanish() -> None:
    """Over 65,536 ids the derivative by a logit is below the smallest float16."""
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.standard_normal((65_536, 4)), jnp.float16)
    hidden, teacher = jnp.asarray(0.01 * rng.standard_normal((2, 1, 1, 4)), jnp.float16)

    def gradient(dtype: Any) -> jax.Array:
        return jax.grad(
            lambda x: jnp.sum(
                linear_divergence(x, teacher.astype(dtype), head.astype(dtype)).divergence
            )
        )(hidden.astype(dtype))

    assert_close(gradient(jnp.float16), gradient(jnp.float32), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind: Any) -> None:
    """Equal distributions, disjoint ones, and ids that neither knows."""
    hidden = jnp.eye(3)[None]
    head = LinearHead(200 * jnp.eye(3))

    def divergence(hidden: jax.Array, teacher: jax.Array, head: Any = head) -> jax.Array:
        return jnp.sum(linear_divergence(hidden, teacher, head, divergence=kind).divergence)

    value_and_grad = jax.jit(jax.value_and_grad(divergence))
    same, gradient = value_and_grad(hidden, hidden)
    assert_close(same, 0.0)
    assert_close(gradient, np.zeros((1, 3, 3)), atol=1e-5)
    apart, gradient = value_and_grad(hidden, hidden[:, ::-1][:, [1, 0, 2]])
    assert np.isfinite(apart)
    assert np.all(np.isfinite(gradient))
    bias = jnp.asarray([0.0, 0.0, -jnp.inf])
    two = LinearHead(jnp.ones((3, 3)), bias=bias)
    value, gradient = value_and_grad(hidden, hidden, two)
    assert_close(value, 0.0)
    assert np.all(np.isfinite(gradient))


def test_shapes() -> None:
    """One teacher for all depths is the same as one each; no tokens, and no leading axes."""
    given = on_device(make_case())
    linear_divergence = jax.jit(emtp.linear_divergence)
    shared = linear_divergence(given.hidden, given.teacher, given.weight)
    each = linear_divergence(
        given.hidden, jnp.broadcast_to(given.teacher, given.hidden.shape), given.weight
    )
    assert_close(each.divergence, shared.divergence)
    one = linear_divergence(given.hidden[0, 0, 0], given.teacher[0, 0], given.weight)
    assert one.divergence.shape == ()
    assert_close(one.divergence, shared.divergence[0, 0, 0])
    none = linear_divergence(given.hidden[:, :, :0], given.teacher[:, :0], given.weight)
    assert none.divergence.shape == (DEPTH, BATCH, 0)


def test_transformations() -> None:
    given = on_device(make_case())

    def loss(hidden: jax.Array, teacher: jax.Array) -> jax.Array:
        return jnp.sum(linear_divergence(hidden, teacher, given.weight).divergence)

    expected = jax.jit(jax.grad(loss))(given.hidden, given.teacher)
    mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(1, 0), out_axes=1))(
        given.hidden, given.teacher
    )
    assert_close(mapped, expected)
    teachers = jnp.stack([given.teacher] * 2)

    def step(_: None, teacher: jax.Array) -> tuple[None, jax.Array]:
        return None, jax.grad(loss)(given.hidden, teacher)

    for one in jax.jit(lambda: jax.lax.scan(step, None, teachers)[1])():
        assert_close(one, expected)
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(given.hidden, given.teacher)
    assert_close(remat, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "kl"}, "`divergence` must be"),
        ({"temperature": 0.0}, "`temperature` must be"),
        ({"temperature": float("nan")}, "`temperature` must be finite"),
        ({"head": lambda x: x}, "`head` must be a matrix or a `LinearHead`"),
        ({"teacher_head": jnp.ones((VOCAB + 1, EMBED))}, "`teacher_head` must be"),
        ({"head": jnp.ones((VOCAB, EMBED + 1))}, "`head` must be"),
        (
            {"teacher_head": LinearHead(jnp.ones((VOCAB + 1, EMBED)))},
            "`teacher_head` must have the 23 ids",
        ),
        (
            {"head": LinearHead(jnp.ones((VOCAB, EMBED + 1)))},
            "`hidden_states` must have the 7 features",
        ),
        (
            {"teacher_head": LinearHead(jnp.ones((VOCAB, EMBED + 1)))},
            "`teacher_hidden_states` must have the 7 features",
        ),
        (
            {"teacher_hidden_states": jnp.ones((BATCH, SEQ + 1, EMBED))},
            "`teacher_hidden_states` must be of the same positions",
        ),
        ({"draft_vocab": np.asarray([0, VOCAB])}, "`draft_vocab` must lie in 0 … 22"),
        ({"draft_vocab": np.asarray([1, 2, 1])}, "`draft_vocab` must hold each token id once"),
        ({"draft_vocab": jnp.zeros(0, int)}, "`draft_vocab` must hold at least one token id"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    given = on_device(make_case())
    arguments: dict[str, Any] = {
        "hidden_states": given.hidden,
        "teacher_hidden_states": given.teacher,
        "head": given.weight,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        linear_divergence(**(arguments | changes))


def test_temporaries() -> None:
    """A tile of logits of both, and not all of them."""
    batch, seq, embed, vocab = 2, 512, 8, 2048
    hidden = jax.ShapeDtypeStruct((1, batch, seq, embed), jnp.float32)
    teacher = jax.ShapeDtypeStruct((batch, seq, embed), jnp.float32)
    head = jax.ShapeDtypeStruct((vocab, embed), jnp.float32)
    for kind in KINDS:

        def loss(hidden: Any, teacher: Any, head: Any, kind: Any = kind) -> jax.Array:
            token = linear_divergence(hidden, teacher, head, divergence=kind)
            return jnp.sum(token.divergence)

        compiled = jax.jit(jax.grad(loss)).lower(hidden, teacher, head).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        all_logits = 4 * batch * seq * vocab
        assert analysis.temp_size_in_bytes < all_logits


PLACEMENTS = {
    "seq": ({"context": 8}, {"seq": "context"}),
    "vocab": ({"data": 2, "tensor": 4}, {"batch": "data", "vocab": "tensor"}),
    "all": (
        {"data": 2, "context": 2, "tensor": 2},
        {"batch": "data", "seq": "context", "vocab": "tensor"},
    ),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_on_eight_devices(placement: str, axis_type: AxisType) -> None:
    """The values and gradients of one device; logits and hidden states are never gathered."""
    depth, batch, seq, embed, vocab = 2, 4, 24, 8, 32
    rng = np.random.default_rng(3)
    hidden, weights = (
        rng.standard_normal((depth, batch, seq, embed)),
        rng.random((depth, batch, seq)),
    )
    teacher, head = rng.standard_normal((batch, seq, embed)), rng.standard_normal((vocab, embed))
    arrays = [jnp.float32(x) for x in (hidden, teacher, head, weights)]
    axes, words = PLACEMENTS[placement]

    def loss(
        kind: Any, sharding: Any, hidden: Any, head: Any, teacher: Any, weights: Any
    ) -> tuple[jax.Array, jax.Array]:
        linear = LinearHead(head, sharding=sharding, token_tile=16)
        token = linear_divergence(hidden, teacher, linear, divergence=kind, weights=weights)
        return jnp.sum(token.divergence * weights), token.acceptance

    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))
    by_batch = P(words.get("batch"), words.get("seq"))
    specs = (P(None, *by_batch), P(words.get("vocab")), by_batch, P(None, *by_batch))
    order = [arrays[0], arrays[2], arrays[1], arrays[3]]
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(order, specs, strict=True)]
    sharding = emtp.HeadSharding(mesh, **words)
    for kind in ("hybrid", "jensen_shannon"):
        function = partial(jax.value_and_grad(loss, argnums=(2, 3), has_aux=True), kind)
        expected = jax.jit(partial(function, None))(*order)
        with jax.set_mesh(mesh):
            compiled, program = compile_for(jax.jit(partial(function, sharding)), *placed)
            actual = compiled(*placed)
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert not any(c.operation in ("all-gather", "all-to-all") for c in collectives(program))
