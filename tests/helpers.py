"""Tables of cases, and the slow, obvious NumPy oracles that the library is compared with."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

DTYPES = (jnp.bool_, jnp.int32, jnp.float32, jnp.bfloat16)


def assert_equal(actual: Any, expected: Any) -> None:
    """The same values, shape and dtype; exact."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected, strict=True)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """The same shape, and values close in float64; never NaN or infinite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.all(np.isfinite(actual))
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, strict=True)


def assert_rejects(argument: str, function: Callable[..., object], *args: Any, **kw: Any) -> None:
    """The shape and dtype check at the public boundary stops the call, and names `argument`."""
    with pytest.raises(TypeCheckError, match=f"^`{argument}` must be"):
        function(*args, **kw)


def shift_oracle(
    x: np.ndarray,
    shift: int,
    fill_value: bool | int | float = 0,
    segment_ids: np.ndarray | None = None,
) -> np.ndarray:
    """`roll_and_mask`, and with `segment_ids` `roll_and_mask_by_segment`, one position a time."""
    out = np.full_like(x, fill_value)
    batch, seq = x.shape[:2]
    for b in range(batch):
        for i in range(seq):
            source = i - shift
            if source >= seq:
                continue
            if segment_ids is None or is_one_document(segment_ids[b], i, source):
                out[b, i] = x[b, source]
    return out


def is_one_document(segment_ids: np.ndarray, first: int, last: int) -> bool:
    """Whether all positions from the first to the last have one id, which is not 0."""
    return all(segment_ids[j] == segment_ids[first] != 0 for j in range(first, last + 1))


def align_oracle(
    input_ids: np.ndarray,
    target_ids: np.ndarray,
    target_mask: np.ndarray | None = None,
    *,
    num_depths: int,
    segment_ids: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    chain_mask: bool = False,
) -> dict[str, np.ndarray]:
    """`align_targets` as a loop over depths, rows and positions."""
    batch, seq = input_ids.shape
    segments = np.ones((batch, seq), int) if segment_ids is None else segment_ids
    counts = np.ones((batch, seq), bool) if target_mask is None else target_mask != 0
    if position_ids is None:
        position_ids = np.zeros((batch, seq), np.int32)
        for b in range(batch):
            for i in range(1, seq):
                same = segments[b, i] == segments[b, i - 1]
                position_ids[b, i] = position_ids[b, i - 1] + 1 if same else 0
    shape = (num_depths, batch, seq)
    out = {
        "input_ids": np.zeros(shape, input_ids.dtype),
        "position_ids": np.zeros(shape, position_ids.dtype),
        "target_ids": np.zeros(shape, target_ids.dtype),
        "mask": np.zeros(shape, bool),
        "token_mask": np.zeros(shape, bool),
    }
    for k in range(1, num_depths + 1):
        for b in range(batch):
            for i in range(seq):
                if i + k >= seq or not is_one_document(segments[b], i, i + k):
                    continue
                out["token_mask"][k - 1, b, i] = True
                out["input_ids"][k - 1, b, i] = input_ids[b, i + k]
                out["position_ids"][k - 1, b, i] = position_ids[b, i + k]
                out["target_ids"][k - 1, b, i] = target_ids[b, i + k]
                chain = range(i, i + k + 1) if chain_mask else [i + k]
                out["mask"][k - 1, b, i] = all(counts[b, j] for j in chain)
    return out


def loss_oracle(
    losses: np.ndarray,
    counts: np.ndarray,
    *,
    scaling_factor: float = 0.1,
    depth_weights: np.ndarray | None = None,
    reduction: str = "pooled",
    total_weights: np.ndarray | None = None,
) -> float:
    """`calculate_mtp_loss` in float64, one depth at a time."""
    num_depths = len(losses)
    divisors = counts if total_weights is None else total_weights
    weights = [1.0] * num_depths if depth_weights is None else [float(w) for w in depth_weights]
    total = sum(weights)
    if total == 0:
        return 0.0
    weights = [w / total for w in weights]
    depths = range(num_depths)
    if reduction == "mean_of_depths":
        means = [float(losses[k]) / float(divisors[k]) if divisors[k] else 0.0 for k in depths]
        return scaling_factor * sum(weights[k] * means[k] for k in depths)
    divisor = sum(weights[k] * float(divisors[k]) for k in depths)
    if divisor == 0:
        return 0.0
    return scaling_factor * sum(weights[k] * float(losses[k]) for k in depths) / divisor


def acceptance_oracle(
    predictions: np.ndarray,
    target_ids: np.ndarray,
    mask: np.ndarray,
    main_predictions: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """The counts of `calculate_mtp_acceptance_rate`, one draft a time."""
    num_depths, batch, seq = mask.shape
    names = ("accepted", "scored", "joint_accepted", "joint_scored", "joint_reached")
    out = {name: np.zeros(num_depths, np.int32) for name in names}

    def accepts(k: int, b: int, i: int) -> bool:
        if main_predictions is None:
            return bool(predictions[k - 1, b, i] == target_ids[k - 1, b, i])
        reference = main_predictions[b, i + k] if i + k < seq else 0
        return bool(predictions[k - 1, b, i] == reference)

    for k in range(1, num_depths + 1):
        for b in range(batch):
            for i in range(seq):
                if mask[k - 1, b, i]:
                    out["scored"][k - 1] += 1
                    out["accepted"][k - 1] += accepts(k, b, i)
                if all(mask[j - 1, b, i] for j in range(1, k + 1)):
                    before = all(accepts(j, b, i) for j in range(1, k))
                    out["joint_scored"][k - 1] += 1
                    out["joint_reached"][k - 1] += before
                    out["joint_accepted"][k - 1] += before and accepts(k, b, i)
    return out


def cross_entropy_oracle(
    hidden_states: np.ndarray, head: np.ndarray, target_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token, in float64: negative log-likelihood, log-sum-exp and the first best id."""
    logits = hidden_states.astype(np.float64) @ head.astype(np.float64).T
    highest = logits.max(axis=-1)
    log_sum_exp = highest + np.log(np.exp(logits - highest[..., None]).sum(axis=-1))
    target_logits = np.take_along_axis(logits, target_ids[..., None], axis=-1)[..., 0]
    return log_sum_exp - target_logits, log_sum_exp, logits.argmax(axis=-1).astype(np.int32)


def finite_differences(
    function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5
) -> np.ndarray:
    """The gradient of a float64 function by central differences, one entry at a time."""
    x = x.astype(np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def as_float64(x: Any) -> np.ndarray:
    """An array in float64, for an oracle."""
    return np.asarray(x, np.float64)


class HeadOracle(NamedTuple):
    """A linear output head in float64, one array of all logits."""

    hidden_states: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    target_ids: np.ndarray
    soft_cap: float | None = None

    @property
    def logits(self) -> np.ndarray:
        logits = as_float64(self.hidden_states) @ as_float64(self.weight).T
        if self.bias is not None:
            logits = logits + as_float64(self.bias)
        return logits if self.soft_cap is None else self.soft_cap * np.tanh(logits / self.soft_cap)

    @property
    def losses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per token: negative log-likelihood, log-sum-exp and the first best id."""
        return cross_entropy_oracle(self.logits, np.eye(len(self.weight)), self.target_ids)

    def gradients(
        self, nll_cotangent: np.ndarray, lse_cotangent: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of hidden states, weight and bias, from the cotangents of both losses."""
        cotangent = self.logits_cotangent(nll_cotangent, lse_cotangent)
        hidden, vocab = as_float64(self.hidden_states), len(self.weight)
        tokens = cotangent.reshape(-1, vocab)
        weight = tokens.T @ hidden.reshape(len(tokens), -1)
        return cotangent @ as_float64(self.weight), weight, tokens.sum(axis=0)

    def logits_cotangent(self, nll_cotangent: np.ndarray, lse_cotangent: np.ndarray) -> np.ndarray:
        """Of the logits before the soft-cap."""
        logits = self.logits
        softmax = np.exp(logits - self.losses[1][..., None])
        cotangent = (nll_cotangent + lse_cotangent)[..., None] * softmax
        cotangent -= nll_cotangent[..., None] * np.eye(len(self.weight))[self.target_ids]
        if self.soft_cap is not None:
            cotangent *= 1 - (logits / self.soft_cap) ** 2
        return cotangent

    def summed(self, weights: np.ndarray, z_loss_weight: float) -> tuple[float, list[np.ndarray]]:
        """Σ weight · (nll + z · lse²), and its gradients: of hidden states, head weight, bias,
        weights and z.
        """
        nll, log_sum_exp, _ = self.losses
        tokens = nll + z_loss_weight * log_sum_exp**2
        gradients = self.gradients(weights, 2 * z_loss_weight * weights * log_sum_exp)
        z_gradient = np.sum(weights * log_sum_exp**2)
        return float(np.sum(weights * tokens)), [*gradients, tokens, z_gradient]


def array_sizes(compiled_text: str) -> dict[str, int]:
    """The number of elements of every type in a compiled program, as `f32[2,3]`."""
    types = set(re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[[\d,]*\]", compiled_text))
    return {name: math.prod(map(int, re.findall(r"\d+", name.split("[")[1]))) for name in types}


def compiled_text(function: Callable[..., Any], *args: Any) -> str:
    """A function as XLA compiles it: every array it makes, with its shape."""
    # Shapes do not depend on how well the loops are compiled.
    lowered = jax.jit(function).lower(*args)
    quickly: Any = {"xla_backend_optimization_level": 0}
    return lowered.compile(quickly).as_text() or ""


def num_matrix_products(function: Callable[..., Any], *args: Any) -> int:
    """How many `dot_general` a traced program holds, each counted once, in loops too."""
    return str(jax.make_jaxpr(function)(*args)).count("dot_general[")
