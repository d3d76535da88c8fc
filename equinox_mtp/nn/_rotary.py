"""Rotary position embeddings: frequencies, their scaling to longer texts, and the rotation."""

import abc
import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from .._checks import check_flag, check_integer, check_number
from .._types import checked


class AbstractRotaryScaling(abc.ABC):
    """How rotary frequencies change, so that a model reads longer texts than it was first made for.

    >>> rotary = emtp.nn.Rotary(scaling=emtp.nn.LinearScaling(factor=4.0))
    >>> rotary.frequencies(4).tolist()  # a quarter of 1 and 0.01
    [0.25, 0.0024999999441206455]
    """

    @abc.abstractmethod
    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The scaled frequencies, in radians a position.

        **Arguments:**

        - `frequencies`: `theta^(-2i/size)` for i = 0 … size/2 - 1, in float64.
        - `theta`: their base.
        """

    @property
    def amplitude(self) -> float:
        """Multiplies sine and cosine, and so the logits by its square."""
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """Multiplies the logits of `MultiHeadLatentAttention`, of which a part is not rotated."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearScaling(AbstractRotaryScaling):
    """Positions divided by a factor (arXiv 2306.15595).

    >>> emtp.nn.LinearScaling(factor=2.0).scale(np.ones(2), theta=10_000.0).tolist()
    [0.5, 0.5]
    """

    factor: float

    def __post_init__(self) -> None:
        _set_number(self, "factor", above=0)

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `AbstractRotaryScaling`."""
        del theta
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(AbstractRotaryScaling):
    """The scaling of Llama 3.1 (arXiv 2407.21783): low frequencies are divided by a factor.

    With the wavelength λ = 2π / frequency and L = `original_length`, frequencies of λ below
    L / `high_freq_factor` stay, those of λ above L / `low_freq_factor` are divided by `factor`, and
    those between are interpolated.

    >>> scaling = emtp.nn.Llama3Scaling(8.0, original_length=64)
    >>> scaling.scale(np.asarray([1.0, 0.01]), theta=10_000.0).tolist()
    [1.0, 0.00125]
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _set_number(self, name, above=0)
        _set_integer(self, "original_length")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "`low_freq_factor` must be below `high_freq_factor`; got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `AbstractRotaryScaling`."""
        del theta
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling(AbstractRotaryScaling):
    """YaRN (arXiv 2309.00071): frequencies are interpolated by how often they turn in the text.

    Over `original_length` positions, frequencies of more than `beta_fast` turns stay, those of less
    than `beta_slow` turns are divided by `factor`, and a linear ramp over their indices lies
    between. With `m(x) = 0.1 · x · ln(factor) + 1`, or 1 for a factor of at most 1, sine and cosine
    are multiplied by `m(mscale) / m(mscale_all_dim)`, which is `m(1)` by default.

    >>> scaling = emtp.nn.YarnScaling(4.0, original_length=64)
    >>> round(scaling.amplitude, 4)
    1.1386

    **Fields:**

    - `attention_factor`: multiplies sine and cosine in place of that ratio.
    - `rounds_ramp`: whether the ramp begins and ends at whole indices, as in the first release.
    - `mscale`, `mscale_all_dim`: how strongly rotated features, and all features, are scaled.
        `MultiHeadLatentAttention` multiplies its logits by `m(mscale_all_dim)²`, as DeepSeek's code
        does (arXiv 2412.19437, §4.3); other attention rotates all features, and does not.
    """

    factor: float
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    rounds_ramp: bool = True
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow"):
            _set_number(self, name, above=0)
        for name in ("mscale", "mscale_all_dim"):
            number = check_number(name, getattr(self, name), at_least=0)
            object.__setattr__(self, name, number)
        if self.attention_factor is not None:
            _set_number(self, "attention_factor", above=0)
        _set_integer(self, "original_length")
        check_flag("rounds_ramp", self.rounds_ramp)

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `AbstractRotaryScaling`."""
        num = len(frequencies)

        def index_of(turns: float) -> float:
            length = self.original_length / (2 * math.pi * turns)
            return num * math.log(length) / math.log(theta)

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.rounds_ramp:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * num - 1)
        high = high + 0.001 if low == high else high
        divided = np.clip((np.arange(num) - low) / (high - low), 0, 1)
        return divided * frequencies / self.factor + (1 - divided) * frequencies

    @property
    def amplitude(self) -> float:
        """`attention_factor`, with its default."""
        if self.attention_factor is not None:
            return self.attention_factor
        return self._factor_of(self.mscale) / self._factor_of(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """`m(mscale_all_dim)²`."""
        return self._factor_of(self.mscale_all_dim) ** 2

    def _factor_of(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (arXiv 2104.09864) of queries and keys.

    Rotates the i-th pair of features by the angle `position · frequency_i`, with `frequency_i =
    theta^(-2i/size)` before scaling. Computed in float32, returned in the dtype of its input.

    >>> x = jnp.asarray([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> print(np.asarray(emtp.nn.Rotary()(x, jnp.asarray([[1]]))).round(3))  # by one radian
    [[[[0.54  0.841]]]]

    **Fields:**

    - `theta`: the base of the frequencies.
    - `size`: how many features are rotated, the first ones; all if `None`.
    - `interleaved`: pairs are features 2i and 2i+1, as in the paper; i and i + size/2 otherwise.
    - `scaling`: of the frequencies.

    **Raises:** `ValueError` for a `theta` that is not above 0, or a `size` that is odd.
    """

    theta: float = 10_000.0
    size: int | None = None
    interleaved: bool = False
    scaling: AbstractRotaryScaling | None = None

    def __post_init__(self) -> None:
        _set_number(self, "theta", above=0)
        check_flag("interleaved", self.interleaved)
        if self.size is not None:
            _set_integer(self, "size")
            if self.size % 2:
                raise ValueError(
                    f"`size` must be even, as features are rotated in pairs; got {self.size}."
                )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position of each pair, `[size / 2]`, in float32."""
        size = head_dim if self.size is None else self.size
        frequencies = self.theta ** (-np.arange(0, size, 2) / size)
        if self.scaling is not None:
            frequencies = self.scaling.scale(frequencies, self.theta)
        return frequencies.astype(np.float32)

    @checked
    def __call__(
        self,
        x: Float[Array, "batch seq heads head_dim"],
        position_ids: Integer[Array, "batch seq"],
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Rotates queries or keys.

        **Raises:** `ValueError` if `head_dim` is odd, or less than `size`.
        """
        head_dim = x.shape[-1]
        size = head_dim if self.size is None else self.size
        if size % 2 or size > head_dim:
            raise ValueError(
                f"`head_dim` must be even and at least `size` for rotary embeddings; got {head_dim}"
                f" and {self.size}."
            )
        angles = position_ids[..., None, None].astype(jnp.float32) * self.frequencies(head_dim)
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        sin, cos = amplitude * jnp.sin(angles), amplitude * jnp.cos(angles)
        rotated, rest = x[..., :size].astype(jnp.float32), x[..., size:]
        # The two features of a pair, each on an axis of its own.
        shape, axis = ((size // 2, 2), -1) if self.interleaved else ((2, size // 2), -2)
        pairs = rotated.reshape(*x.shape[:-1], *shape)
        first, second = jnp.moveaxis(pairs, axis, 0)
        turned = (first * cos - second * sin, second * cos + first * sin)
        rotated = jnp.stack(turned, axis=axis).reshape(*x.shape[:-1], size).astype(x.dtype)
        return rotated if size == head_dim else jnp.concatenate([rotated, rest], axis=-1)


@checked
def rotary_embedding(
    x: Float[Array, "batch seq heads head_dim"],
    position_ids: Integer[Array, "batch seq"],
    *,
    theta: float = 10_000.0,
) -> Float[Array, "batch seq heads head_dim"]:
    """`Rotary(theta)(x, position_ids)`: all features, in half-split pairs.

    >>> x = jnp.asarray([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rotated = emtp.nn.rotary_embedding(x, jnp.asarray([[1]]))  # by one radian
    >>> print(np.asarray(rotated).round(3))
    [[[[0.54  0.841]]]]

    **Raises:** `ValueError` if `head_dim` is odd.
    """
    return Rotary(theta)(x, position_ids)


def _set_number(config: object, name: str, *, above: int) -> None:
    # As a plain Python number: equal configurations are to compile to one program.
    number = check_number(name, getattr(config, name), above=above)
    object.__setattr__(config, name, number)


def _set_integer(config: object, name: str) -> None:
    object.__setattr__(config, name, check_integer(name, getattr(config, name), at_least=1))
