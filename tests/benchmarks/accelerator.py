"""How the library does on an accelerator: exactness, and each part's share of its speed.

    python tests/benchmarks/accelerator.py [--minutes 8] [--sizes full|tiny] [--only STAGE …]
        [--json FILE] [--markdown FILE]

The stages run in the order of `STAGES`, until the minutes are used up. Both files are written anew
after every measurement, so that a run which is cut off leaves what it has measured. A part that
fails, for want of memory for instance, is a row that says so.

Times are medians. `share` is the time of the necessary matrix products at the rate that a large
product of bfloat16 reaches on the same machine, over the time taken; when decoding, the time to
read the parameters once at the rate of a large copy, over the time of a step. Products that are
computed twice, and half of causal attention, are not necessary.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import mtp_step
import numpy as np
from harness import Compiled, Row, table, write, write_json

import equinox_mtp as emtp
from equinox_mtp.speculative import generate


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured."""

    product: int
    copy_bytes: int
    shapes: tuple[mtp_step.Shape, ...]
    step_depths: tuple[tuple[int, ...], ...]
    tiles: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int, int, int], ...]
    decoder: emtp.nn.TransformerConfig
    new_tokens: int
    repeats: int


FULL = Sizes(
    product=8192,
    copy_bytes=2**31,
    shapes=(
        mtp_step.Shape(8, 2048, 2048, 5632, 16, 129_280, "bfloat16"),
        mtp_step.Shape(4, 1024, 7168, 18_432, 56, 129_280, "bfloat16"),
    ),
    step_depths=((1, 4), (1,)),
    tiles=(
        (1024, 8192),
        (4096, 2048),
        (4096, 8192),
        (4096, 32_768),
        (8192, 8192),
        (16_384, 8192),
        (16_384, 2048),
    ),
    # batch, seq, heads, head_dim
    attention=((8, 2048, 16, 128), (1, 8192, 16, 128), (1, 32_768, 16, 128)),
    decoder=emtp.nn.TransformerConfig(
        vocab_size=128_256,
        embed_size=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        mlp_size=8192,
        dtype="bfloat16",
    ),
    new_tokens=256,
    repeats=5,
)
TINY = Sizes(
    product=64,
    copy_bytes=2**16,
    shapes=(mtp_step.Shape(2, 32, 32, 64, 2, 300, "float32"),),
    step_depths=((1, 2),),
    tiles=((16, 64), (64, 300)),
    attention=((1, 32, 2, 16),),
    decoder=emtp.nn.TransformerConfig(
        vocab_size=300, embed_size=32, num_layers=2, num_heads=2, mlp_size=64
    ),
    new_tokens=8,
    repeats=1,
)
SIZES = {"full": FULL, "tiny": TINY}


@dataclasses.dataclass
class Machine:
    """What the machine reaches: products of bfloat16, in FLOP/s, and copies, in bytes/s."""

    flops: float = 0.0
    bandwidth: float = 0.0


def random(seed: int, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Normal numbers."""
    return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def measure_machine(sizes: Sizes, machine: Machine) -> Iterator[Row]:
    """The rates that shares are of."""
    n = sizes.product
    x, y = random(0, (n, n), jnp.bfloat16), random(1, (n, n), jnp.bfloat16)
    machine.flops = 2 * n**3 / Compiled(jnp.matmul, x, y).seconds(sizes.repeats)
    yield {"what": f"product of bfloat16, {n}³", "tflops": machine.flops / 1e12}
    z = random(2, (sizes.copy_bytes // 4,), jnp.float32)
    machine.bandwidth = 2 * sizes.copy_bytes / Compiled(lambda z: z + 1, z).seconds(sizes.repeats)
    yield {"what": "copy, read and written", "gb_per_s": machine.bandwidth / 1e9}


def relative_error(actual: Any, exact: np.ndarray) -> float:
    """‖actual - exact‖ / ‖exact‖."""
    difference = np.linalg.norm(np.asarray(actual, np.float64) - exact)
    return float(difference / np.linalg.norm(exact))


def exact_loss(hidden: np.ndarray, head: np.ndarray, ids: np.ndarray) -> list[np.ndarray]:
    """The summed cross-entropy and its gradients, in float64."""
    logits = np.einsum("bse,ve->bsv", hidden, head)
    logits -= logits.max(-1, keepdims=True)
    softmax = np.exp(logits)
    total = softmax.sum(-1, keepdims=True)
    softmax /= total
    target = np.take_along_axis(logits, ids[..., None], -1)
    loss = np.sum(np.log(total) - target)
    np.put_along_axis(
        softmax, ids[..., None], np.take_along_axis(softmax, ids[..., None], -1) - 1, -1
    )
    return [loss, softmax @ head, np.einsum("bsv,bse->ve", softmax, hidden)]


def exact_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> list[np.ndarray]:
    """Causal attention's values, and the gradients of half their squared sum, in float64."""
    scale = query.shape[-1] ** -0.5
    logits = scale * np.einsum("bqhd,bkhd->bhqk", query, key)
    logits = np.where(np.tri(logits.shape[-1], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, value)
    dweights = np.einsum("bqhd,bkhd->bhqk", out, value)
    dlogits = scale * weights * (dweights - np.sum(weights * dweights, -1, keepdims=True))
    return [
        out,
        np.einsum("bhqk,bkhd->bqhd", dlogits, key),
        np.einsum("bhqk,bqhd->bkhd", dlogits, query),
        np.einsum("bhqk,bqhd->bkhd", weights, out),
    ]


def summed_loss(hidden: jax.Array, head: Any, ids: jax.Array) -> jax.Array:
    """The library's loss of all tokens."""
    weights = jnp.ones(ids.shape, jnp.float32)
    return emtp.summed_linear_cross_entropy(hidden, head, ids, weights, predictions=False).loss


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    implementation: Any = None,
    documents: int = 1,
) -> jax.Array:
    """The library's attention, over rows of as many documents."""
    seq = query.shape[1]
    position_ids = jnp.broadcast_to(jnp.arange(seq), query.shape[:2])
    return emtp.nn.causal_attention(
        query,
        key,
        value,
        position_ids=position_ids,
        segment_ids=None if documents == 1 else 1 + documents * position_ids // seq,
        implementation=implementation,
    )


def half_square(attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Half the squared sum of what an attention gives, whose gradient by that is itself."""
    return lambda *arrays: 0.5 * jnp.sum(jnp.square(attention(*arrays).astype(jnp.float32)))


def check_exactness(sizes: Sizes, machine: Machine) -> Iterator[Row]:
    """Loss, attention and their gradients against float64; decoding against the CPU."""
    del machine
    ids = np.random.default_rng(0).integers(0, 4000, (2, 192))
    for dtype, precision in (
        ("float32", "highest"),
        ("float32", "default"),
        ("bfloat16", "default"),
    ):
        hidden, head = random(3, (2, 192, 256), dtype), random(4, (4000, 256), dtype, 1 / 16)
        qkv = [random(seed, (2, 256, 4, 64), dtype) for seed in (5, 6, 7)]
        with jax.default_matmul_precision(precision):
            value_and_grad: Any = jax.jit(jax.value_and_grad(summed_loss, (0, 1)))
            loss, gradients = value_and_grad(hidden, head, ids)
            attended = jax.jit(attend)(*qkv)
            gradients_of_attention = jax.jit(jax.grad(half_square(attend), (0, 1, 2)))(*qkv)
        exact = exact_loss(np.asarray(hidden, np.float64), np.asarray(head, np.float64), ids)
        errors = [relative_error(x, y) for x, y in zip((loss, *gradients), exact, strict=True)]
        label = f"{dtype}, precision {precision}"
        yield {"what": f"loss: {label}", "error": errors[0], "gradient_error": max(errors[1:])}
        exact = exact_attention(*(np.asarray(x, np.float64) for x in qkv))
        actual = (attended, *gradients_of_attention)
        errors = [relative_error(x, y) for x, y in zip(actual, exact, strict=True)]
        yield {"what": f"attention: {label}", "error": errors[0], "gradient_error": max(errors[1:])}
    yield from check_decoding(sizes)


def check_decoding(sizes: Sizes) -> Iterator[Row]:
    """Greedy tokens of a small model, with and without drafts, against the CPU's plain ones."""
    config = emtp.nn.TransformerConfig(vocab_size=512, embed_size=64, num_layers=2, num_heads=4)
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        model = make_model(config, num_depths=2)
        prompts = np.random.default_rng(1).integers(0, 512, (4, 8))
        continued = functools.partial(generate, max_new_tokens=sizes.new_tokens)
        on_cpu = np.asarray(continued(model, prompts, num_drafts=0).tokens)
    arrays, static = eqx.partition(model, eqx.is_array)
    model = eqx.combine(jax.device_put(arrays, jax.devices()[0]), static)
    for drafts in (0, 2):
        with jax.default_matmul_precision("highest"):
            tokens = np.asarray(continued(model, prompts, num_drafts=drafts).tokens)
        equal = float(np.mean(np.all(tokens == on_cpu, axis=1)))
        yield {"what": f"decoding: float32, {drafts} drafts", "rows_equal_to_cpu": equal}


def make_model(config: emtp.nn.TransformerConfig, num_depths: int) -> emtp.MTPModel:
    """A model of random parameters."""

    @eqx.filter_jit
    def make() -> emtp.MTPModel:
        keys = jax.random.split(jax.random.key(0))
        decoder = emtp.nn.TransformerDecoder(config, key=keys[0])
        make_layer = functools.partial(emtp.nn.TransformerDecoderLayer, config)
        mtp_config = emtp.MTPConfig.preset("deepseek_v3", num_depths)
        return emtp.MTPModel(
            decoder,
            emtp.MultiTokenPredictionBlock(
                mtp_config, make_layer, embed_size=config.embed_size, key=keys[1]
            ),
        )

    return make()


def measured(
    row: Row, compiled: Callable[[], Compiled], sizes: Sizes, flops: float, machine: Machine
) -> Row:
    """A row with the time, the memory and the share of a compiled function, or why it has none."""
    try:
        function = compiled()
        row |= {"compile_s": function.compile_s, "temp_gib": function.temp_bytes / 2**30}
        row["ms"] = 1e3 * (seconds := function.seconds(sizes.repeats))
        row["share"] = flops / seconds / machine.flops
    except Exception as error:
        row["failed"] = " ".join(str(error).split())[:120]
    return row


def loss_case(shape: mtp_step.Shape) -> tuple[jax.Array, jax.Array, jax.Array, float]:
    """Hidden states, head and ids, and the FLOPs of the three products."""
    tokens = (shape.batch, shape.seq)
    hidden = random(8, (*tokens, shape.embed), shape.dtype)
    head = random(9, (shape.vocab, shape.embed), jnp.float32, shape.embed**-0.5)
    ids = jax.random.randint(jax.random.key(10), tokens, 0, shape.vocab)
    return hidden, head, ids, 6.0 * hidden.size * shape.vocab


def naive_loss(hidden: jax.Array, head: jax.Array, ids: jax.Array) -> jax.Array:
    """The loss with all logits in memory."""
    logits = jnp.einsum(
        "bse,ve->bsv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.take_along_axis(log_probabilities, ids[..., None], axis=-1))


def compile_loss(
    make_head: Callable[[jax.Array], Any], hidden: jax.Array, head: jax.Array, ids: jax.Array
) -> Compiled:
    """Value and gradient of a loss."""

    def loss(arrays: tuple[jax.Array, jax.Array], ids: jax.Array) -> jax.Array:
        return summed_loss(arrays[0], make_head(arrays[1]), ids)

    return Compiled(eqx.filter_value_and_grad(loss), (hidden, head), ids)


def measure_loss(sizes: Sizes, machine: Machine) -> Iterator[Row]:
    """Value and gradient of the loss alone."""
    for shape in sizes.shapes:
        hidden, head, ids, flops = loss_case(shape)
        label = f"{ids.size:,} tokens x {shape.embed} x {shape.vocab:,}"
        recompute = functools.partial(emtp.LinearHead, recompute_logits=True)
        naive: Any = eqx.filter_value_and_grad(lambda xs, ids: naive_loss(xs[0], xs[1], ids))
        for variant, compiled in (
            ("library", functools.partial(compile_loss, emtp.LinearHead, hidden, head, ids)),
            ("recompute_logits", functools.partial(compile_loss, recompute, hidden, head, ids)),
            ("all logits", functools.partial(Compiled, naive, (hidden, head), ids)),
        ):
            row = {"what": f"{label}: {variant}"}
            yield measured(row, compiled, sizes, flops, machine)


def measure_tiles(sizes: Sizes, machine: Machine) -> Iterator[Row]:
    """The loss with tiles of other sizes."""
    for shape in sizes.shapes:
        hidden, head, ids, flops = loss_case(shape)
        for token_tile, vocab_tile in sizes.tiles:
            if token_tile > ids.size:
                continue
            make = functools.partial(emtp.LinearHead, token_tile=token_tile, vocab_tile=vocab_tile)
            compiled = functools.partial(compile_loss, make, hidden, head, ids)
            row = {"what": f"{shape.embed} features, tile {token_tile} tokens x {vocab_tile} ids"}
            yield measured(row, compiled, sizes, flops, machine)


def measure_attention(sizes: Sizes, machine: Machine) -> Iterator[Row]:
    """Gradients of causal attention: as the library chooses, by tiles, and of packed rows."""
    variants = {
        "library": attend,
        "tiled": functools.partial(attend, implementation="tiled"),
        "packed": functools.partial(attend, documents=4),
    }
    for batch, seq, heads, head_dim in sizes.attention:
        qkv = [random(seed, (batch, seq, heads, head_dim), jnp.bfloat16) for seed in (5, 6, 7)]
        flops = 0.5 * 6 * 2 * batch * heads * seq**2 * head_dim
        for variant, attention in variants.items():
            gradient = jax.grad(half_square(attention), (0, 1, 2))
            row = {"what": f"{batch} x {seq} x {heads} x {head_dim}: {variant}"}
            yield measured(row, functools.partial(Compiled, gradient, *qkv), sizes, flops, machine)


def step_flops(shape: mtp_step.Shape, depths: int) -> float:
    """The necessary products of a step: value and gradient of all depths."""
    tokens, embed = shape.batch * shape.seq, shape.embed
    kernels = 2 * embed**2 + 4 * embed**2 + 3 * embed * shape.mlp + embed * shape.vocab
    attention = 0.5 * 2 * shape.seq * embed
    return depths * 6.0 * tokens * (kernels + attention)


def measure_step(sizes: Sizes, machine: Machine) -> Iterator[Row]:
    """The step of `mtp_step.py`."""
    for shape, all_depths in zip(sizes.shapes, sizes.step_depths, strict=True):
        for depths in all_depths:
            for variant in ("fused", "naive"):
                loss, case = mtp_step.VARIANTS[variant](shape, depths)
                gradient = eqx.filter_value_and_grad(loss)
                row = {"what": f"{shape.embed} features, D = {depths}: {variant}"}
                compiled = functools.partial(Compiled, gradient, *case)
                yield measured(row, compiled, sizes, step_flops(shape, depths), machine)
                del case


def measure_decoding(sizes: Sizes, machine: Machine) -> Iterator[Row]:
    """A step of greedy decoding, one row."""
    model = make_model(sizes.decoder, num_depths=1)
    parameters = sum(x.size for x in jax.tree.leaves(eqx.filter(model.decoder, eqx.is_array)))
    seconds_to_read = 2 * parameters / machine.bandwidth
    prompts = jnp.arange(128)[None] % sizes.decoder.vocab_size
    for drafts in (0, 1, 3):
        row: Row = {"what": f"{parameters / 1e9:.2f} G parameters, {drafts} drafts"}
        try:

            def run(drafts: int = drafts, new: int = sizes.new_tokens) -> Any:
                out = generate(model, prompts, max_new_tokens=new, num_drafts=drafts)
                return jax.block_until_ready(out)

            def timed(function: Callable[[], Any]) -> tuple[float, Any]:
                started = time.perf_counter()
                out = function()
                return time.perf_counter() - started, out

            row["compile_s"], _ = timed(run)
            whole, generation = min((timed(run) for _ in range(2)), key=lambda pair: pair[0])
            steps = int(generation.num_steps[0])
            row |= {"ms": 1e3 * whole / steps, "share": seconds_to_read / (whole / steps)}
            row["tokens_per_s"] = int(generation.num_generated[0]) / whole
        except Exception as error:
            row["failed"] = " ".join(str(error).split())[:120]
        yield row


Stage = Callable[[Sizes, Machine], Iterator[Row]]
STAGES: dict[str, Stage] = {
    "machine": measure_machine,
    "exactness": check_exactness,
    "loss": measure_loss,
    "step": measure_step,
    "decoding": measure_decoding,
    "attention": measure_attention,
    "tiles": measure_tiles,
}
COLUMNS = {
    "tflops": ("TFLOP/s", "{:.0f}"),
    "gb_per_s": ("GB/s", "{:.0f}"),
    "error": ("error", "{:.1e}"),
    "gradient_error": ("gradient's error", "{:.1e}"),
    "rows_equal_to_cpu": ("rows equal to the CPU's", "{:.2f}"),
    "compile_s": ("compile (s)", "{:.1f}"),
    "ms": ("ms", "{:.2f}"),
    "share": ("share", "{:.2f}"),
    "temp_gib": ("temporaries (GiB)", "{:.2f}"),
    "tokens_per_s": ("tokens/s", "{:.0f}"),
    "failed": ("failed", "{}"),
}


def markdown(device: str, rows: Iterable[Row]) -> str:
    """One table a stage, with the columns that it has."""
    by_stage: dict[str, list[Row]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], []).append(row)
    lines = [f"{device}, JAX {jax.__version__}"]
    for stage, of_stage in by_stage.items():
        columns = [name for name in COLUMNS if any(name in row for row in of_stage)]
        cells = [
            (row["what"], *(COLUMNS[c][1].format(row[c]) if c in row else "" for c in columns))
            for row in of_stage
        ]
        lines += ["", table((stage, *(COLUMNS[name][0] for name in columns)), cells)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the stages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    device, machine, rows = jax.devices()[0].device_kind, Machine(), []
    started = time.monotonic()
    for name, stage in STAGES.items():
        if name != "machine" and name not in arguments.only:
            continue
        for row in stage(SIZES[arguments.sizes], machine):
            rows.append({"stage": name, **row})
            seconds = time.monotonic() - started
            print(f"{seconds:6.1f} s {name}: {row}", file=sys.stderr, flush=True)
            write_json(arguments.json, {"rows": rows})
            if arguments.markdown is not None:
                write(arguments.markdown, markdown(device, rows))
            if time.monotonic() > deadline:
                print("The minutes are used up.", file=sys.stderr)
                break
        else:
            continue
        break
    print(markdown(device, rows))


if __name__ == "__main__":
    main()
