"""Reading compiled programs: their arrays, and what devices exchange."""

import functools
import math
import re
from typing import Any, NamedTuple


class Collective(NamedTuple):
    operation: str
    sizes: tuple[int, ...]
    in_loop: bool


class Transfer(NamedTuple):
    """What a device receives in one collective operation, how often, and for which JAX function."""

    operation: str
    num_bytes: int
    times: int
    origin: str


class Product(NamedTuple):
    """A matrix product: its axes, at the end those summed over, and how often it runs."""

    sizes: tuple[int, ...]
    times: int | None

    @property
    def flops(self) -> int:
        """Of all runs; of one, if nothing says how many there are."""
        return 2 * math.prod(self.sizes) * (self.times or 1)


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_OPERATIONS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all"
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


def computations(program: str) -> dict[str, list[str]]:
    """The lines of each computation of an HLO module, by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = found[start[1]] = []
        else:
            lines.append(line.strip())
    return found


def called(line: str) -> list[str]:
    names = [one or several for one, several in _CALLED.findall(line)]
    return [name.strip().lstrip("%") for group in names for name in group.split(",")]


def in_loops(program: dict[str, list[str]]) -> set[str]:
    """The computations that a loop's body or condition calls, and whatever those call."""
    waiting = [
        name for lines in program.values() for x in lines if " while(" in x for name in called(x)
    ]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for line in program[name] for other in called(line)]
    return found


def sizes(types: str) -> tuple[int, ...]:
    """How many numbers each array has in a piece of HLO, as `(f32[2,3]{1,0}, s32[])`."""
    shapes = re.findall(r"\b(?:pred|bf16|f32|s32|u32|s8|u8|f16|f64|s64)\[([\d,]*)\]", types)
    return tuple(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


def compile_for(function: Any, *arguments: Any) -> tuple[Any, str]:
    """The compiled function, and its program; LLVM's optimisations come later and take time."""
    compiled = function.lower(*arguments).compile({"xla_backend_optimization_level": 0})
    text = getattr(compiled, "compiled", compiled).as_text()  # equinox wraps it
    assert text is not None
    return compiled, text


def collectives(program: str) -> list[Collective]:
    """All communication in a compiled program, with the sizes of its results."""
    by_name = computations(program)
    looped = in_loops(by_name)
    return [
        Collective(operation[2], sizes(operation[1]), name in looped)
        for name, lines in by_name.items()
        for line in lines
        if (
            operation := re.match(
                rf"(?:ROOT )?%?[\w.-]+ = (.*?) ({_OPERATIONS})(?:-start)?\(", line
            )
        )
    ]


def transfers(program: str) -> list[Transfer]:
    """All communication in a program, in bytes that each device receives.

    In a group of n devices n - 1 of n parts come from elsewhere: (n-1)/n of the result of an
    all-gather or an all-to-all, n - 1 times the result of a reduce-scatter, and twice (n-1)/n of
    that of an all-reduce. A collective-permute brings all of its result, unless every device sends
    to itself. An all-reduce of which each device uses one of n slices is a reduce-scatter, as XLA's
    partitioner writes it. What is in a loop's body happens as often as it runs, and what is in a
    branch as if it were taken.

    **Raises:** `ValueError` for an operation that is not understood, and for one in a loop of which
    it is not known how often it runs.
    """
    by_name = computations(program)
    times = _times(by_name)
    partitions = re.search(r"num_partitions=(\d+)", program)
    num_devices = int(partitions[1]) if partitions else 1
    found = []
    for name, lines in by_name.items():
        for line in lines:
            match = re.match(rf"(?:ROOT )?(%?[\w.-]+) = (.*?) ((?:{_OPERATIONS})\S*)\(", line)
            if match is None:
                continue
            operation, result, n = match[3], num_bytes(match[2]), _group_size(line, num_devices)
            if operation == "all-reduce" and _is_only_sliced(match[1], result // n, lines):
                operation, result = "reduce-scatter", result // n
            received = _received(operation, result, n, line)
            if (runs := times[name]) is None:
                raise ValueError(f"how often the loop around this runs is not known: {line}")
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append(Transfer(operation, received, runs, origin[1] if origin else ""))
    return found


def products(program: str) -> list[Product]:
    """All matrix products in a compiled program."""
    by_name = computations(program)
    times, found = _times(by_name), []
    for name, lines in by_name.items():
        shapes = dict(
            re.findall(r"(?:^|\n)(?:ROOT )?(%[\w.-]+) = \w+\[([\d,]*)\]", "\n".join(lines))
        )
        for line in lines:
            match = re.search(
                r"= \w+\[([\d,]*)\]\S* dot\(.*?(%[\w.-]+),.*lhs_contracting_dims=\{([\d,]*)\}", line
            )
            if match is None:
                continue
            result, left = (_shape(x) for x in (match[1], shapes[match[2]]))
            summed = tuple(left[axis] for axis in _shape(match[3]))
            found.append(Product((*result, *summed), times[name]))
    return found


def parameters(program: str) -> set[tuple[int, ...]]:
    """The shapes of what a compiled program reads."""
    entry = program[program.index("\nENTRY ") :]
    return {_shape(x) for x in re.findall(r"= \w+\[([\d,]*)\]\S* parameter\(", entry)}


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))


def num_bytes(types: str) -> int:
    """Of all arrays in a piece of HLO, as `(f32[2,3]{1,0}, s32[])`."""
    arrays = re.findall(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]", types)
    return sum(
        _BYTES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape in arrays
    )


def _received(operation: str, result: int, n: int, line: str) -> int:
    match operation:
        case "all-gather" | "all-to-all":
            return result * (n - 1) // n
        case "all-reduce":
            return 2 * result * (n - 1) // n
        case "reduce-scatter":
            return result * (n - 1)
        case "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", line)
            return result if any(source != target for source, target in pairs) else 0
    raise ValueError(f"what this operation moves is not known: {line}")


def _is_only_sliced(name: str, slice_bytes: int, lines: list[str]) -> bool:
    """Whether nothing uses an instruction's result but one slice of that size."""
    uses = [line for line in lines if re.search(rf"[( ]{re.escape(name)}[,)]", line)]
    taken = [re.search(r"= (\S+) dynamic-slice\(", line) for line in uses]
    return [match and num_bytes(match[1]) for match in taken] == [slice_bytes]


def _group_size(line: str, num_devices: int) -> int:
    """How many devices exchange with one another, in any of HLO's notations."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(counted[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
        return math.prod(sizes[axis.strip()] for axis in mesh[2].split(","))
    return num_devices


def _times(program: dict[str, list[str]]) -> dict[str, int | None]:
    """How often each computation runs; `None` if a number decides that is not in the program."""
    calls: dict[str, list[tuple[str, int | None]]] = {name: [] for name in program}
    for caller, lines in program.items():
        for line in lines:
            runs = _trip_count(line, program) if " while(" in line else 1
            for name in called(line):
                calls[name].append((caller, runs))

    @functools.cache
    def times(name: str) -> int | None:
        total = 0
        for caller, runs in calls[name]:
            outer = times(caller)
            if outer is None or runs is None:
                return None
            total += outer * runs
        return total if calls[name] else 1

    return {name: times(name) for name in program}


def _trip_count(line: str, program: dict[str, list[str]]) -> int | None:
    """As XLA says it, or as the condition does if it is `i < n`: `lax.scan` counts from 0."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    text = "\n".join(program[condition[1]]) if condition else ""
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)
    if len(bounds) != 1 or not re.search(r"ROOT .* compare\(.*direction=LT", text):
        return None
    return int(bounds[0])
