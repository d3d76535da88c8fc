"""The API reference builds without a warning, and has every public name, typed and described."""

import html
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from equinox_mtp._documentation import is_run_by_pdoc

COMMAND = ("equinox_mtp", "equinox_mtp.training")
PACKAGES = (
    *COMMAND,
    "equinox_mtp.attention",
    "equinox_mtp.cross_entropy",
    "equinox_mtp.distillation",
    "equinox_mtp.linen",
    "equinox_mtp.nn",
    "equinox_mtp.serialization",
    "equinox_mtp.pretrained",
    "equinox_mtp.sharding",
    "equinox_mtp.speculative",
)


def public_names(package: str) -> list[str]:
    return importlib.import_module(package).__all__


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """HTML, by package."""
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run(
        [sys.executable, "-W", "error", "-m", "pdoc", *COMMAND, "--output-directory", folder],
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    paths = (path for path in folder.rglob("*.html") if path.name != "index.html")
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text(encoding="utf8")
        for path in paths
    }


@pytest.mark.slow
def test_reference_has_every_public_name(pages: dict[str, str]) -> None:
    assert set(pages) == set(PACKAGES)
    for package, page in pages.items():
        modules = {name for name in public_names(package) if f"{package}.{name}" in PACKAGES}
        entries = set(re.findall(r'<section id="([^".]+)">', page))
        assert entries == set(public_names(package)) - modules
        assert all(f'href="{package}/{name}.html"' in page for name in modules)
    for model in ("MTPModel", "MultiTokenPredictionBlock", "AbstractDecoder"):
        assert f'<div id="{model}.__call__"' in pages["equinox_mtp"]


@pytest.mark.slow
def test_reference_reads_well(pages: dict[str, str]) -> None:
    for page in pages.values():
        text = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
        # Examples, headings and tables in text are Markdown that was not understood.
        assert not re.search(r"&gt;&gt;&gt;|\*\*[A-Z]|\|---|<blockquote>", text)
        assert "jaxlib" not in page
    shown = html.unescape(re.sub(r"<[^>]+>", "", pages["equinox_mtp.nn"]))
    assert (
        "__call__(self, x: Float[Array, '*batch embed']) -> Float[Array, '*batch embed']" in shown
    )
    assert "<table>" in pages["equinox_mtp"]
    assert '<span class="gp">&gt;&gt;&gt; </span>' in pages["equinox_mtp.nn"]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/usr/lib/python3/site-packages/pdoc/__main__.py", True),
        ("/usr/bin/pdoc", True),
        ("train.py", False),
        ("/home/pdoc/train.py", False),
        ("-c", False),
        ("", False),
    ],
)
def test_only_pdoc_changes_annotations(program: str, expected: bool) -> None:
    assert is_run_by_pdoc(program) == expected


def described_things() -> Iterator[tuple[str, Any]]:
    """Public functions and classes, with constructors, methods and properties."""
    for package in PACKAGES:
        for name in public_names(package):
            thing = getattr(importlib.import_module(package), name)
            if not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            yield f"{package}.{name}", thing
            for method, value in vars(thing).items() if inspect.isclass(thing) else ():
                value = value.fget if isinstance(value, property) else value
                value = getattr(value, "__func__", value)
                is_own = getattr(value, "__qualname__", "").startswith(f"{thing.__name__}.")
                is_public = method == "__call__" or not method.startswith("_")
                if is_own and is_public and inspect.isroutine(value):
                    yield f"{package}.{name}.{method}", value


def test_public_things_are_described_and_typed() -> None:
    found = 0
    for name, thing in described_things():
        found += 1
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing) and not isinstance(vars(thing).get("__init__"), type(lambda: 0)):
            continue  # a named tuple
        signature = inspect.signature(thing)
        for parameter in signature.parameters.values():
            is_bound = parameter.name in ("self", "cls")
            assert is_bound or parameter.annotation is not parameter.empty, (name, parameter)
        if not inspect.isclass(thing):
            assert signature.return_annotation is not signature.empty, name
    assert found > 200
