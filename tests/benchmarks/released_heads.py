"""Prediction depths for a released model: trained over it by the command, then decoding.

    python tests/benchmarks/released_heads.py FOLDER [--runs DIR] [--steps N] [--objectives NAME …]
        [--draft-vocab N] [--json FILE]

`python -m equinox_mtp train --model FOLDER --freeze-model --initial-depths trunk` trains three
depths with one repeated layer, once for each objective, on the source files of the Python standard
library (or `--data`), to draft from the ids that are most frequent there. On documents that were
held out, acceptance is that of greedy drafts, and the expected one of sampling. Then held-out
prompts are continued greedily, plainly and with drafts, in turn. `chat_answers.py` writes a chat
model's own answers, as `--data` for it.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from harness import Row, table, write_json

import equinox_mtp as emtp
from equinox_mtp import speculative, training
from equinox_mtp.training import TrainConfig, compare, held_out_prompts, load_model
from equinox_mtp.training._packing import PackedRows
from equinox_mtp.training._prepare import prepare

DEPTHS = 3


def config_of(arguments: argparse.Namespace, objective: str, out: Path) -> TrainConfig:
    """The options of a run."""
    return TrainConfig(
        model=arguments.folder,
        data=tuple(arguments.data),
        freeze_model=True,
        cache_hidden_states=True,
        depths=DEPTHS,
        preset="fast_mtp",
        objective=objective,  # type: ignore[arg-type]
        depth_decay=0.8,
        initial_depths="trunk",
        draft_vocab=arguments.draft_vocab,
        weight_decay=0.0,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        learning_rate=arguments.learning_rate,
        warmup_steps=min(100, arguments.steps - 1),
        eval_every=arguments.steps,
        eval_rows=arguments.batch_size,
        checkpoint_every=arguments.steps,
        compare_prompts=0,
        out=out,
    )


def trained(config: TrainConfig) -> tuple[emtp.MTPModel, float]:
    """The model of a run, which is trained if it does not exist; the seconds that took."""
    assert config.out is not None
    started = time.perf_counter()
    if not (config.out / "checkpoints").is_dir():
        training.train(config)
    return load_model(config.out)[0], time.perf_counter() - started


def acceptance(model: emtp.MTPModel, rows: PackedRows, max_rows: int, vocab: np.ndarray) -> Row:
    """Greedy and expected acceptance of each depth, of drafts from some ids."""
    measure = eqx.filter_jit(speculative.measure_acceptance)
    found = []
    for indices in rows.in_order(4, max_rows):
        batch = rows.read(indices)
        found.append(
            measure(
                model,
                batch.tokens,
                segment_ids=batch.segment_ids,
                draft_vocab=jnp.asarray(vocab),
                temperature=1.0,
            )
        )
    # Sums and counts of all batches.
    total = functools.reduce(lambda x, y: x + y, found)
    return {
        "greedy": total.overall.independent.tolist(),
        "greedy_length": float(total.overall.expected_accepted_length),
        "sampled": total.sampled.independent.tolist(),
        "sampled_length": float(total.sampled.expected_accepted_length),
    }


def decoding(
    model: emtp.MTPModel, prompts: list[np.ndarray], vocab: np.ndarray, end: int | None, new: int
) -> list[Row]:
    """Greedy continuations up to the end of a document, plain and with one to three drafts."""
    rows: list[Row] = []
    for num_drafts in range(1, DEPTHS + 1):
        found = compare(
            model,
            prompts,
            max_new_tokens=new,
            num_drafts=num_drafts,
            draft_vocab=vocab,
            eos_id=end,
        )
        rows.append(
            {
                "draft_vocab": len(vocab),
                "num_drafts": num_drafts,
                "plain": found.num_tokens / found.plain_seconds,
                "drafted": found.num_tokens / found.seconds,
                "speedup": found.speedup,
                "tokens_per_pass": found.tokens_per_pass,
                "accepted": found.accepted_per_position,
                "same": found.same_tokens,
            }
        )
    return rows


def print_tables(acceptances: list[Row], speeds: list[Row]) -> None:
    """Tables for people, and for README."""
    heading = ("objective", "steps", "tokens", "minutes", "greedy: depths", "τ", "sampled", "τ")
    lines: list[Any] = [
        (
            row["objective"],
            row["steps"],
            f"{row['tokens']:,}",
            f"{row['seconds'] / 60:.0f}",
            " ".join(f"{x:.1%}" for x in row["greedy"]),
            f"{row['greedy_length']:.2f}",
            " ".join(f"{x:.1%}" for x in row["sampled"]),
            f"{row['sampled_length']:.2f}",
        )
        for row in acceptances
    ]
    print(f"\n{table(heading, lines)}\n")
    heading = ("objective", "ids drafted", "drafts", "plain", "drafted", "speed-up", "τ", "equal")
    lines = [
        (
            row["objective"],
            row["draft_vocab"],
            row["num_drafts"],
            f"{row['plain']:.1f}",
            f"{row['drafted']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['same']:.0%}",
        )
        for row in speeds
    ]
    print(table(heading, lines))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the released model")
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--runs", type=Path, help="where runs are kept, and looked for")
    parser.add_argument("--objectives", nargs="+", default=["hybrid"])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--held-out-rows", type=int, default=32)
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    acceptances, speeds = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for objective in arguments.objectives:
            config = config_of(
                arguments, objective, (arguments.runs or Path(temporary)) / objective
            )
            model, seconds = trained(config)
            run = prepare(config)
            held_out = PackedRows(run.held_out_corpus, config.seq_len)
            vocab = run.draft_vocab
            assert vocab is not None
            found = acceptance(model, held_out, arguments.held_out_rows, vocab)
            tokens = config.steps * config.batch_size * config.seq_len
            known = {"objective": objective, "steps": config.steps, "tokens": tokens}
            acceptances.append({**known, "seconds": seconds, **found})
            # A run that is cut off leaves what it has measured.
            write_json(arguments.json, {"acceptance": acceptances, "decoding": speeds})
            prompts = held_out_prompts(
                run.held_out_corpus, num_prompts=arguments.prompts, length=config.seq_len // 4
            )
            end = run.info.config.end_of_document
            for row in decoding(model, prompts, vocab, end, arguments.new_tokens):
                speeds.append({"objective": objective, **row})
    print_tables(acceptances, speeds)
    write_json(arguments.json, {"acceptance": acceptances, "decoding": speeds})


if __name__ == "__main__":
    main()
