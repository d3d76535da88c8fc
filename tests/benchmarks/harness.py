"""What the benchmarks share: calls that are timed in turn, medians, tables and files."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

Row = dict[str, Any]


class Timed:
    """A function that is called again and again; its first call is not timed."""

    def __init__(self, function: Callable[[], Any], count: int = 1):
        self.function, self.count = function, count
        self.times: list[float] = []
        self.result = jax.block_until_ready(function())

    def run(self) -> Any:
        """Calls it once; its time counts as that of `count` pieces of work."""
        started = time.perf_counter()
        self.result = jax.block_until_ready(self.function())
        self.times.append((time.perf_counter() - started) / self.count)
        return self.result

    @property
    def seconds(self) -> float:
        """The median of a piece of work."""
        return statistics.median(self.times)


class Compiled:
    """A compiled function with its arguments, the time it took to compile, and its memory."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.arguments = arguments
        started = time.perf_counter()
        jitted: Any = eqx.filter_jit(function)
        self.function: Any = jitted.lower(*arguments).compile()
        self.compile_s = time.perf_counter() - started
        self.temp_bytes = int(self.function.compiled.memory_analysis().temp_size_in_bytes)

    def __call__(self) -> Any:
        return self.function(*self.arguments)

    def seconds(self, repeats: int) -> float:
        """The median time of a call; calls that take microseconds are timed many at once."""
        jax.block_until_ready(self())
        count, times, out = 1, [], None
        while len(times) < repeats:
            started = time.perf_counter()
            for _ in range(count):
                out = self()
            jax.block_until_ready(out)
            elapsed = time.perf_counter() - started
            if elapsed < 0.01 and count < 1024:
                count *= 2
            else:
                times.append(elapsed / count)
        return statistics.median(times)


def run_in_turn(timed: Sequence[Timed], rounds: int) -> None:
    """Calls all of them, round after round: what else the machine does meets them alike."""
    for round_ in range(rounds):
        for one in timed:
            one.run()
        print(f"measured {round_ + 1} of {rounds} times", file=sys.stderr)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_json(file: Path | None, report: Row) -> None:
    """Writes a report with the names of device and JAX, if there is a file to write it to."""
    if file is not None:
        of_machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        write(file, json.dumps({**of_machine, **report}, indent=1) + "\n")


def write(file: Path, text: str) -> None:
    """Writes a file whole, or not at all."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, file)
