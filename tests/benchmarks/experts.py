"""A mixture of experts: its time, and that of its matrix products alone.

    python tests/benchmarks/experts.py [--preset cpu|tiny] [--rounds N] [--json FILE]

`products` are those that the rows of all tokens' experts take: equal groups of rows, each with its
expert's matrices, as XLA multiplies batches. The mixture has groups of unlike sizes, and routes,
sorts, sums and weighs beside it. `one matrix` are as many products with one matrix of each kind for
all rows: as large as products can be, and hardly any matrices to read. `gradient` is that of half
the squared sum, for tokens and weights, against three times as many products. All are measured in
turn.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from harness import Compiled, Timed, run_in_turn, table, write_json

from equinox_mtp import nn


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of a layer, and how many tokens pass it."""

    tokens: int
    embed: int
    expert_mlp: int
    experts: int
    top_k: int


PRESETS = {
    "cpu": Preset(tokens=1024, embed=256, expert_mlp=256, experts=64, top_k=8),
    "tiny": Preset(tokens=16, embed=8, expert_mlp=12, experts=4, top_k=2),
}


def make_mixture(preset: Preset) -> nn.MixtureOfExperts:
    """Experts without a shared one."""
    keys = jax.random.split(jax.random.key(0))
    return nn.MixtureOfExperts(
        nn.Router(preset.embed, preset.experts, top_k=preset.top_k, key=keys[0]),
        nn.Experts(preset.experts, preset.embed, preset.expert_mlp, key=keys[1]),
    )


def forward(mixture: nn.MixtureOfExperts, x: jax.Array) -> jax.Array:
    """The output, without statistics."""
    return mixture(x)[0]


def gradient(mixture: nn.MixtureOfExperts, x: jax.Array) -> Any:
    """Of half the squared sum."""

    def loss(arguments: tuple[nn.MixtureOfExperts, jax.Array]) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(forward(*arguments)))

    return eqx.filter_grad(loss)((mixture, x))


def forward_products(gate: jax.Array, up: jax.Array, down: jax.Array, *arrays: jax.Array) -> Any:
    """Three for each row; all arrays have an axis of groups first, or none has."""
    rows, inner = arrays
    return rows @ gate, rows @ up, inner @ down


def gradient_products(gate: jax.Array, up: jax.Array, down: jax.Array, *arrays: jax.Array) -> Any:
    """Six more: of rows, and of matrices."""
    rows, inner = arrays
    of_rows = inner @ gate.mT, inner @ up.mT, rows @ down.mT
    # Other rows for each: equal products would be one.
    of_matrices = rows.mT @ inner, (2 * rows).mT @ inner, inner.mT @ rows
    return forward_products(gate, up, down, *arrays), of_rows, of_matrices


def compiled_cases(preset: Preset) -> dict[tuple[str, str], Compiled]:
    """By the pass, and what of it."""
    mixture, keys = make_mixture(preset), jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (1, preset.tokens, preset.embed))
    num_rows = preset.tokens * preset.top_k
    rows = jax.random.normal(keys[1], (num_rows, preset.embed))
    inner = jax.random.normal(keys[2], (num_rows, preset.expert_mlp))
    experts = mixture.experts
    matrices = experts.gate, experts.up, experts.down
    of_one = tuple(x[0] for x in matrices)
    in_groups = tuple(x.reshape(preset.experts, -1, x.shape[-1]) for x in (rows, inner))
    passes: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "forward": (forward, forward_products),
        "gradient": (gradient, gradient_products),
    }
    cases = {}
    for name, (of_mixture, products) in passes.items():
        cases[name, "mixture"] = Compiled(of_mixture, mixture, x)
        cases[name, "products"] = Compiled(products, *matrices, *in_groups)
        cases[name, "one matrix"] = Compiled(products, *of_one, rows, inner)
    return cases


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    preset = PRESETS[arguments.preset]
    compiled = compiled_cases(preset)
    timed = {case: Timed(function) for case, function in compiled.items()}
    run_in_turn(list(timed.values()), arguments.rounds)
    rows = [
        {
            "pass": name,
            "what": what,
            "seconds": one.seconds,
            "least_seconds": min(one.times),
            "of_products": one.seconds / timed[name, "products"].seconds,
            "least_of_products": min(one.times) / min(timed[name, "products"].times),
            "temp_bytes": compiled[name, what].temp_bytes,
        }
        for (name, what), one in timed.items()
    ]
    write_json(arguments.json, {"sizes": dataclasses.asdict(preset), "rows": rows})
    lines = []
    for r in rows:
        times = f"{1e3 * r['seconds']:.2f}", f"{1e3 * r['least_seconds']:.2f}"
        ratios = f"{r['of_products']:.2f}", f"{r['least_of_products']:.2f}"
        lines.append((r["pass"], r["what"], *times, *ratios, f"{r['temp_bytes'] / 2**20:.1f}"))
    columns = ("pass", "what", "ms", "least ms", "of products", "least of least", "MiB")
    print(table(columns, lines))


if __name__ == "__main__":
    main()
