"""The house is as the package's docstring draws it: imports run downward, and through the doors."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import equinox_mtp

PACKAGE = Path(equinox_mtp.__file__).parent
ROOMS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


def floors() -> dict[str, int]:
    assert equinox_mtp.__doc__
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", equinox_mtp.__doc__, flags=re.MULTILINE)
    return {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)`", names)}


def room_of(module: tuple[str, ...]) -> str:
    return module[0] if module else "__init__"


def imports() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Each module, as parts below the package, and a module of the package that it imports."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level:
                base = module[: len(module) - node.level]
            elif (node.module or "").split(".")[0] == "equinox_mtp":
                base = ()
            else:
                continue
            names = (node.module or "").removeprefix("equinox_mtp").strip(".")
            target = (*base, *filter(None, names.split(".")))
            if names:
                yield module, target
            else:
                for alias in node.names:
                    yield module, (*target, alias.name)


def test_every_module_has_a_floor() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | ROOMS
    assert set(floors()) == modules


def test_imports_run_downward() -> None:
    floor, found = floors(), 0
    for module, target in imports():
        here, there = room_of(module), room_of(target)
        if here == there or there not in floor:
            continue
        found += 1
        # Files of one floor may build on one another; rooms of one floor never meet.
        is_file = here.startswith("_")
        allowed = floor[there] < floor[here] or (is_file and floor[there] == floor[here])
        assert allowed, f"{'.'.join(module)} imports {'.'.join(target)}"
    assert found > 50


def test_rooms_are_entered_by_their_doors() -> None:
    for module, target in imports():
        room, *inside = target
        if inside and room in ROOMS and room_of(module) != room:
            assert not inside[0].startswith("_"), f"{module} reaches into {'.'.join(target)}"


def test_no_circles() -> None:
    edges: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for module, target in imports():
        file = PACKAGE.joinpath(*target).with_suffix(".py")
        to = target if file.exists() else (*target, "__init__")
        edges.setdefault(module, set()).add(to)
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], path: tuple[tuple[str, ...], ...]) -> None:
        assert module not in path, " → ".join(".".join(part) for part in (*path, module))
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in list(edges):
        visit(module, ())
