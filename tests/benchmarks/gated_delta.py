"""Gated DeltaNet: prefill by the length of rows, training by the size of chunks, single steps.

    python tests/benchmarks/gated_delta.py [--preset cpu|tiny] [--rounds N] [--json FILE]

Prefill should take time linear in the length. All are measured in turn.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
from harness import Compiled, Row, Timed, run_in_turn, table, write_json

from equinox_mtp import nn
from equinox_mtp.nn.gated_delta import _rule


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of a layer, lengths of rows, and sizes of chunks."""

    embed: int
    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    train_length: int
    rollback: int = 4


PRESETS = {
    "cpu": Preset(256, 4, 128, (2048, 8192), (16, 32, 64, 128), 2048),
    "tiny": Preset(8, 2, 4, (8, 32), (4, 8), 16),
}


def prefill(layer: nn.GatedDeltaNet, x: jax.Array) -> Any:
    """The first positions of a row, into a cache."""
    cache = layer.init_cache(1, x.shape[1], x.dtype, rollback=4)
    position_ids = jnp.arange(x.shape[1])[None]
    return layer.prefill(x, cache, position_ids=position_ids)


def train_by(size: int) -> Callable[..., Any]:
    """Value and gradient of half the squared sum, by chunks of a size."""

    def loss(layer: nn.GatedDeltaNet, x: jax.Array) -> jax.Array:
        out = layer(x, position_ids=jnp.arange(x.shape[1])[None])
        return 0.5 * jnp.sum(jnp.square(out))

    def train(layer: nn.GatedDeltaNet, x: jax.Array) -> Any:
        with mock.patch.object(_rule, "CHUNK_SIZE", size):  # read while this is traced
            return eqx.filter_value_and_grad(loss)(layer, x)

    return train


def step(layer: nn.GatedDeltaNet, x: jax.Array, cache: Any, position_ids: jax.Array) -> Any:
    """A few positions after those in a cache."""
    return layer.decode(x, cache, position_ids=position_ids)


def compiled_cases(preset: Preset) -> dict[tuple[str, int], Compiled]:
    """By what is run, and its length, size of chunks, or number of positions."""
    sizes = preset.embed, preset.heads, preset.heads, preset.head_dim, preset.head_dim
    layer = nn.GatedDeltaNet(*sizes, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, max(preset.lengths), preset.embed))
    cases = {("prefill", n): Compiled(prefill, layer, x[:, :n]) for n in preset.lengths}
    for size in preset.chunks:
        rows = x[:, : preset.train_length]
        cases["train by chunks of", size] = Compiled(train_by(size), layer, rows)
    for count, rollback in ((1, 0), (preset.rollback, preset.rollback)):
        cache = layer.init_cache(1, 0, x.dtype, rollback=rollback)
        position_ids = jnp.arange(count)[None]
        cases["step of", count] = Compiled(step, layer, x[:, :count], cache, position_ids)
    return cases


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    preset = PRESETS[arguments.preset]
    compiled = compiled_cases(preset)
    timed = {case: Timed(function) for case, function in compiled.items()}
    run_in_turn(list(timed.values()), arguments.rounds)
    rows: list[Row] = [
        {
            "what": what,
            "size": size,
            "seconds": timed[what, size].seconds,
            "temp_bytes": compiled[what, size].temp_bytes,
        }
        for what, size in timed
    ]
    short, long = (timed["prefill", n].seconds for n in (min(preset.lengths), max(preset.lengths)))
    report = {"rows": rows, "of_short": long / short, "chunk_size": _rule.CHUNK_SIZE}
    write_json(arguments.json, report)
    lines = [
        (r["what"], r["size"], f"{1e3 * r['seconds']:.2f}", f"{r['temp_bytes'] / 2**20:.1f}")
        for r in rows
    ]
    print(table(("what", "size", "ms", "MiB"), lines))
    print(
        f"\n{max(preset.lengths)} positions take {long / short:.2f} of the time of "
        f"{min(preset.lengths)}. Chunks have {_rule.CHUNK_SIZE} positions."
    )


if __name__ == "__main__":
    main()
