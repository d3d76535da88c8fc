"""The options of `python -m equinox_mtp train`."""

import dataclasses
from pathlib import Path

from equinox_mtp import MTPConfig, Preset
from equinox_mtp.nn import TransformerConfig


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
        for name in ("steps", "batch_size", "accumulate", "seq_len"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "positive")
        for name in ("eval_every", "eval_rows", "checkpoint_every", "heartbeat_timeout"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "positive")
        for name in ("depths", "warmup_steps", "compare_prompts"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "zero or positive")
        bare = {"coordinator", "num_processes", "process_id"}
        given = {name for name in bare if getattr(self, name) is not None}
        if given and (given != bare or not self.distributed):
            raise ValueError(
                "`coordinator`, `num_processes` and `process_id` go together, with `distributed`; "
                f"got {', '.join(sorted(given))}. On a cluster that JAX knows --distributed is "
                "enough."
            )
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        _require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "positive")
        switch = self.mtp_scaling_switch
        _require(0 <= switch <= 1, "mtp_scaling_switch", switch, "in [0, 1]")
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


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {wanted}; got {value}.")
