"""What one training step moves between 8, 64 and 512 devices: weak scaling on paper.

    python tests/benchmarks/scaling.py [--devices 8 64 512] [--divide N] [--json FILE]

Nothing is run: a step (forward, backward, optimizer) is compiled for so many devices, which the
host pretends to have, from the shapes of its arrays alone, and the program is read. The model is
DeepSeek-V3 (arXiv 2412.19437, §4.2) with its prediction depth: latent attention, three layers with
dense feed-forward networks, and in the others 256 experts, of which a token passes 8 and a shared
one. `--divide` makes all sizes but the number of layers smaller. Every device has as many tokens
whatever their number, also those that differ in their experts alone; tokens come together on them
for the experts, and what these add is summed to where it belongs.

Bytes are those that a device receives. In a group of n devices that is (n-1)/n of the result of an
all-gather or an all-to-all, n - 1 times the result of a reduce-scatter, twice (n-1)/n of that of an
all-reduce, and all of that of a collective-permute; what is in a loop counts each time. They are
read from the program as XLA's partitioner leaves it, before a platform's compiler goes on: the
CPU's makes float32 of bfloat16. The partitioner writes a reduce-scatter as an all-reduce of which
each device uses its slice; it is counted as what it is. Compilers for accelerators add gradients of
the same activations up before they all-reduce them, not after as here: of the five of a layer over
`tensor` that leaves two.

Memory is that of the CPU's program, with activations in float32: elsewhere temporaries take less.
Compile times are without LLVM's optimisations.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from deepseek_v3 import Sizes, make_model
from harness import table, write_json
from jax.sharding import Mesh, NamedSharding

import equinox_mtp as emtp
from equinox_mtp.nn import AttentionFunction, causal_attention, causal_attention_by_position
from equinox_mtp.sharding import (
    DEFAULT_RULES,
    constrain_model,
    make_mesh,
    parameter_shardings,
    use_rules,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from hlo import Transfer, transfers

OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
OPTIMIZER = optax.adamw(1e-4)
RULES = DEFAULT_RULES.replace(batch=("data", "fsdp", "expert"))


class Layout(NamedTuple):
    """A mesh, and the length of the rows of which each shard of the batch has one."""

    mesh: dict[str, int]
    seq: int

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.mesh.values())


PRESETS = {
    "cpu": (
        Sizes(),
        [
            Layout({"expert": 8}, 4096),
            Layout({"context": 2, "expert": 4}, 8192),
            Layout({"expert": 64}, 4096),
            Layout({"fsdp": 8, "expert": 8}, 4096),
            Layout({"fsdp": 8, "expert": 64}, 4096),
            Layout({"data": 8, "fsdp": 8, "expert": 8}, 4096),
        ],
    ),
    "tiny": (
        Sizes(64, 1, 2, 4, 48, 32, 16, 8, 16, 96, 40, 16, 3, 4, 2, 320, "float32"),
        [Layout({"data": 8}, 32), Layout({"fsdp": 8}, 32), Layout({"expert": 8}, 32)],
    ),
}


# A step


def attention_on(mesh: Mesh) -> AttentionFunction:
    """By position where rows are split and reordered."""
    is_split = "context" in mesh.axis_names
    return causal_attention_by_position if is_split else causal_attention


def make_batch(rows: int, seq: int) -> dict[str, Any]:
    """The model's arguments: packed rows, already aligned; of zeros, for their shapes."""
    ids = jnp.zeros((rows, seq), jnp.int32)
    names = ("input_ids", "target_ids", "position_ids", "segment_ids")
    targets = emtp.align_targets(ids, ids, num_depths=1, segment_ids=ids, position_ids=ids)
    return {**dict.fromkeys(names, ids), "targets": targets}


def loss_fn(model: emtp.MTPModel, batch: dict[str, Any]) -> jax.Array:
    """The main model's loss and the prediction depth's."""
    output = model(**batch, predictions=False)
    return output.main.mean + emtp.calculate_mtp_loss(output.mtp.losses, scaling_factor=0.3)


def train_step(state: Any, batch: dict[str, Any], mesh: Mesh) -> tuple[Any, jax.Array]:
    """Forward, backward and update of model and optimizer, whose arrays stay where they are."""
    model, optimizer_state = state
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
    params = eqx.filter(model, eqx.is_array)
    updates, optimizer_state = OPTIMIZER.update(grads, optimizer_state, params)
    return constrain_model((eqx.apply_updates(model, updates), optimizer_state), mesh, RULES), loss


# Compiling without arrays


def is_shape(x: Any) -> bool:
    """Whether something stands for an array."""
    return isinstance(x, jax.ShapeDtypeStruct)


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes that know where their arrays would lie."""

    def place(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if is_shape(x) else x

    return jax.tree.map(place, shapes, shardings, is_leaf=lambda x: x is None)


def lower(sizes: Sizes, layout: Layout, mesh: Mesh) -> tuple[Any, int]:
    """A step for a mesh, lowered, and the number of the model's parameters."""
    model = eqx.filter_eval_shape(make_model, sizes, attention_on(mesh))
    params = eqx.filter(model, is_shape)
    state = model, eqx.filter_eval_shape(OPTIMIZER.init, params)
    arrays, static = eqx.partition(placed(state, parameter_shardings(state, mesh, RULES)), is_shape)
    rows = RULES.num_shards("batch", mesh)
    batch = jax.eval_shape(functools.partial(make_batch, rows, layout.seq))
    words = {2: "batch seq", 3: "depth batch seq"}
    batch = placed(
        batch,
        jax.tree.map(lambda x: NamedSharding(mesh, RULES.spec(words[x.ndim], mesh)), batch),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(arrays: Any, batch: dict[str, Any]) -> Any:
        state, loss = train_step(eqx.combine(arrays, static), batch, mesh)
        return eqx.filter(state, eqx.is_array), loss

    with jax.set_mesh(mesh), use_rules(RULES):
        return step.lower(arrays, batch), sum(x.size for x in jax.tree.leaves(params))


def compile_and_read(lowered: Any) -> tuple[Any, str]:
    """The compiled step, and its program as the partitioner left it."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = lowered.compile({"xla_backend_optimization_level": 0, **options})
        (program,) = Path(folder).glob("*after_spmd-partitioning*")
        return compiled, program.read_text()


def cost(transfer: Transfer) -> int:
    """Bytes in all of a step."""
    return transfer.num_bytes * transfer.times


def measure(preset: str, divide: int, devices: int) -> list[dict[str, Any]]:
    """The rows for as many devices as this process has."""
    # Compile times are to be those of a first run.
    jax.config.update("jax_enable_compilation_cache", False)
    sizes, layouts = preset_of(preset, divide)
    rows = []
    for layout in layouts:
        if layout.num_devices == devices:
            rows.append(row_of(sizes, layout, make_mesh(layout.mesh)))
            print(f"compiled for {describe(layout.mesh)}", file=sys.stderr)
    return rows


def row_of(sizes: Sizes, layout: Layout, mesh: Mesh) -> dict[str, Any]:
    """What is said of one mesh."""
    start = time.perf_counter()
    lowered, num_parameters = lower(sizes, layout, mesh)
    compiled, program = compile_and_read(lowered)
    compile_s = time.perf_counter() - start
    found = sorted(transfers(program), key=cost, reverse=True)
    moved = {
        name: sum(cost(transfer) for transfer in found if transfer.operation == name)
        for name in OPERATIONS
    }
    memory = compiled.memory_analysis()
    tokens = RULES.num_shards("batch", mesh) * layout.seq
    return {
        "devices": mesh.size,
        "mesh": layout.mesh,
        "seq": layout.seq,
        "tokens_per_device": tokens // mesh.size,
        "parameters": num_parameters,
        "moved_bytes": moved,
        "total_moved_bytes": sum(moved.values()),
        "transfers": [transfer._asdict() for transfer in found],
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "compile_s": compile_s,
    }


def preset_of(preset: str, divide: int) -> tuple[Sizes, list[Layout]]:
    """Sizes and layouts."""
    sizes, layouts = PRESETS[preset]
    return sizes.divided(divide) if divide > 1 else sizes, layouts


def in_new_process(preset: str, divide: int, devices: int) -> list[dict[str, Any]]:
    """`measure` with so many devices: a process has the number it starts with."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, preset, divide, devices).result()


# Tables


def describe(mesh: dict[str, int]) -> str:
    """A mesh, in words."""
    return " · ".join(f"{axis} {size}" for axis, size in mesh.items())


def print_table(sizes: Sizes, rows: list[dict[str, Any]]) -> None:
    """A table for people, and for README."""
    print(f"\n{sizes}: {rows[0]['parameters'] / 1e9:.1f} billion parameters, one prediction depth.")
    print("All of one device and one step, in GiB.\n")
    columns = ("devices", "mesh", "seq", "tokens", *OPERATIONS, "all moved")
    columns += ("arguments", "temporaries", "compile (s)")
    lines = []
    for row in rows:
        moved, memory = row["moved_bytes"], (row["argument_bytes"], row["temp_bytes"])
        cells = [row["devices"], describe(row["mesh"]), row["seq"], row["tokens_per_device"]]
        for num_bytes in (*moved.values(), row["total_moved_bytes"], *memory):
            cells.append(f"{num_bytes / 2**30:.1f}" if num_bytes else "-")
        lines.append((*cells, f"{row['compile_s']:.1f}"))
    print(table(columns, lines))


def main() -> None:
    """Compiles everything, and says what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--divide", type=int, default=1, help="how much smaller the sizes are")
    parser.add_argument("--devices", type=int, nargs="+", help="all of the preset if not given")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    sizes, layouts = preset_of(arguments.preset, arguments.divide)
    known = sorted({layout.num_devices for layout in layouts})
    for devices in arguments.devices or ():
        if devices not in known:
            parser.error(f"--devices must be of {known}, the preset's; got {devices}")
    rows = []
    for devices in arguments.devices or known:
        rows += in_new_process(arguments.preset, arguments.divide, devices)
    print_table(sizes, rows)
    report = {"preset": arguments.preset, "sizes": dataclasses.asdict(sizes), "rows": rows}
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
