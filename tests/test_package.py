"""What a release ships: an archive of sources, and a wheel that installs and imports by itself."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]


def python(*arguments: str | Path, cwd: Path) -> str:
    """What Python prints, without this repository on its path."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both archives; the wheel is built from the sources in the other."""
    folder = tmp_path_factory.mktemp("release")
    python("-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


@pytest.fixture(scope="module")
def metadata(release: Path) -> Message:
    with zipfile.ZipFile(only(release, "*.whl")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def test_wheel_holds_the_package_alone(release: Path) -> None:
    with zipfile.ZipFile(only(release, "*.whl")) as wheel:
        names = set(wheel.namelist())
    info = f"equinox_mtp-{PROJECT['version']}.dist-info"
    package = {name for name in names if not name.startswith(f"{info}/")}
    assert f"{info}/licenses/LICENSE" in names
    sources = ROOT / "equinox_mtp"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in sources.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package == expected
    assert "equinox_mtp/py.typed" in package


def test_sources_hold_the_tests_and_nothing_unknown(release: Path) -> None:
    with tarfile.open(only(release, "*.tar.gz")) as sources:
        parts = [Path(name).parts for name in sources.getnames()]
    assert {part[1] for part in parts} == {
        *("equinox_mtp", "tests", "notebooks"),
        *("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"),
    }
    assert not any("__pycache__" in part for part in parts)


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "equinox-mtp"
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Issues", "Changelog"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    classifiers = metadata.get_all("Classifier", [])
    kinds = {classifier.split(" :: ")[0] for classifier in classifiers}
    assert kinds >= {"Development Status", "Operating System", "Topic", "Typing"}
    # The licence is an SPDX expression; a classifier as well is an error at PyPI.
    assert "License" not in kinds


def test_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    newest = re.search(r"^## (\S+)", changelog, flags=re.MULTILINE)
    assert newest
    assert newest[1] == PROJECT["version"]


def test_wheel_installs_and_imports(release: Path, tmp_path: Path) -> None:
    wheel, folder = only(release, "*.whl"), tmp_path / "installed"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "import importlib.metadata, equinox_mtp\n"
        "print(equinox_mtp.__file__)\n"
        "print(importlib.metadata.version('equinox-mtp'))\n"
        "print(equinox_mtp.MTPConfig.preset('paper').concat_order)\n"
    )
    file, version, order = python("-c", program, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(folder)
    assert (version, order) == (PROJECT["version"], "hidden_first")


def test_pre_commit_has_the_ruff_of_the_lint_extra() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf8")
    (version,) = re.findall(r"rev: v(\S+)", hooks)
    (ruff,) = (x for x in PROJECT["optional-dependencies"]["lint"] if x.startswith("ruff"))
    assert SpecifierSet(ruff.removeprefix("ruff")).contains(version)
    assert re.findall(r"id: (\S+)", hooks) == ["ruff-check", "ruff-format"]
