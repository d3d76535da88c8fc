"""Decoding one token by multi-head latent attention, of the time of keys and values made anew.

    python tests/benchmarks/latent_attention.py [--sizes cpu|tiny] [--json FILE]

`absorbed` is `nn.MultiHeadLatentAttention.decode`, which attends to the cached latents;
`recomputed` projects the keys and values of all cached positions from the same cache, and attends
to those. Both are measured in turn.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from harness import Compiled, Row, Timed, run_in_turn, table, write_json

import equinox_mtp as emtp

# Embed, heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim; length.
SIZES = {
    "cpu": (1024, 16, None, 512, 128, 64, 128, 4096),
    "tiny": (16, 2, 8, 6, 4, 2, 4, 20),
}


def absorbed(attention: Any, x: jax.Array, cache: Any, ids: jax.Array) -> jax.Array:
    """What the library does; the cache that comes back is left, here and below."""
    return attention.decode(x, cache, position_ids=ids)[0]


def recomputed(attention: Any, x: jax.Array, cache: Any, ids: jax.Array) -> jax.Array:
    """With keys and values of all positions."""
    query = jnp.concatenate(attention._query(x, ids), axis=-1)
    cache = cache.write(*attention._latent(x, ids), ids)
    up = attention.up_kernel
    key = jnp.einsum("blr,hdr->blhd", cache.latent, up.key)
    value = jnp.einsum("blr,hdr->blhd", cache.latent, up.value)
    shared = cache.rotary_key[:, :, None]
    shared = jnp.broadcast_to(shared, (*key.shape[:3], shared.shape[-1]))
    key = jnp.concatenate([key, shared], axis=-1)
    logits = jnp.einsum("bshd,blhd->bhsl", query, key) / math.sqrt(query.shape[-1])
    is_seen = jnp.arange(key.shape[1]) <= ids[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(is_seen, logits, -jnp.inf), axis=-1)
    attended = jnp.einsum("bhsl,blhd->bshd", weights, value)
    return attention._project_out(attended)


def measure(name: str, rounds: int) -> list[Row]:
    """Both ways at the last position of a full cache."""
    embed, heads, q_rank, kv_rank, nope, rope, value, length = SIZES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    attention = emtp.nn.MultiHeadLatentAttention(
        embed,
        heads,
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        key=keys[0],
    ).for_decoding(jnp.float32)
    cache = emtp.nn.LatentCache(
        jax.random.normal(keys[1], (1, length, kv_rank)),
        jax.random.normal(keys[2], (1, length, rope)),
    )
    x, ids = jax.random.normal(keys[3], (1, 1, embed)), jnp.asarray([[length - 1]])
    compiled = {f.__name__: Compiled(f, attention, x, cache, ids) for f in (absorbed, recomputed)}
    timed = {name: Timed(function) for name, function in compiled.items()}
    run_in_turn(list(timed.values()), rounds)
    difference = jnp.max(jnp.abs(timed["absorbed"].result - timed["recomputed"].result))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(cache, eqx.is_array)))
    return [
        {
            "sizes": name,
            "length": length,
            "variant": variant,
            "ms": 1000 * timed[variant].seconds,
            "of_recomputed": timed[variant].seconds / timed["recomputed"].seconds,
            "temp_bytes": compiled[variant].temp_bytes,
            "cached_per_token": numbers // length,
            "largest_difference": float(difference),
        }
        for variant in timed
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = measure(arguments.sizes, arguments.rounds)
    write_json(arguments.json, {"rows": rows})
    columns = ("cached tokens", "variant", "ms", "of recomputed", "MiB")
    lines = [
        (
            row["length"],
            row["variant"],
            f"{row['ms']:.2f}",
            f"{row['of_recomputed']:.3f}",
            f"{row['temp_bytes'] / 2**20:.1f}",
        )
        for row in rows
    ]
    print(table(columns, lines))
    print(f"\nThe outputs differ by at most {rows[0]['largest_difference']:.1e}.")


if __name__ == "__main__":
    main()
