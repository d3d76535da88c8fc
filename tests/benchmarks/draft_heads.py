"""Prediction depths trained over a frozen model: one objective against another.

    python tests/benchmarks/draft_heads.py [--preset cpu|tiny] [--runs DIR] [--seeds N …]
        [--objectives NAME …] [--starts NAME …] [--steps N …] [--json FILE]

The model of the default training run stays as it is, and fresh depths are trained over it, for the
same steps on the same rows, once for each objective, seed, number of steps and start: `random`, or
`trunk`, which is `distillation.start_from_trunk`. Acceptance is measured on held-out text:
greedily, and as the expected value of sampling. `jointly` are the depths that were trained with the
model.
"""

import argparse
import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import optax
from generate import TINY, trained
from harness import Row, table, write_json
from tqdm import tqdm

import equinox_mtp as emtp
from equinox_mtp.distillation import draft_losses, freeze_model, start_from_trunk
from equinox_mtp.training import TrainConfig, load_corpus
from equinox_mtp.training._packing import PackedRows
from equinox_mtp.training._step import aligned_batch

DEPTHS, BATCH = 2, 8


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is trained and measured."""

    model: TrainConfig
    steps: int
    held_out_rows: int


PRESETS = {"cpu": Preset(TrainConfig(), 120, 128), "tiny": Preset(TINY, 3, 8)}
OBJECTIVES = ("cross_entropy", "total_variation", "hybrid")


def with_fresh_depths(model: emtp.MTPModel, config: TrainConfig, seed: int) -> emtp.MTPModel:
    """The model with random depths, in DeepSeek-V3's conventions."""
    vocab_size, embed_size = model.decoder.output_head().shape  # type: ignore[union-attr]
    make_layer = functools.partial(emtp.nn.TransformerDecoderLayer, config.transformer(vocab_size))
    block = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig.preset("deepseek_v3", DEPTHS),
        make_layer,
        embed_size=embed_size,
        key=jax.random.key(seed + 1),
    )
    return emtp.MTPModel(model.decoder, block)


def first_rows(rows: PackedRows, preset: Preset) -> emtp.Batch:
    """As many as a fit of the depths needs: 32 tokens for each feature."""
    num_rows = -(-32 * preset.model.embed_size // preset.model.seq_len)
    return aligned_batch(rows.read(rows.of_step(0, num_rows, seed=0)), DEPTHS)


def train_depths(
    model: emtp.MTPModel, rows: PackedRows, objective: str, steps: int, seed: int
) -> emtp.MTPModel:
    """The model after some steps in which its depths alone have trained."""
    heads, frozen = freeze_model(model)
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, min(20, steps - 1), steps, 3e-4)
    decay = {"weight_decay": 0.1, "mask": emtp.weight_decay_mask}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, **decay))
    pooled = functools.partial(emtp.calculate_mtp_loss, scaling_factor=1.0)

    @eqx.filter_jit
    def step(heads: Any, optimizer_state: Any, frozen: Any, rows: Any) -> tuple[Any, Any]:
        def loss(heads: Any) -> jax.Array:
            model, batch = eqx.combine(heads, frozen), aligned_batch(rows, DEPTHS)
            if objective == "cross_entropy":
                return model(batch, objective=pooled, predictions=False).mtp.loss
            kind: Any = objective
            return draft_losses(model, batch, divergence=kind, objective=pooled).loss

        grads = eqx.filter_grad(loss)(heads)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, heads)
        return eqx.apply_updates(heads, updates), optimizer_state

    optimizer_state = optimizer.init(heads)
    for index in tqdm(range(steps), objective, leave=False):
        batch = rows.read(rows.of_step(index, BATCH, seed))
        heads, optimizer_state = step(heads, optimizer_state, frozen, batch)
    return eqx.combine(heads, frozen)


@eqx.filter_jit
def acceptance_of_batch(model: emtp.MTPModel, rows: Any) -> tuple[Any, Any]:
    batch = aligned_batch(rows, model.block.config.num_depths)
    output = model(batch)
    greedy = emtp.calculate_mtp_acceptance_rate(output.mtp.acceptance, output.predictions)
    return greedy, draft_losses(model, batch).acceptance


def acceptance(model: emtp.MTPModel, rows: PackedRows, max_rows: int) -> Row:
    """Greedy and expected acceptance of each depth."""
    found = [acceptance_of_batch(model, rows.read(x)) for x in rows.in_order(BATCH, max_rows)]
    # Sums and counts of all batches.
    greedy, sampled = jax.tree.map(lambda *x: sum(x), *found)
    return {
        "greedy": greedy.independent.tolist(),
        "greedy_length": float(greedy.expected_accepted_length),
        "sampled": sampled.independent.tolist(),
        "sampled_length": float(sampled.expected_accepted_length),
    }


def print_table(rows: list[Row]) -> None:
    """A table for people, and for README."""
    columns = ("start", "objective", "steps", "seed", "greedy: depths", "τ", "sampled: depths", "τ")
    lines = [
        (
            row["start"],
            row["objective"],
            row["steps"],
            row["seed"],
            " ".join(f"{x:.1%}" for x in row["greedy"]),
            f"{row['greedy_length']:.3f}",
            " ".join(f"{x:.1%}" for x in row["sampled"]),
            f"{row['sampled_length']:.3f}",
        )
        for row in rows
    ]
    print(f"\n{table(columns, lines)}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--runs", type=Path, help="where trained models are kept, and looked for")
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    parser.add_argument("--starts", nargs="+", choices=("random", "trunk"), default=("random",))
    parser.add_argument("--steps", type=int, nargs="+", help="each is a training of its own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    seq_len = preset.model.seq_len
    train_rows, held_out = (PackedRows(part, seq_len) for part in load_corpus(()).split(0))
    rows: list[Row] = []

    def measure(model: emtp.MTPModel, **known: Any) -> None:
        rows.append({**known, **acceptance(model, held_out, preset.held_out_rows)})
        # A run that is cut off leaves what it has measured.
        write_json(arguments.json, {"preset": arguments.preset, "rows": rows})

    with tempfile.TemporaryDirectory() as temporary:
        model, _ = trained(preset.model, (arguments.runs or Path(temporary)) / "default")
    measure(model, start="jointly", objective="cross_entropy", steps=preset.model.steps, seed=0)
    for start, seed in itertools.product(arguments.starts, arguments.seeds):
        fresh = with_fresh_depths(model, preset.model, seed)
        if start == "trunk":
            fresh = start_from_trunk(fresh, [first_rows(train_rows, preset)])
        measure(fresh, start=start, objective="-", steps=0, seed=seed)
        trainings = itertools.product(arguments.objectives, arguments.steps or [preset.steps])
        for objective, steps in trainings:
            done = train_depths(fresh, train_rows, objective, steps, seed)
            measure(done, start=start, objective=objective, steps=steps, seed=seed)
    print_table(rows)


if __name__ == "__main__":
    main()
