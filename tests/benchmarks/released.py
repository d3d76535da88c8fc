"""A released model: its numbers against recorded ones, and plain decoding against the memory.

    python tests/benchmarks/released.py FOLDER [--reference visible.npz] [--json FILE]

A token of plain decoding at batch 1 has to read all weights once. The script measures how fast this
machine reads memory, and how long a token takes (from continuations of two lengths, so that the
prompt's pass and the start do not count), by turns in one run; medians of several.

`--reference` is an .npz file with, for each prompt k, `ids{k}` [1 seq], `top_ids{k}` and
`top_logits{k}` [seq top], `logsumexp{k}` [seq] and `greedy{k}` [1 length]: prompt and continuation.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from harness import Timed, run_in_turn, table, write_json

import equinox_mtp as emtp
from equinox_mtp import pretrained, speculative

_BYTES = 1 << 30


@eqx.filter_jit
def logits_of(model: emtp.MTPModel, ids: jax.Array) -> jax.Array:
    """`[seq vocab]` of a single row."""
    positions = jnp.arange(ids.shape[1])[None]
    hidden = model.decoder.final_norm(model.decoder(ids, position_ids=positions))  # type: ignore[arg-type]
    return emtp.LinearHead(model.decoder.output_head())(hidden)[0]  # type: ignore[arg-type]


def differences(model: emtp.MTPModel, reference: Path) -> list[dict[str, Any]]:
    """How far logits are from the recorded ones, and whether continuations are the same."""
    rows = []
    with np.load(reference) as stored:
        numbers = dict(stored)
    for k in range(sum(name.startswith("ids") for name in numbers)):
        ids, greedy = numbers[f"ids{k}"], numbers[f"greedy{k}"]
        logits = np.asarray(logits_of(model, jnp.asarray(ids)), np.float64)
        top = np.take_along_axis(logits, numbers[f"top_ids{k}"], axis=1)
        highest = logits.max(-1, keepdims=True)
        log_sum = highest[:, 0] + np.log(np.exp(logits - highest).sum(-1))
        new = greedy.shape[1] - ids.shape[1]
        generation = speculative.generate(model, ids, max_new_tokens=new, num_drafts=0)
        rows.append(
            {
                "prompt": k,
                "top_logits": float(np.abs(top - numbers[f"top_logits{k}"]).max()),
                "log_sum_exp": float(np.abs(log_sum - numbers[f"logsumexp{k}"]).max()),
                "greedy_equal": bool(np.array_equal(generation.tokens, greedy)),
            }
        )
    return rows


def measure(model: emtp.MTPModel, rounds: int, short: int, long: int) -> dict[str, float]:
    """Medians of bandwidth, and of the time of a token."""
    block = jnp.ones(_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    prompt = np.ones((1, 16), np.int32)

    def decode(length: int) -> Timed:
        return Timed(
            lambda: speculative.generate(model, prompt, max_new_tokens=length, num_drafts=0)
        )

    read, few, many = Timed(lambda: total(block)), decode(short), decode(long)
    run_in_turn((read, few, many, read), rounds)
    pairs = zip(few.times, many.times, strict=True)
    token = statistics.median((more - less) / (long - short) for less, more in pairs)
    weights = sum(x.nbytes for x in jax.tree.leaves(eqx.filter(model.decoder, eqx.is_array)))
    bandwidth = _BYTES / read.seconds
    return {
        "weights_bytes": weights,
        "bandwidth_gb_s": bandwidth / 1e9,
        "token_ms": 1e3 * token,
        "tokens_per_second": 1 / token,
        "ideal_ms": 1e3 * weights / bandwidth,
        "of_ideal": weights / bandwidth / token,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A released model: its numbers, and the speed of plain decoding."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 80))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    model, _ = pretrained.load(arguments.folder, tokenizer=False)
    report: dict[str, Any] = {"load_s": time.perf_counter() - started}
    print(f"loaded in {report['load_s']:.1f} s")
    if arguments.reference is not None:
        report["differences"] = differences(model, arguments.reference)
        lines = [
            (
                row["prompt"],
                f"{row['top_logits']:.1e}",
                f"{row['log_sum_exp']:.1e}",
                "equal" if row["greedy_equal"] else "differs",
            )
            for row in report["differences"]
        ]
        columns = ("prompt", "top logits, largest error", "log-sum-exp", "greedy continuation")
        print(table(columns, lines))
    report |= measure(model, arguments.rounds, *arguments.tokens)
    line = (
        f"{report['weights_bytes'] / 1e6:.0f} MB",
        f"{report['bandwidth_gb_s']:.1f} GB/s",
        f"{report['token_ms']:.1f} ms",
        f"{report['tokens_per_second']:.1f}",
        f"{report['ideal_ms']:.1f} ms",
        f"{report['of_ideal']:.2f}",
    )
    columns = ("weights", "memory reads", "a token", "tokens/s", "all weights once", "of it")
    print(table(columns, [line]))
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
