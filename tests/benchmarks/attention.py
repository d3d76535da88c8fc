"""Value and gradient of causal attention, of the time and memory of `jax.nn`'s.

    python tests/benchmarks/attention.py [--sizes cpu|long|tiny] [--json FILE]

`xla` is `jax.nn.dot_product_attention(implementation="xla")`, which makes the square of logits;
`library` is `nn.causal_attention` as it chooses; `packed` the same with four documents a row, which
`xla` would take a mask for. All are measured in turn.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import Compiled, Row, Timed, run_in_turn, table, write_json

import equinox_mtp as emtp

# batch, seq, heads, head_dim
SIZES = {
    "cpu": [(4, 512, 8, 64), (1, 2048, 8, 64)],
    "long": [(1, 8192, 8, 64)],
    "tiny": [(1, 160, 2, 8)],
}


def xla(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """With all logits in memory."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")


def library(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Rows of one document."""
    ids = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])
    return emtp.nn.causal_attention(query, key, value, position_ids=ids)


def packed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Rows of four documents."""
    seq = query.shape[1]
    ids = jnp.broadcast_to(jnp.arange(seq), query.shape[:2])
    segment_ids = 1 + 4 * ids // seq
    return emtp.nn.causal_attention(query, key, value, position_ids=ids, segment_ids=segment_ids)


def value_and_gradient(attention: Any) -> Any:
    """Of half the squared sum of what is attended."""

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(attention(query, key, value)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def measure(sizes: tuple[int, int, int, int], rounds: int) -> list[Row]:
    """All rows of one size."""
    rows = [jax.random.normal(jax.random.key(i), sizes) for i in range(3)]
    compiled = {f.__name__: Compiled(value_and_gradient(f), *rows) for f in (xla, library, packed)}
    timed = {name: Timed(function) for name, function in compiled.items()}
    run_in_turn(list(timed.values()), rounds)
    (_, wanted), (_, found) = (timed[name].result for name in ("xla", "library"))
    error = max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(wanted, found, strict=True))
    return [
        {
            "sizes": sizes,
            "variant": name,
            "seconds": timed[name].seconds,
            "of_xla": timed[name].seconds / timed["xla"].seconds,
            "temp_bytes": compiled[name].temp_bytes,
            "compile_s": compiled[name].compile_s,
            "largest_difference": error,
        }
        for name in timed
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["cpu"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows: list[Row] = []
    for sizes in (one for name in arguments.sizes for one in SIZES[name]):
        rows += measure(sizes, arguments.rounds)
        write_json(arguments.json, {"rows": rows})
    columns = ("batch, seq, heads, head_dim", "variant", "compile (s)", "s", "of xla", "MiB")
    lines = [
        (
            ", ".join(map(str, row["sizes"])),
            row["variant"],
            f"{row['compile_s']:.1f}",
            f"{row['seconds']:.3f}",
            f"{row['of_xla']:.2f}",
            f"{row['temp_bytes'] / 2**20:.0f}",
        )
        for row in rows
    ]
    print(table(columns, lines))
    worst = max(row["largest_difference"] for row in rows)
    print(f"\nGradients of `library` and `xla` differ by at most {worst:.1e}.")


if __name__ == "__main__":
    main()
