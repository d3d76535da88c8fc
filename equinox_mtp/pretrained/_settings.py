"""What a `config.json` says, in this library's terms."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import nn

HINTS = "equinox_mtp"
"""The key of `config.json` under which `save` notes for `load` what a layout does not tell."""
COMPUTE_DTYPE = "compute_dtype"

_SCALINGS = {"default", "linear", "llama3", "yarn"}
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


class Settings:
    """Typed access to a configuration; a nested `text_config` takes the place of the whole.

    **Raises:** `ValueError` that names the file and the key, for keys that are missing or of
    another type.
    """

    def __init__(self, config: dict[str, Any], path: Path):
        nested = config.get("text_config")
        self.path = path
        self.config = config
        if isinstance(nested, dict):
            # The folder's architecture is that of the whole.
            whole = {name: config[name] for name in ("architectures",) if name in config}
            self.config = {**config, **nested, **whole}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; `default` if it is not there, or null."""
        value = self.config.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, at_least: int = 1) -> int:
        """A size, or a number of things."""
        value = self.get(key, default)
        if type(value) is not int or not at_least <= value < 2**31:
            raise self.error(key, f"an integer, at least {at_least}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise self.error(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def error(self, key: str, wanted: str, value: Any) -> ValueError:
        """An error about a key."""
        return ValueError(f"{self.path}: `{key}` must be {wanted}; got {value!r:.80}.")

    @property
    def dtype(self) -> str:
        """The dtype that parameters were made for: `dtype`, or `torch_dtype` in older files."""
        value = str(self.get("dtype", self.get("torch_dtype", "float32"))).removeprefix("torch.")
        if value not in _DTYPES:
            raise self.error("dtype", " or ".join(_DTYPES), value)
        return value

    @property
    def compute_dtype(self) -> str:
        """What `save` noted; otherwise bfloat16 if parameters are, and float32 if not."""
        if self.noted_compute_dtype is not None:
            return self.noted_compute_dtype
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @property
    def noted_compute_dtype(self) -> str | None:
        """The compute dtype that `save` noted, if it did."""
        noted = self.hints.get(COMPUTE_DTYPE)
        if noted not in (None, "float32", "bfloat16"):
            raise self.error(f"{HINTS}.{COMPUTE_DTYPE}", "float32 or bfloat16", noted)
        return noted

    @property
    def hints(self) -> dict[str, Any]:
        """What `save` noted for `load`."""
        found = self.get(HINTS, {})
        return found if isinstance(found, dict) else {}

    @property
    def head_dim(self) -> int:
        """`head_dim`, or the features that each head has of a hidden state."""
        heads = self.integer("num_attention_heads")
        return self.integer("head_dim", max(1, self.integer("hidden_size") // heads))

    def rotary(self, *, interleaved: bool = False, fraction: float = 1.0) -> nn.Rotary:
        """From `rope_theta` with `rope_scaling`, or the newer `rope_parameters`."""
        # As in transformers, `rope_scaling` wins where there are both.
        scaling = self.get("rope_scaling") or self.get("rope_parameters", {})
        if not isinstance(scaling, dict) or any(isinstance(x, dict) for x in scaling.values()):
            raise self.error("rope_scaling", "an object of numbers and names", scaling)
        theta = scaling.get("rope_theta", self.get("rope_theta", 10_000.0))
        fraction = self.get("partial_rotary_factor", fraction)
        fraction = scaling.get("partial_rotary_factor", fraction)
        length = {"original_max_position_embeddings": self.get("original_max_position_embeddings")}
        rest = {"rope_theta": theta, "fraction": fraction}
        rope = Settings({**length, **scaling, **rest}, self.path)
        size = int(self.head_dim * rope.number("fraction"))
        if not 0 < size <= self.head_dim:
            raise self.error("partial_rotary_factor", "above 0 and at most 1", fraction)
        return nn.Rotary(
            theta=rope.number("rope_theta"),
            size=None if size == self.head_dim else size,
            interleaved=interleaved,
            scaling=self._scaling(rope),
        )

    def _scaling(self, rope: "Settings") -> nn.AbstractRotaryScaling | None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(kind, str) or kind not in _SCALINGS:
            raise self.error("rope_type", " or ".join(sorted(_SCALINGS)), kind)
        if kind == "default":
            return None
        factor = rope.number("factor")
        if kind == "linear":
            return nn.LinearScaling(factor)
        if kind == "llama3":
            return nn.Llama3Scaling(
                factor,
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_length=rope.integer("original_max_position_embeddings"),
            )
        longest = self.get("max_position_embeddings", 4096)
        return nn.YarnScaling(
            factor,
            original_length=rope.integer("original_max_position_embeddings", longest),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=_number_or_none(rope, "attention_factor"),
            rounds_ramp=rope.flag("truncate", True),
            **_mscales(rope),
        )


@contextlib.contextmanager
def errors_of(settings: Settings) -> Iterator[None]:
    """Parts that cannot be built are an error of the configuration's file."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError) as error:
        if str(error).startswith(f"{settings.path}:"):
            raise
        raise ValueError(f"{settings.path}: {' '.join(str(error).split())[:300]}") from None


def _number_or_none(rope: Settings, key: str) -> float | None:
    return None if rope.get(key) is None else rope.number(key)


def _mscales(rope: Settings) -> dict[str, float]:
    """`mscale` and `mscale_all_dim`; as in transformers, the former does nothing by itself."""
    mscale, mscale_all_dim = rope.number("mscale", 1.0), rope.number("mscale_all_dim", 0.0)
    if not mscale_all_dim:
        return {}
    return {"mscale": mscale or 1.0, "mscale_all_dim": mscale_all_dim}


def rope_config(rotary: nn.Rotary, head_dim: int) -> dict[str, Any]:
    """The keys of `Settings.rotary`, in the form that all readers take."""
    config: dict[str, Any] = {"rope_theta": rotary.theta, "rope_scaling": None}
    if rotary.size is not None:
        config["partial_rotary_factor"] = rotary.size / head_dim
    scaling = rotary.scaling
    if isinstance(scaling, nn.LinearScaling):
        config["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, nn.Llama3Scaling):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    elif isinstance(scaling, nn.YarnScaling):
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.rounds_ramp,
        }
        if scaling.attention_factor is not None:
            config["rope_scaling"]["attention_factor"] = scaling.attention_factor
        if scaling.mscale_all_dim:
            scales = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
            config["rope_scaling"] |= scales
    elif scaling is not None:
        raise ValueError(
            f"`model` has a rotary scaling that no config.json has: {type(scaling).__name__}."
        )
    return config
