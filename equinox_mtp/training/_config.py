"""The options of `python -m equinox_mtp train`.

Each is one field of `TrainConfig`, with its default, group, help and range in one place. The fields
are flat, as `TrainConfig(steps=100)` is what one types; groups are for the command's help.
"""

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from equinox_mtp import MTPConfig, Preset
from equinox_mtp.distillation import DraftDivergence
from equinox_mtp.nn import TransformerConfig

from ._config_checks import check_options, check_paths, checked_scaling
from ._options import (
    DATA,
    DEPTHS,
    DEVICES,
    MODEL,
    OPTIMISATION,
    OUTPUT,
    SMALLEST_RATE,
    USUAL_TEMPERATURE,
    Option,
    choice,
    integer,
    number,
    option,
)

Objective: TypeAlias = Literal["cross_entropy", DraftDivergence]
_SIZES = ("embed_size", "num_layers", "num_heads", "num_kv_heads", "mlp_size", "dropout_rate")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains a small language model with Multi-Token Prediction.

    The defaults learn the Python standard library, byte by byte, in a few minutes on two cores.

    >>> config = training.TrainConfig(steps=100, depths=3)
    >>> config.mtp().num_depths
    3
    """

    data: tuple[Path, ...] = option(
        (),
        DATA,
        "Text files, .jsonl, .jsonl.gz and .parquet files of texts, directories of them, or "
        ".npy/.bin files of token ids (.bin: uint16). Default: the Python standard library's own "
        "source files.",
        is_common=True,
        may_change=True,
        may_differ=True,
    )
    text_field: str = option(
        "text",
        DATA,
        "The field of .jsonl lines, or the .parquet column, that holds the text.",
        may_change=True,
    )
    tokenizer: Path | None = option(
        None,
        DATA,
        "Read text as the tokens of this tokenizer.json, or of the one in this folder, and not as "
        "bytes; needs the extra hf.",
        may_change=True,
        may_differ=True,
    )
    vocab_size: int | None = integer(
        None,
        DATA,
        "For token ids: the size of the vocabulary. Text is read as bytes, which have 257 ids.",
        at_least=1,
    )
    end_of_document: int | None = integer(
        None,
        DATA,
        "For token ids, and for a tokenizer that names none: the id that ends a document. For "
        "bytes it is 256.",
    )
    seq_len: int = integer(256, DATA, "Tokens in a row.", at_least=1, is_common=True)
    self_generate: int | None = integer(
        None,
        DATA,
        "Train on this many texts that the frozen model writes itself, in place of the training "
        "data: each continues the first seq-len // 4 tokens of a training document, up to seq-len "
        "tokens or the model's end. They are kept in the run's folder.",
        at_least=1,
    )
    self_generate_temperature: float = number(
        USUAL_TEMPERATURE,
        DATA,
        "The temperature of the draws of these texts; 0 takes the best token.",
    )

    model: Path | None = option(
        None,
        MODEL,
        "Start from the released model in this folder, with fresh prediction depths: config.json, "
        "*.safetensors, tokenizer.json. The sizes below are its own then.",
        is_common=True,
        may_change=True,
        may_differ=True,
    )
    architecture: Path | None = option(
        None,
        MODEL,
        "Train a model of this architecture from scratch: a config.json of a family that "
        "`pretrained` reads, or one of the small ones that come with the library: dense, "
        "deepseek_v3 (latent attention, experts), hybrid (gated delta layers, experts). The sizes "
        "below are its own then; depths are added as asked for.",
        is_common=True,
        may_change=True,
        may_differ=True,
    )
    freeze_model: bool = choice(
        False,
        MODEL,
        "Train the prediction depths alone, and leave the main model as it is.",
        (True, False),
    )
    cache_hidden_states: bool = choice(
        False,
        MODEL,
        "With freeze-model: keep what the main model makes of each row in the run's folder, and "
        "read it from there in later epochs. Its size is said at the start.",
        (True, False),
        may_change=True,
    )
    embed_size: int = integer(128, MODEL, "Features of a hidden state.", at_least=1, is_common=True)
    num_layers: int = integer(3, MODEL, "Layers of the main model.", at_least=1, is_common=True)
    num_heads: int = integer(4, MODEL, "Query heads of attention.", at_least=1)
    num_kv_heads: int | None = integer(
        None,
        MODEL,
        "Key and value heads of attention; must divide num-heads. Default: num-heads.",
        at_least=1,
    )
    mlp_size: int | None = integer(
        None,
        MODEL,
        "Inner features of the feed-forward networks. Default: about 8/3 of embed-size.",
        at_least=1,
    )
    dropout_rate: float = number(
        0.0, MODEL, "Dropout of attention and feed-forward outputs.", at_most=1.0
    )
    dtype: str = choice(
        "float32", MODEL, "Compute dtype; parameters are float32.", ("float32", "bfloat16")
    )

    depths: int = integer(
        2, DEPTHS, "Prediction depths D; 0 trains the main model alone.", is_common=True
    )
    preset: Preset = choice(
        "deepseek_v3",
        DEPTHS,
        "Conventions of Multi-Token Prediction; see MTPConfig.",
        get_args(Preset),
    )
    objective: Objective = choice(
        "cross_entropy",
        DEPTHS,
        "What a depth minimises: its cross-entropy on the text, or its divergence from the main "
        "model; see distillation.draft_losses.",
        get_args(Objective),
    )
    draft_vocab: int | None = integer(
        None,
        DEPTHS,
        "Train the depths to draft from this many ids alone, those most frequent in the data: "
        "steps take less time. generate drafts from the same ones.",
        at_least=1,
    )
    initial_depths: str = choice(
        "random",
        DEPTHS,
        "How depths over a released model begin: random, or trunk: fitted to it by least squares; "
        "see distillation.start_from_trunk. Take a smaller learning rate then, such as 1e-4.",
        ("random", "trunk"),
    )
    depth_decay: float = number(
        1.0,
        DEPTHS,
        "Depth k has the weight depth-decay^(k-1) in the loss, as in FastMTP.",
    )
    curriculum: str = choice(
        "none",
        DEPTHS,
        "Add a depth in each part of the steps (forward), or leave one out (reverse), or none; see "
        "curriculum_depth_weights.",
        ("none", "forward", "reverse"),
    )
    mtp_scaling: tuple[float, float] = option(
        (0.3, 0.1), DEPTHS, "The weight λ of the depths, before and after mtp-scaling-switch."
    )
    mtp_scaling_switch: float = number(
        0.67,
        DEPTHS,
        "The fraction of steps after which λ changes (the paper: 10T of 14.8T tokens).",
        at_most=1.0,
    )

    steps: int = integer(300, OPTIMISATION, "Optimizer steps.", at_least=1, is_common=True)
    batch_size: int = integer(
        8, OPTIMISATION, "Rows in a step, over all microbatches.", at_least=1, is_common=True
    )
    accumulate: int = integer(
        1,
        OPTIMISATION,
        "Microbatches that a step is split into; the gradient is the same for any number.",
        at_least=1,
    )
    optimizer: str = choice(
        "adamw",
        OPTIMISATION,
        "adamw, or muon for matrices and AdamW for everything else.",
        ("adamw", "muon"),
    )
    learning_rate: float = number(
        4e-3, OPTIMISATION, "Peak learning rate.", at_least=SMALLEST_RATE, is_common=True
    )
    warmup_steps: int = integer(
        30, OPTIMISATION, "Steps of linear warm-up; a cosine down to a tenth follows."
    )
    weight_decay: float = number(0.1, OPTIMISATION, "Decay of all weights but norms' scales.")
    max_grad_norm: float = number(
        1.0, OPTIMISATION, "The gradient is clipped to this global norm.", at_least=SMALLEST_RATE
    )
    balance_loss: float = number(
        1e-4,
        OPTIMISATION,
        "With experts: the weight of the routers' sequence-wise balance loss (DeepSeek-V3).",
    )
    router_z_loss: float = number(
        0.0, OPTIMISATION, "With experts: the weight of the routers' z-loss (ST-MoE)."
    )
    router_bias_rate: float = number(
        1e-3,
        OPTIMISATION,
        "With experts: how far a step moves the biases of routers that have them (DeepSeek-V3).",
    )
    # JAX cuts larger seeds to 32 bits: they would be the same run as others.
    seed: int = integer(
        0,
        OPTIMISATION,
        "The seed of the initial values, the split of documents and their order.",
        at_most=2**32 - 1,
    )

    mesh: str | None = option(
        None,
        DEVICES,
        "Split the run over all devices: sizes of the mesh axes data, fsdp, expert, tensor and "
        "context, as data=2,fsdp=4. Rows are split over data and fsdp, positions over context, "
        "parameters over fsdp and tensor, experts over expert. Default: one device.",
        may_change=True,
    )
    peak_flops: float | None = number(
        None,
        DEVICES,
        "Floating-point operations a second that a device promises: a run says which part of them "
        "it uses (model FLOPs utilisation). Known for many accelerators in bfloat16.",
        at_least=1.0,
        may_change=True,
    )
    distributed: bool = choice(
        False,
        DEVICES,
        "Run in several processes, one command each; JAX finds them on SLURM, GKE and the like.",
        (True, False),
        may_change=True,
    )
    coordinator: str | None = option(
        None,
        DEVICES,
        "HOST:PORT of process 0, the same for all; needed where JAX does not find the processes.",
        may_change=True,
        may_differ=True,
    )
    num_processes: int | None = integer(
        None, DEVICES, "The number of processes, with coordinator.", at_least=1, may_change=True
    )
    process_id: int | None = integer(
        None,
        DEVICES,
        "The number of this process, from 0, with coordinator.",
        may_change=True,
        may_differ=True,
    )
    heartbeat_timeout: int = integer(
        100,
        DEVICES,
        "Seconds without a sign of life after which a process counts as dead, and all others end.",
        at_least=1,
        may_change=True,
    )

    out: Path | None = option(
        None,
        OUTPUT,
        "Folder of the run. Default: a new one under runs/ (with --resume: the newest there).",
        is_common=True,
        may_change=True,
        may_differ=True,
    )
    resume: bool = choice(
        False,
        OUTPUT,
        "Continue the run in --out from its last checkpoint.",
        (True, False),
        is_common=True,
        may_change=True,
    )
    eval_every: int = integer(
        100, OUTPUT, "Steps between evaluations on held-out documents.", at_least=1, may_change=True
    )
    eval_rows: int = integer(
        64,
        OUTPUT,
        "Held-out rows in an evaluation; the run's last evaluation reads four times as many.",
        at_least=1,
        may_change=True,
    )
    checkpoint_every: int = integer(
        100, OUTPUT, "Steps between checkpoints.", at_least=1, may_change=True
    )
    compare_prompts: int = integer(
        8,
        OUTPUT,
        "Held-out prompts that a run continues at its end, with and without drafts; 0 for none.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        for name, known in options().items():
            object.__setattr__(self, name, known.check(name, getattr(self, name), _DEFAULTS[name]))
        object.__setattr__(self, "mtp_scaling", checked_scaling(self.mtp_scaling))
        check_paths(
            self.data,
            out=self.out,
            tokenizer=self.tokenizer,
            model=self.model,
            architecture=self.architecture,
        )
        check_options(self, {name: _DEFAULTS[name] for name in _SIZES})

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
    return _without(config, DEVICES)


def without_output(config: TrainConfig) -> TrainConfig:
    """The same options but for the output, which no step reads.

    A step is compiled for the options that it is given: runs of one process that differ in folders,
    as one that goes on does, share it.
    """
    return _without(config, OUTPUT)


def _without(config: TrainConfig, group: str) -> TrainConfig:
    names = {name for name, known in options().items() if known.group == group}
    return dataclasses.replace(config, **{name: _DEFAULTS[name] for name in names})
