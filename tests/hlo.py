"""Reading compiled programs: their arrays, and what devices exchange."""

import math
import re
from typing import Any, NamedTuple


class Collective(NamedTuple):
    operation: str
    sizes: tuple[int, ...]
    in_loop: bool


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
