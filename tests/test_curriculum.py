"""Which depths are trained when."""

import jax
import jax.numpy as jnp
import pytest

import equinox_mtp as emtp


@pytest.mark.parametrize("num_depths", [0, 1, 3])
def test_curriculum_against_a_loop(num_depths: int) -> None:
    parts = num_depths + 1
    for step in range(2 * parts):
        done = (step + 0.5) / (2 * parts)
        part = step // 2
        forward = [1.0 if k < part else 0.0 for k in range(num_depths)]
        reverse = [1.0 if k < num_depths - part else 0.0 for k in range(num_depths)]
        assert emtp.curriculum_depth_weights(num_depths, done).tolist() == forward
        weights = emtp.curriculum_depth_weights(num_depths, jnp.float32(done), "reverse")
        assert weights.tolist() == reverse
    assert emtp.curriculum_depth_weights(num_depths, 1.0).tolist() == [1.0] * num_depths
    assert emtp.curriculum_depth_weights(num_depths, 1.0, "reverse").tolist() == [0.0] * num_depths


def test_a_curriculum_is_not_compiled_again() -> None:
    @jax.jit
    def loss(progress: jax.Array) -> jax.Array:
        nonlocal traced
        traced += 1
        losses = emtp.MTPLosses(jnp.asarray([8.0, 9.0]), jnp.asarray([4.0, 2.0]))
        weights = emtp.curriculum_depth_weights(2, progress)
        return emtp.calculate_mtp_loss(losses, scaling_factor=1.0, depth_weights=weights)

    traced = 0
    assert [float(loss(x)) for x in (0.1, 0.5, 0.9)] == [0.0, 2.0, pytest.approx(17 / 6)]
    assert traced == 1


def test_a_curriculum_of_negative_progress() -> None:
    with pytest.raises(ValueError, match="`progress` must be finite and not negative"):
        emtp.curriculum_depth_weights(2, -0.1)
