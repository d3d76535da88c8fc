"""A few rows times matrices: how kernels lie in memory, and what a row more costs.

    python tests/benchmarks/few_rows.py [--sizes cpu|tiny] [--rounds N] [--json FILE]

`inputs first` is a kernel as it is trained, the right factor of a product; `outputs first` the same
kernel as `nn.outputs_first` lays it out for decoding, the left factor on a CPU. All are measured in
turn.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from harness import Compiled, Row, Timed, run_in_turn, table, write_json

import equinox_mtp as emtp

# Inputs and outputs of a matrix, and how many of them: more than fit into the caches.
SIZES = {"cpu": (576, 1536, 60), "tiny": (8, 16, 2)}
ROWS = (1, 2, 4, 8, 16, 32, 64)


def products(x: jax.Array, linears: list[emtp.nn.Linear]) -> list[jax.Array]:
    """Of each matrix, with another `x`."""
    return [linear(x + index) for index, linear in enumerate(linears)]


def measure(name: str, rounds: int) -> list[Row]:
    """Each number of rows, in both layouts."""
    inputs, outputs, count = SIZES[name]
    keys = jax.random.split(jax.random.key(0), count)
    linears = [emtp.nn.Linear(inputs, outputs, key=key) for key in keys]
    layouts = {"inputs first": linears, "outputs first": emtp.nn.outputs_first(linears)}
    cases = {
        (num_rows, layout): Timed(Compiled(products, jnp.ones((num_rows, inputs)), kernels))
        for num_rows in ROWS
        for layout, kernels in layouts.items()
    }
    run_in_turn(list(cases.values()), rounds)
    one_row = min(cases[1, layout].seconds for layout in layouts)
    return [
        {
            "rows": num_rows,
            "layout": layout,
            "ms": 1e3 * timed.seconds,
            "gb_per_s": 4e-9 * inputs * outputs * count / timed.seconds,
            "of_one_row": timed.seconds / one_row,
        }
        for (num_rows, layout), timed in cases.items()
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    rows = measure(arguments.sizes, arguments.rounds)
    lines = [
        (
            row["rows"],
            row["layout"],
            f"{row['ms']:.2f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['of_one_row']:.2f}",
        )
        for row in rows
    ]
    print(table(("rows", "layout", "ms", "GB/s", "of one row"), lines))
    write_json(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
