"""Divergences of all depths from the main model: without logits, and with them.

    python tests/benchmarks/divergences.py [--preset cpu|tiny] [--kinds NAME …] [--repeats N]
        [--json FILE]

Value and gradient of the mean divergence, for the hidden states of the depths over a frozen head,
or for these and the head. `library` is `linear_divergence`; `plain` makes the logits of all depths
and of the teacher, and leaves the gradient to JAX. All are measured in turn.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import Compiled, Timed, run_in_turn, table, write_json

import equinox_mtp as emtp


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of a batch, a model and its head."""

    depths: int
    batch: int
    seq: int
    embed: int
    vocab: int


PRESETS = {
    "cpu": Preset(depths=3, batch=4, seq=256, embed=512, vocab=32_000),
    "tiny": Preset(depths=2, batch=1, seq=8, embed=8, vocab=64),
}
KINDS = ("forward_kl", "total_variation", "hybrid")
Arrays = tuple[jax.Array, jax.Array, jax.Array]


def make_arrays(preset: Preset) -> Arrays:
    """Hidden states of depths and teacher, and the head."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = (preset.batch, preset.seq, preset.embed)
    hidden = jax.random.normal(keys[0], (preset.depths, *rows))
    teacher = jax.random.normal(keys[1], rows)
    head = 0.1 * jax.random.normal(keys[2], (preset.vocab, preset.embed))
    return hidden, teacher, head


def library(kind: Any, hidden: jax.Array, teacher: jax.Array, head: jax.Array) -> jax.Array:
    """The mean divergence, a tile of tokens at a time."""
    weights = jnp.ones(hidden.shape[:-1], hidden.dtype)
    found = emtp.linear_divergence(hidden, teacher, head, divergence=kind, weights=weights)
    return jnp.mean(found.divergence)


def plain(kind: str, hidden: jax.Array, teacher: jax.Array, head: jax.Array) -> jax.Array:
    """The mean divergence of full logits."""
    log_q = jax.nn.log_softmax(hidden @ head.T)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher @ head.T))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    kl = jnp.sum(p * (log_p - log_q), axis=-1)
    distance = 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)
    if kind == "hybrid":
        share = jax.lax.stop_gradient(jnp.exp(-3 * (1 - distance)))
        return jnp.mean(share * kl + (1 - share) * distance)
    return jnp.mean(kl if kind == "forward_kl" else distance)


def compiled_cases(preset: Preset, kinds: list[str]) -> dict[tuple[str, str, str], Compiled]:
    """By kind, what has a gradient, and the implementation."""
    arrays, cases = make_arrays(preset), {}
    for kind in kinds:
        for name, of in (("hidden states", (0,)), ("and the head", (0, 2))):
            for function in (library, plain):
                step = jax.value_and_grad(partial(function, kind), argnums=of)
                cases[kind, name, function.__name__] = Compiled(step, *arrays)
    return cases


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    preset = PRESETS[arguments.preset]
    compiled = compiled_cases(preset, arguments.kinds)
    timed = {case: Timed(function) for case, function in compiled.items()}
    run_in_turn(list(timed.values()), arguments.repeats)
    rows: list[dict[str, Any]] = [
        {
            "divergence": kind,
            "gradients": of,
            "what": what,
            "value": float(one.result[0]),
            "seconds": one.seconds,
            "of_plain": one.seconds / timed[kind, of, "plain"].seconds,
            "temp_bytes": compiled[kind, of, what].temp_bytes,
            "temp_of_plain": compiled[kind, of, what].temp_bytes
            / compiled[kind, of, "plain"].temp_bytes,
        }
        for (kind, of, what), one in timed.items()
    ]
    write_json(arguments.json, {"sizes": dataclasses.asdict(preset), "rows": rows})
    columns = ("divergence", "gradients", "what", "s", "of plain", "MiB", "of plain")
    lines = [
        (
            *(row["divergence"], row["gradients"], row["what"]),
            f"{row['seconds']:.3f}",
            f"{row['of_plain']:.2f}",
            f"{row['temp_bytes'] / 2**20:.0f}",
            f"{row['temp_of_plain']:.3f}",
        )
        for row in rows
    ]
    print(table(columns, lines))


if __name__ == "__main__":
    main()
