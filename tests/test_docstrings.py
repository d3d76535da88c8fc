"""The examples in docstrings run, and show what they say."""

import doctest
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOMS = (
    "equinox_mtp",
    "equinox_mtp.cross_entropy",
    "equinox_mtp.distillation",
    "equinox_mtp.linen",
    "equinox_mtp.nn",
    "equinox_mtp.pretrained",
    "equinox_mtp.serialization",
    "equinox_mtp.sharding",
    "equinox_mtp.speculative",
    "equinox_mtp.training",
)


def documented() -> Iterator[tuple[str, Any]]:
    """Public functions and classes, each under the first room that has it, and their methods."""
    seen: set[int] = set()
    for room in ROOMS:
        for name, thing in sorted(vars(importlib.import_module(room)).items()):
            is_documented = inspect.isroutine(thing) or inspect.isclass(thing)
            if name.startswith("_") or not is_documented or id(thing) in seen:
                continue
            seen.add(id(thing))
            yield f"{room}.{name}", thing
            for method, function in vars(thing).items() if inspect.isclass(thing) else ():
                is_own = getattr(function, "__qualname__", "").startswith(f"{name}.")
                if is_own and not method.startswith("_") and function.__doc__:
                    yield f"{room}.{name}.{method}", function


def run(docstring: str, name: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the examples; returns what is defined after them."""
    parser, report = doctest.DocTestParser(), []
    test = parser.get_doctest(inspect.cleandoc(docstring), names, name, None, 0)
    assert test.examples
    doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)
    return test.globs


@functools.cache
def names_of(room: str) -> dict[str, Any]:
    """What the docstrings of the package and of the room define for the examples in it."""
    names: dict[str, Any] = {}
    for module in dict.fromkeys(("equinox_mtp", room)):
        docstring = importlib.import_module(module).__doc__ or ""
        names = run(docstring, module, names) if ">>> " in docstring else names
    return names


WITH_EXAMPLES = {
    name: (thing.__doc__, thing.__module__)
    for name, thing in documented()
    if ">>> " in (thing.__doc__ or "")
}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    docstring, module = WITH_EXAMPLES[name]
    room = next(room for room in reversed(ROOMS) if module.startswith(room))
    run(docstring, name, dict(names_of(room)))


def test_functions_and_classes_have_an_example() -> None:
    without = {
        name
        for name, _ in documented()
        if name.rpartition(".")[0] in ROOMS and name not in WITH_EXAMPLES
    }
    # The commands: README's and the notebooks run them.
    commands = {"CheckpointInfo", "GenerateConfig", "Interrupted", "generate_command"}
    commands |= {"generate_text", "load_model", "train", "train_command"}
    commands |= {"ExportConfig", "export_command", "export_run"}
    assert without == {f"equinox_mtp.training.{name}" for name in commands}
