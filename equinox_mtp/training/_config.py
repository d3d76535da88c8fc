"""The options of `python -m equinox_mtp train`."""

import dataclasses
import numbers
from pathlib import Path
from typing import Any, get_args

import numpy as np

from equinox_mtp import MTPConfig, Preset
from equinox_mtp.nn import TransformerConfig

_LARGEST = 2**31 - 1
"""JAX counts in 32 bits."""
_FINITE = float(np.finfo(np.float32).max)
_POSITIVE = float(np.finfo(np.float32).tiny)
"""Rates are used in float32: less is 0 there, and more is infinite."""

_INTEGERS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("depths", "end_of_document", "process_id"), (0, _LARGEST)),
    **dict.fromkeys(("warmup_steps", "compare_prompts"), (0, _LARGEST)),
    **dict.fromkeys(("vocab_size", "embed_size", "num_layers", "mlp_size"), (1, _LARGEST)),
    **dict.fromkeys(("num_heads", "num_kv_heads", "num_processes"), (1, _LARGEST)),
    **dict.fromkeys(("steps", "batch_size", "accumulate", "seq_len"), (1, _LARGEST)),
    **dict.fromkeys(("eval_every", "eval_rows", "checkpoint_every"), (1, _LARGEST)),
    "heartbeat_timeout": (1, _LARGEST),
    # JAX cuts larger ones to 32 bits: they would be the same run as others.
    "seed": (0, 2**32 - 1),
}
_FLOATS: dict[str, tuple[float, float]] = {
    "dropout_rate": (0.0, 1.0),
    "learning_rate": (_POSITIVE, _FINITE),
    "weight_decay": (0.0, _FINITE),
    "max_grad_norm": (_POSITIVE, _FINITE),
    "mtp_scaling_switch": (0.0, 1.0),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "preset": get_args(Preset),
    "resume": (True, False),
    "distributed": (True, False),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains a small language model with Multi-Token Prediction.

    The defaults learn the Python standard library, byte by byte, in a few minutes on two cores.
    """

    data: tuple[Path, ...] = ()
    """Text files or directories, or .npy/.bin files of token ids (.bin: uint16). Default: the
    Python standard library's own source files."""
    vocab_size: int | None = None
    """For token ids: the size of the vocabulary. Text is bytes and has 257."""
    end_of_document: int | None = None
    """For token ids: the id that ends a document. Text has 256."""
    out: Path | None = None
    """Folder of the run. Default: a new one under runs/ (with --resume: the newest there)."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""

    depths: int = 2
    """Prediction depths D; 0 trains the main model alone."""
    preset: Preset = "deepseek_v3"
    """Conventions of Multi-Token Prediction; see MTPConfig."""
    embed_size: int = 128
    """Features of a hidden state."""
    num_layers: int = 3
    """Layers of the main model."""
    num_heads: int = 4
    """Query heads of attention."""
    num_kv_heads: int | None = None
    """Key and value heads of attention; must divide num-heads. Default: num-heads."""
    mlp_size: int | None = None
    """Inner features of the feed-forward networks. Default: about 8/3 of embed-size."""
    dropout_rate: float = 0.0
    """Dropout of attention and feed-forward outputs."""
    dtype: str = "float32"
    """Compute dtype, float32 or bfloat16; parameters are float32."""

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 8
    """Rows in a step, over all microbatches."""
    accumulate: int = 1
    """Microbatches that a step is split into; the gradient is the same for any number."""
    seq_len: int = 256
    """Tokens in a row."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 30
    """Steps of linear warm-up; a cosine down to a tenth follows."""
    weight_decay: float = 0.1
    """Of everything but the scales of norms."""
    max_grad_norm: float = 1.0
    """The gradient is clipped to this global norm."""
    mtp_scaling: tuple[float, float] = (0.3, 0.1)
    """λ before and after mtp-scaling-switch."""
    mtp_scaling_switch: float = 0.67
    """The fraction of steps after which λ changes (the paper: 10T of 14.8T tokens)."""

    mesh: str | None = None
    """Split the run over all devices: sizes of the mesh axes data, fsdp, tensor and context, as
    data=2,fsdp=4. Rows are split over data and fsdp, positions over context, parameters over fsdp
    and tensor. Default: one device."""
    distributed: bool = False
    """Run in several processes, one command each; JAX finds them on SLURM, GKE and the like."""
    coordinator: str | None = None
    """Elsewhere: HOST:PORT of process 0, the same for all."""
    num_processes: int | None = None
    """Elsewhere: how many processes there are."""
    process_id: int | None = None
    """Elsewhere: which of them this one is, from 0."""
    heartbeat_timeout: int = 100
    """Seconds after which a process that is not heard of is taken for dead, and all others end."""

    eval_every: int = 100
    """Steps between evaluations on held-out documents."""
    eval_rows: int = 64
    """Held-out rows in an evaluation; the last one reads four times as many."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    compare_prompts: int = 8
    """Held-out prompts that a run continues at its end, with and without drafts; 0 for none."""
    seed: int = 0
    """Of the initial values, the split of documents and their order."""

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            self._check(name, numbers.Integral, low, high)
        for name, (low, high) in _FLOATS.items():
            self._check(name, numbers.Real, low, high)
        _check_scaling(self.mtp_scaling)
        object.__setattr__(self, "mtp_scaling", tuple(map(float, self.mtp_scaling)))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            # By its type, too: 1 is equal to `True`.
            if (type(value), value) not in [(type(choice), choice) for choice in choices]:
                wanted = " or ".join(map(repr, choices))
                raise ValueError(f"`{name}` must be {wanted}; got {_shown(value)}.")
        _check_paths(self.data, self.out)
        bare = {"coordinator", "num_processes", "process_id"}
        given = {name for name in bare if getattr(self, name) is not None}
        if given and (given != bare or not self.distributed):
            raise ValueError(
                "`coordinator`, `num_processes` and `process_id` go together, with `distributed`; "
                f"got {', '.join(sorted(given))}. On a cluster that JAX knows --distributed is "
                "enough."
            )
        if self.num_processes is not None and not (self.process_id or 0) < self.num_processes:
            raise ValueError(
                f"`process_id` must be less than `num_processes`, which is {self.num_processes}; "
                f"got {self.process_id}. The first is 0."
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"`accumulate` must divide `batch_size`, so that all microbatches are alike; got "
                f"{self.accumulate} and {self.batch_size}."
            )
        if self.seq_len <= self.depths:
            raise ValueError(
                f"`seq_len` must be more than `depths`, or the last depth has nothing to predict; "
                f"got {self.seq_len} and {self.depths}. Take longer rows, or fewer depths."
            )

    def _check(self, name: str, kind: type, low: int | float, high: int | float) -> None:
        """Options that may be `None` default to it. NumPy's numbers become Python's."""
        value = getattr(self, name)
        if value is None and _DEFAULTS[name] is None:
            return
        _check_number(name, value, kind, low, high)
        plain: Any = int if kind is numbers.Integral else float
        object.__setattr__(self, name, plain(value))

    def transformer(self, vocab_size: int) -> TransformerConfig:
        """The main model's configuration."""
        return TransformerConfig(
            vocab_size=vocab_size,
            embed_size=self.embed_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            mlp_size=self.mlp_size,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
        )

    def mtp(self) -> MTPConfig:
        """The configuration of Multi-Token Prediction."""
        if self.depths == 0:
            return MTPConfig(num_depths=0)
        return MTPConfig.preset(self.preset, self.depths)


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def _check_number(name: str, value: Any, kind: type, low: int | float, high: int | float) -> None:
    # `True` counts as an integer, and a comparison with NaN is always false.
    if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high:
        return
    what = "an integer" if kind is numbers.Integral else "a finite number"
    limit = {0: "zero or more", 1: "1 or more", _POSITIVE: "more than 0"}.get(low, f"from {low}")
    if high not in (_LARGEST, _FINITE) or (isinstance(value, kind) and value > high):
        limit = f"from {low:g} to {high:.10g}"
    raise ValueError(f"`{name}` must be {what}, {limit}; got {_shown(value)}.")


def _check_scaling(values: Any) -> None:
    if not isinstance(values, tuple) or len(values) != 2:
        raise ValueError(
            f"`mtp_scaling` must be a pair of numbers, λ before and after; got {_shown(values)}."
        )
    for value in values:
        _check_number("mtp_scaling", value, numbers.Real, 0.0, _FINITE)


def _check_paths(data: Any, out: Any) -> None:
    if not isinstance(data, tuple) or not all(isinstance(path, Path) for path in data):
        raise ValueError(
            f"`data` must be a tuple of `pathlib.Path`s; got {_shown(data)}. For a single file "
            "write (Path(name),)."
        )
    if not (out is None or isinstance(out, Path)):
        raise ValueError(f"`out` must be a `pathlib.Path`, or `None`; got {_shown(out)}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
