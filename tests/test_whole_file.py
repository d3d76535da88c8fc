"""Files that are written whole, or not at all."""

import os
from pathlib import Path

import pytest

from equinox_mtp._whole_file import whole_file


def test_a_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"before", b"after"):
        with whole_file(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"before"
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["while it is written", "at its name"])
def test_what_fails_leaves_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(source: Path, target: Path) -> None:
        raise OSError(f"{source} to {target}: no room")

    if where == "at its name":
        monkeypatch.setattr(os, "replace", full)

    def write() -> None:
        with whole_file(path) as file:
            file.write(b"af")
            if where == "while it is written":
                raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
