"""A mixture of experts on eight devices: one device's numbers, and what the program moves."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build, quick_jit
from helpers import assert_close
from hlo import collectives, compile_for
from jaxtyping import Array

from equinox_mtp import nn, sharding
from equinox_mtp.sharding import DEFAULT_RULES, make_mesh

BATCH, SEQ, EMBED, MLP, EXPERTS = 4, 10, 12, 14, 16
MESHES: dict[str, dict[str, int]] = {
    "expert": {"expert": 8},
    "data_expert": {"data": 2, "expert": 4},
    "context_expert": {"context": 2, "expert": 4},
    "fsdp_expert_tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "data_fsdp": {"data": 2, "fsdp": 2, "context": 2},
}


def make_mixture() -> nn.MixtureOfExperts:
    def make(key: Array) -> nn.MixtureOfExperts:
        return nn.MixtureOfExperts(
            nn.Router(EMBED, EXPERTS, top_k=3, scores="sigmoid", bias=True, key=key),
            nn.Experts(EXPERTS, EMBED, MLP, key=key),
            shared_expert=nn.SwiGLU(EMBED, MLP, key=key),
            shared_gate=nn.Linear(EMBED, 1, key=key),
        )

    return build(make)


def loss(mixture: Any, x: Array, mask: Array) -> tuple[Array, Any]:
    y, statistics = mixture(sharding.constrain_hidden_states(x), token_mask=mask)
    y = sharding.constrain_hidden_states(y)
    value = jnp.sum(jnp.sin(y)) + statistics.balance_loss + statistics.z_loss
    return value + statistics.sequence_balance_loss, (y, statistics)


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, SEQ, EMBED)).astype(np.float32)
    return x, rng.random((BATCH, SEQ)) < 0.8


def step(mixture: Any, x: Array, mask: Array) -> Any:
    return eqx.filter_value_and_grad(lambda p: loss(p[0], p[1], mask), has_aux=True)((mixture, x))


@pytest.fixture(scope="module")
def expected(rows: Any) -> Any:
    return quick_jit(step)(make_mixture(), *map(jnp.asarray, rows))


@pytest.mark.parametrize("name", MESHES)
def test_experts_are_those_of_one_device(name: str, rows: Any, expected: Any) -> None:
    mesh = make_mesh(MESHES[name])
    mixture = sharding.shard_model(make_mixture(), mesh)
    with jax.set_mesh(mesh), sharding.use_rules():
        x, mask = jnp.asarray(rows[0]), sharding.shard_batch(rows[1], mesh)
        x = jax.device_put(x, sharding.batch_sharding(mesh, axis_words="batch seq embed"))
        compiled, program = compile_for(eqx.filter_jit(step), mixture, x, mask)
        actual = compiled(mixture, x, mask)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert_close(one, other, 1e-4, 1e-5)
    placed: Any = mixture.experts.up.sharding
    assert placed.spec == DEFAULT_RULES.spec("experts embed mlp", mesh)
    # Weights stay where they are, but for what `fsdp` splits, and no token's output is gathered.
    found = collectives(program)
    gathered = [c for c in found if c.operation in ("all-gather", "all-to-all")]
    if "fsdp" not in MESHES[name]:
        assert gathered == []
    own = EXPERTS * EMBED * MLP // MESHES[name].get("expert", 1)
    assert all(size <= own for c in gathered for size in c.sizes)
    assert not any(c.in_loop for c in found)
    # Sums over devices are of tokens, not of the copies for each of their experts.
    copies = BATCH * SEQ * 3 * EMBED // (MESHES[name].get("data", 1) * MESHES[name].get("fsdp", 1))
    copies //= MESHES[name].get("context", 1)
    assert all(size != copies for c in found for size in c.sizes)


def test_batches_that_are_split_over_the_experts_axis(rows: Any, expected: Any) -> None:
    mesh = make_mesh({"data": 2, "expert": 4})
    rules = DEFAULT_RULES.replace(batch=("data", "expert"))
    mixture = make_mixture()
    wide, mask = (np.concatenate([x, x]) for x in rows)
    sharded = sharding.shard_model(mixture, mesh, rules)
    with jax.set_mesh(mesh), sharding.use_rules(rules):
        y = quick_jit(lambda *a: loss(*a)[1][0])(sharded, jnp.asarray(wide), jnp.asarray(mask))
    assert_close(y[:BATCH], expected[0][1][0], 1e-5)
    assert_close(y[BATCH:], expected[0][1][0], 1e-5)
    assert y.sharding.spec[0] == ("data", "expert")


def test_experts_that_cannot_be_shared(rows: Any) -> None:
    mesh = make_mesh({"data": 2, "expert": 4})
    keys = jax.random.split(jax.random.key(0))
    six = nn.MixtureOfExperts(
        nn.Router(EMBED, 6, top_k=1, key=keys[0]), nn.Experts(6, EMBED, MLP, key=keys[1])
    )
    message = r"`experts` of a mixture .* multiple of the 4 devices .* by 'expert'; got 6"
    with jax.set_mesh(mesh), sharding.use_rules(), pytest.raises(ValueError, match=message):
        six(jnp.asarray(rows[0]))
    with pytest.raises(ValueError, match=r"`experts\.gate` cannot be split by the rule 'experts'"):
        sharding.shard_model({"experts": six.experts}, mesh)
