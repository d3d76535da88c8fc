"""Compile time, step time and memory of the MTP block against a naive one.

    python tests/benchmarks/mtp_step.py [--preset cpu|gpu] [--against MODULE:FUNCTION] [--json FILE]

A step is the value and the gradient of the MTP loss: with respect to the block, the decoder's
embedding (which is its output head too) and the main hidden states. `naive` unrolls the depths,
makes all logits of attention and head, and takes optax's cross-entropy; `fused` is the library;
`recompute` is the library with the loss that computes its logits again in the backward pass. All
are measured in one run, in turn, so that what else the machine does meets them alike.

`matmul_fraction` is the time of the necessary matrix products alone (those of layers and head,
forward and backward, each timed by itself in the same run; half of the attention's, which is
causal), over the time of the step.

`--against` measures another implementation in the same run. The function takes a `Shape` and a
number of depths, and returns a loss and its arguments: `(loss, arguments)`. Value and gradient with
respect to the first argument are measured.
"""

import argparse
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from harness import Compiled, Row, Timed, run_in_turn, table, write_json

import equinox_mtp as emtp


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one benchmark."""

    batch: int
    seq: int
    embed: int
    mlp: int
    heads: int
    vocab: int
    dtype: str


PRESETS = {
    "cpu": [Shape(4, 512, 512, 1408, 8, 32_000, "float32")],
    "gpu": [
        Shape(4, 1024, 7168, 18_432, 56, 129_280, "bfloat16"),
        Shape(8, 2048, 2048, 5632, 16, 129_280, "bfloat16"),
    ],
    "tiny": [Shape(2, 32, 32, 64, 2, 300, "float32")],
}

Parameters = tuple[emtp.AbstractDecoder, emtp.MultiTokenPredictionBlock, jax.Array]


@eqx.filter_jit
def make_case(
    shape: Shape, num_depths: int, attention: Any = emtp.nn.causal_attention
) -> tuple[Parameters, emtp.MTPTargets]:
    """What a step is given: parameters and hidden states, and targets."""
    config = emtp.nn.TransformerConfig(
        vocab_size=shape.vocab,
        embed_size=shape.embed,
        num_layers=1,
        num_heads=shape.heads,
        mlp_size=shape.mlp,
        dtype=shape.dtype,
        attention=attention,
    )
    keys = jax.random.split(jax.random.key(0), 4)
    decoder = emtp.nn.TransformerDecoder(config, key=keys[0])
    block = emtp.MultiTokenPredictionBlock(
        emtp.MTPConfig(num_depths),
        functools.partial(emtp.nn.TransformerDecoderLayer, config),
        embed_size=shape.embed,
        key=keys[1],
    )
    tokens = jax.random.randint(keys[2], (shape.batch, shape.seq + 1), 0, shape.vocab)
    size = (shape.batch, shape.seq, shape.embed)
    hidden_states = jax.random.normal(keys[3], size, shape.dtype)
    targets = emtp.align_targets(*emtp.inputs_and_targets(tokens), num_depths=num_depths)
    return (decoder, block, hidden_states), targets


def fused_loss(parameters: Parameters, targets: emtp.MTPTargets) -> jax.Array:
    """The library's loss."""
    decoder, block, hidden_states = parameters
    output = block(decoder, hidden_states, targets, predictions=False)
    return emtp.calculate_mtp_loss(output.losses)


def matrix_head(decoder: emtp.AbstractDecoder) -> jax.Array:
    """The output head of a reference decoder, which is a matrix."""
    head = decoder.output_head()
    assert isinstance(head, jax.Array)
    return head


class RecomputingDecoder(emtp.AbstractDecoder):
    """A decoder whose head has its logits computed again in the backward pass."""

    decoder: emtp.AbstractDecoder

    def embed(self, input_ids: jax.Array, position_ids: jax.Array) -> jax.Array:
        return self.decoder.embed(input_ids, position_ids)

    def __call__(self, input_ids: jax.Array, **arguments: Any) -> Any:
        return self.decoder(input_ids, **arguments)

    def final_norm(self, hidden_states: jax.Array) -> jax.Array:
        return self.decoder.final_norm(hidden_states)

    def output_head(self) -> emtp.LinearHead:
        return emtp.LinearHead(matrix_head(self.decoder), recompute_logits=True)


def recompute_loss(parameters: Parameters, targets: emtp.MTPTargets) -> jax.Array:
    """The library's loss, with the logits computed again in the backward pass."""
    decoder, block, hidden_states = parameters
    return fused_loss((RecomputingDecoder(decoder), block, hidden_states), targets)


def attention_of_all_pairs(
    query: jax.Array, key: jax.Array, value: jax.Array, **context: Any
) -> jax.Array:
    """JAX's own attention."""
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, scale=context["scale"], implementation="xla"
    )


def naive_loss(parameters: Parameters, targets: emtp.MTPTargets) -> jax.Array:
    """What one would write first: a loop, full logits, and optax's cross-entropy."""
    decoder, block, hidden_states = parameters
    position_ids = jnp.broadcast_to(jnp.arange(hidden_states.shape[1]), hidden_states.shape[:2])
    total = jnp.zeros(())
    for k in range(block.config.num_depths):
        embedding = decoder.embed(targets.input_ids[k], targets.position_ids[k])
        layer = block.layer(k + 1)
        hidden_states, _ = layer(hidden_states, embedding, position_ids=position_ids)
        normed = decoder.final_norm(hidden_states)
        logits = jnp.einsum(
            "bse,ve->bsv",
            normed,
            matrix_head(decoder).astype(normed.dtype),
            preferred_element_type=jnp.float32,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets.target_ids[k])
        total += jnp.sum(losses * targets.mask[k])
    return 0.1 * total / jnp.sum(targets.mask)


Variant = Callable[[Shape, int], tuple[Callable[..., jax.Array], tuple[Any, ...]]]
"""From sizes and a number of depths to a loss and its arguments."""
VARIANTS: dict[str, Variant] = {
    "fused": lambda shape, depths: (fused_loss, make_case(shape, depths)),
    "recompute": lambda shape, depths: (recompute_loss, make_case(shape, depths)),
    "naive": lambda shape, depths: (naive_loss, make_case(shape, depths, attention_of_all_pairs)),
}


class Step(Timed):
    """One variant at one number of depths, compiled."""

    def __init__(self, name: str, variant: Variant, shape: Shape, depths: int):
        loss, arguments = variant(shape, depths)
        self.name, self.depths = name, depths
        self.compiled = Compiled(eqx.filter_value_and_grad(loss), *arguments)
        self.relative_error = 0.0
        self.device_peak_bytes: int | None = None
        super().__init__(self.compiled)


class Product(Timed):
    """A plain matrix product, the number of times that one depth needs it."""

    def __init__(self, equation: str, x: tuple[int, ...], y: tuple[int, ...], times: float, dtype):
        keys = jax.random.split(jax.random.key(0))
        arrays = jax.random.normal(keys[0], x, dtype), jax.random.normal(keys[1], y, dtype)
        product, repeats = jax.jit(functools.partial(jnp.einsum, equation)), 3
        super().__init__(lambda: [product(*arrays) for _ in range(repeats)], repeats)
        self.times_needed = times


def necessary_products(shape: Shape) -> list[Product]:
    """All matrix products of one depth, forward and backward, and of its head."""
    tokens, embed, mlp = shape.batch * shape.seq, shape.embed, shape.mlp
    products = []

    def linear(size_in: int, size_out: int, count: int = 1) -> None:
        forward, backward = (tokens, size_in), (tokens, size_out)
        kernel = (size_in, size_out)
        for equation, x, y in (
            ("ti,io->to", forward, kernel),
            ("to,io->ti", backward, kernel),
            ("ti,to->io", forward, backward),
        ):
            products.append(Product(equation, x, y, count, shape.dtype))

    linear(2 * embed, embed)
    linear(embed, embed, count=4)
    linear(embed, mlp, count=2)
    linear(mlp, embed)
    linear(embed, shape.vocab)
    features = (shape.batch, shape.heads, shape.seq, embed // shape.heads)
    scores = (shape.batch, shape.heads, shape.seq, shape.seq)
    # Two products forward, four backward, of which a causal mask needs half.
    products.append(Product("bhqd,bhkd->bhqk", features, features, 0.5 * 3, shape.dtype))
    products.append(Product("bhqk,bhkd->bhqd", scores, features, 0.5 * 3, shape.dtype))
    return products


def check(steps: list[Step]) -> None:
    """Loss and gradients of every variant against the naive one's, whose parameters they share."""
    (naive,) = (step for step in steps if step.name == "naive")
    for step in steps:
        if step.name not in VARIANTS:
            continue
        leaves = zip(jax.tree.leaves(step.result), jax.tree.leaves(naive.result), strict=True)
        step.relative_error = max(
            float(jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(y)), 1e-30))
            for x, y in leaves
        )


def find_device_peaks(steps: list[Step]) -> None:
    """The most memory in use, which a device only tells of a whole process: so the small first."""
    device = jax.devices()[0]
    for step in sorted(steps, key=lambda step: step.compiled.temp_bytes):
        step.run()
        step.times.clear()
        step.device_peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")


def measure(
    shape: Shape, variants: dict[str, Variant], all_depths: list[int], repeats: int
) -> list[Row]:
    """All rows of one shape."""
    steps: list[Step] = []
    for depths in all_depths:
        of_depth = [Step(name, variant, shape, depths) for name, variant in variants.items()]
        check(of_depth)
        steps += of_depth
        print(f"compiled {depths} depth(s)", file=sys.stderr)
    find_device_peaks(steps)
    products = necessary_products(shape)
    run_in_turn([*products, *steps], repeats)
    matmul_s = sum(product.times_needed * product.seconds for product in products)
    return [
        {
            "shape": dataclasses.asdict(shape),
            "variant": step.name,
            "depths": step.depths,
            "compile_s": step.compiled.compile_s,
            "step_s": step.seconds,
            "temp_bytes": step.compiled.temp_bytes,
            "matmul_fraction": step.depths * matmul_s / step.seconds,
            "relative_error": step.relative_error,
            "device_peak_bytes": step.device_peak_bytes,
        }
        for step in steps
    ]


def print_table(rows: list[Row]) -> None:
    """A table for people, and for README."""
    naive = {row["depths"]: row for row in rows if row["variant"] == "naive"}
    print(f"\n{Shape(**rows[0]['shape'])} on {jax.devices()[0].device_kind}\n")
    columns = ("D", "variant", "compile (s)", "step (s)", "of naive", "matmul", "temporaries")
    lines = []
    for row in rows:
        reference = naive[row["depths"]]
        lines.append(
            (
                row["depths"],
                row["variant"],
                f"{row['compile_s']:.1f}",
                f"{row['step_s']:.3f}",
                f"{row['step_s'] / reference['step_s']:.2f}",
                f"{row['matmul_fraction']:.2f}",
                f"{row['temp_bytes'] / 2**20:.0f} MiB",
                f"{row['temp_bytes'] / reference['temp_bytes']:.3f}",
            )
        )
    print(table((*columns, "of naive"), lines))
    worst = max(row["relative_error"] for row in rows)
    print(f"\nLosses and gradients differ from the naive ones by at most {worst:.1e} (relative).")


def variant_at(place: str) -> Variant:
    """`module:function`, imported."""
    module, _, function = place.partition(":")
    if not function:
        raise SystemExit(f"--against must be `module:function`; got {place!r}.")
    return getattr(importlib.import_module(module), function)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", action="append", default=[], metavar="MODULE:FUNCTION")
    arguments = parser.parse_args()
    # Compile times are to be those of a first run.
    jax.config.update("jax_enable_compilation_cache", False)
    variants = VARIANTS | {place: variant_at(place) for place in arguments.against}
    rows: list[Row] = []
    for shape in PRESETS[arguments.preset]:
        of_shape = measure(shape, variants, arguments.depths, arguments.repeats)
        print_table(of_shape)
        rows += of_shape
    write_json(arguments.json, {"preset": arguments.preset, "rows": rows})


if __name__ == "__main__":
    main()
