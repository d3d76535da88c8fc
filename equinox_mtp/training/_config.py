"""The options of `python -m equinox_mtp train`.

Each is one field of `TrainConfig`, with its default, group, help and range in one place. The fields
are flat, as `TrainConfig(steps=100)` is what one types; groups are for the command's help.
"""

import dataclasses
import numbers
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from equinox_mtp import MTPConfig, Preset
from equinox_mtp.nn import TransformerConfig

_LARGEST = 2**31 - 1
"""JAX counts in 32 bits."""
_FINITE = float(np.finfo(np.float32).max)
_POSITIVE = float(np.finfo(np.float32).tiny)
"""Rates are used in float32: less is 0 there, and more is infinite."""

DATA, MODEL, DEPTHS, OPTIMISATION, DEVICES, OUTPUT = GROUPS = (
    "data",
    "model",
    "prediction depths",
    "optimisation",
    "devices",
    "output",
)


class Option(NamedTuple):
    """What is known of a field of `TrainConfig`, beside its type and default.

    **Fields:**

    - `group`: one of `GROUPS`.
    - `help`: a sentence or two.
    - `is_common`: whether it stands among the first in the command's help.
    - `may_change`: whether a run may go on with another value.
    - `may_differ`: whether the processes of a run may have different values.
    - `kind`, `low`, `high`: of a number, its kind and range.
    - `choices`: of anything else, the values that it can have; empty for any.
    """

    group: str
    help: str
    is_common: bool = False
    may_change: bool = False
    may_differ: bool = False
    kind: type | None = None
    low: int | float = 0
    high: int | float = 0
    choices: tuple[Any, ...] = ()


def _option(default: Any, group: str, help: str, **rest: Any) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(group, help, **rest)})


def _integer(
    default: int | None, group: str, help: str, *, low: int = 0, high: int = _LARGEST, **rest: Any
) -> Any:
    return _option(default, group, help, kind=numbers.Integral, low=low, high=high, **rest)


def _number(
    default: float, group: str, help: str, *, low: float = 0.0, high: float = _FINITE, **rest: Any
) -> Any:
    return _option(default, group, help, kind=numbers.Real, low=low, high=high, **rest)


def _choice(default: Any, group: str, help: str, choices: tuple[Any, ...], **rest: Any) -> Any:
    return _option(default, group, help, choices=choices, **rest)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains a small language model with Multi-Token Prediction.

    The defaults learn the Python standard library, byte by byte, in a few minutes on two cores.
    """

    data: tuple[Path, ...] = _option(
        (),
        DATA,
        "Text files or directories, or .npy/.bin files of token ids (.bin: uint16). Default: the "
        "Python standard library's own source files.",
        is_common=True,
        may_change=True,
        may_differ=True,
    )
    vocab_size: int | None = _integer(
        None, DATA, "For token ids: the size of the vocabulary. Text is bytes and has 257.", low=1
    )
    end_of_document: int | None = _integer(
        None, DATA, "For token ids: the id that ends a document. Text has 256."
    )
    seq_len: int = _integer(256, DATA, "Tokens in a row.", low=1, is_common=True)

    embed_size: int = _integer(128, MODEL, "Features of a hidden state.", low=1, is_common=True)
    num_layers: int = _integer(3, MODEL, "Layers of the main model.", low=1, is_common=True)
    num_heads: int = _integer(4, MODEL, "Query heads of attention.", low=1)
    num_kv_heads: int | None = _integer(
        None,
        MODEL,
        "Key and value heads of attention; must divide num-heads. Default: num-heads.",
        low=1,
    )
    mlp_size: int | None = _integer(
        None,
        MODEL,
        "Inner features of the feed-forward networks. Default: about 8/3 of embed-size.",
        low=1,
    )
    dropout_rate: float = _number(
        0.0, MODEL, "Dropout of attention and feed-forward outputs.", high=1.0
    )
    dtype: str = _choice(
        "float32", MODEL, "Compute dtype; parameters are float32.", ("float32", "bfloat16")
    )

    depths: int = _integer(
        2, DEPTHS, "Prediction depths D; 0 trains the main model alone.", is_common=True
    )
    preset: Preset = _choice(
        "deepseek_v3",
        DEPTHS,
        "Conventions of Multi-Token Prediction; see MTPConfig.",
        get_args(Preset),
    )
    mtp_scaling: tuple[float, float] = _option(
        (0.3, 0.1), DEPTHS, "λ before and after mtp-scaling-switch."
    )
    mtp_scaling_switch: float = _number(
        0.67,
        DEPTHS,
        "The fraction of steps after which λ changes (the paper: 10T of 14.8T tokens).",
        high=1.0,
    )

    steps: int = _integer(300, OPTIMISATION, "Optimizer steps.", low=1, is_common=True)
    batch_size: int = _integer(
        8, OPTIMISATION, "Rows in a step, over all microbatches.", low=1, is_common=True
    )
    accumulate: int = _integer(
        1,
        OPTIMISATION,
        "Microbatches that a step is split into; the gradient is the same for any number.",
        low=1,
    )
    learning_rate: float = _number(
        4e-3, OPTIMISATION, "Peak learning rate of AdamW.", low=_POSITIVE, is_common=True
    )
    warmup_steps: int = _integer(
        30, OPTIMISATION, "Steps of linear warm-up; a cosine down to a tenth follows."
    )
    weight_decay: float = _number(0.1, OPTIMISATION, "Of everything but the scales of norms.")
    max_grad_norm: float = _number(
        1.0, OPTIMISATION, "The gradient is clipped to this global norm.", low=_POSITIVE
    )
    # JAX cuts larger seeds to 32 bits: they would be the same run as others.
    seed: int = _integer(
        0,
        OPTIMISATION,
        "Of the initial values, the split of documents and their order.",
        high=2**32 - 1,
    )

    mesh: str | None = _option(
        None,
        DEVICES,
        "Split the run over all devices: sizes of the mesh axes data, fsdp, tensor and context, "
        "as data=2,fsdp=4. Rows are split over data and fsdp, positions over context, parameters "
        "over fsdp and tensor. Default: one device.",
        may_change=True,
    )
    distributed: bool = _choice(
        False,
        DEVICES,
        "Run in several processes, one command each; JAX finds them on SLURM, GKE and the like.",
        (True, False),
        may_change=True,
    )
    coordinator: str | None = _option(
        None,
        DEVICES,
        "Elsewhere: HOST:PORT of process 0, the same for all.",
        may_change=True,
        may_differ=True,
    )
    num_processes: int | None = _integer(
        None, DEVICES, "Elsewhere: how many processes there are.", low=1, may_change=True
    )
    process_id: int | None = _integer(
        None,
        DEVICES,
        "Elsewhere: which of them this one is, from 0.",
        may_change=True,
        may_differ=True,
    )
    heartbeat_timeout: int = _integer(
        100,
        DEVICES,
        "Seconds without a sign of life after which a process counts as dead, and all others end.",
        low=1,
        may_change=True,
    )

    out: Path | None = _option(
        None,
        OUTPUT,
        "Folder of the run. Default: a new one under runs/ (with --resume: the newest there).",
        is_common=True,
        may_change=True,
        may_differ=True,
    )
    resume: bool = _choice(
        False,
        OUTPUT,
        "Continue the run in --out from its last checkpoint.",
        (True, False),
        is_common=True,
        may_change=True,
    )
    eval_every: int = _integer(
        100, OUTPUT, "Steps between evaluations on held-out documents.", low=1, may_change=True
    )
    eval_rows: int = _integer(
        64,
        OUTPUT,
        "Held-out rows in an evaluation; the last one reads four times as many.",
        low=1,
        may_change=True,
    )
    checkpoint_every: int = _integer(
        100, OUTPUT, "Steps between checkpoints.", low=1, may_change=True
    )
    compare_prompts: int = _integer(
        8,
        OUTPUT,
        "Held-out prompts that a run continues at its end, with and without drafts; 0 for none.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        for name, option in options().items():
            _check_option(self, name, option)
        _check_scaling(self.mtp_scaling)
        object.__setattr__(self, "mtp_scaling", tuple(map(float, self.mtp_scaling)))
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


def options() -> dict[str, Option]:
    """What is known of every field, by its name."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(TrainConfig)}


def without_devices(config: TrainConfig) -> TrainConfig:
    """The same options but for the devices: a run may go on on others."""
    devices = {name for name, option in options().items() if option.group == DEVICES}
    return dataclasses.replace(config, **{name: _DEFAULTS[name] for name in devices})


def _check_option(config: TrainConfig, name: str, option: Option) -> None:
    """Options that may be `None` default to it. NumPy's numbers become Python's."""
    value = getattr(config, name)
    if option.kind is not None and not (value is None and _DEFAULTS[name] is None):
        _check_number(name, value, option.kind, option.low, option.high)
        plain: Any = int if option.kind is numbers.Integral else float
        object.__setattr__(config, name, plain(value))
    # By its type, too: 1 is equal to `True`.
    choices = [(type(choice), choice) for choice in option.choices]
    if choices and (type(value), value) not in choices:
        wanted = " or ".join(repr(choice) for _, choice in choices)
        raise ValueError(f"`{name}` must be {wanted}; got {_shown(value)}.")


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
