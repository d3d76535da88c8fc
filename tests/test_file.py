"""A model in a single file."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import make_model

import equinox_mtp as emtp
from equinox_mtp.sharding import make_mesh, parameter_shardings

TREE = {
    "float": jnp.arange(6.0).reshape(2, 3),
    "bfloat16": jnp.asarray([1.5, -2.0], jnp.bfloat16),
    "float8": jnp.asarray([0.5, 2.0], jnp.float8_e4m3fn),
    "on_host": np.asarray(jnp.asarray([1.5, -2.0], jnp.bfloat16)),
    "turned": np.arange(6.0).reshape(2, 3).T,
    "scalar": np.float32(2.5),
    "empty": jnp.zeros((0, 3)),
    "a.b": jnp.float32(1.0),
    "a": {"b": jnp.float32(2.0)},
    "host": np.arange(3),
    "flag": jnp.asarray([True, False]),
    "numbers": (2**70, 0.25, True, float("inf"), 1 + 2j),
    "none": None,
    "name": "unchanged",
}


def test_a_tree_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "tree.mtp"
    emtp.save(path, TREE)
    like = {**TREE, "name": "of like", "numbers": (0, 0.0, False, 0.0, 0j)}
    like = jax.tree.map(lambda x: (x * 0).astype(x.dtype) if eqx.is_array(x) else x, like)
    loaded = emtp.load(str(path), like)
    assert loaded["numbers"] == TREE["numbers"]
    assert loaded["name"] == "of like"
    assert (float(loaded["a.b"]), float(loaded["a"]["b"])) == (1, 2)
    for name in set(TREE) - {"numbers", "none", "name", "a"}:
        assert loaded[name].dtype == TREE[name].dtype
        assert type(loaded[name]) is type(TREE[name])
        np.testing.assert_array_equal(
            np.asarray(loaded[name], np.float32), np.asarray(TREE[name], np.float32)
        )
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert [file.name for file in tmp_path.iterdir()] == ["tree.mtp"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_model_comes_back_from_its_shapes(tmp_path: Path) -> None:
    model = make_model()
    emtp.save(tmp_path / "model", model)
    shapes = eqx.filter_eval_shape(make_model)
    loaded = emtp.load(tmp_path / "model", shapes)
    assert eqx.tree_equal(loaded, model)
    mesh = make_mesh({"data": 8})
    placed = jax.tree.map(
        lambda x, sharding: (
            x if sharding is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        ),
        shapes,
        parameter_shardings(shapes, mesh),
        is_leaf=lambda x: x is None,
    )
    loaded = emtp.load(tmp_path / "model", placed)
    assert eqx.tree_equal(jax.device_get(loaded), jax.device_get(model))
    assert loaded.decoder.embedding.sharding.mesh == mesh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"float": jnp.zeros((3, 2))},
            r"has `float`, float32\[3,2\] where the file has `float`, float32\[2,3\]",
        ),
        ({"float": jnp.zeros((2, 3), int)}, r"has `float`, int32\[2,3\] where the file has"),
        ({"zzz": jnp.zeros(1)}, r"has `zzz`, float32\[1\] where the file has nothing more"),
        ({"turned": None}, r"has nothing more where the file has `turned`, float64\[3,2\]"),
        ({"numbers": (3, 1, True)}, r"has `numbers.1`, int\[\] where the file has `numbers.1`, fl"),
        ({"float": jax.random.key(0)}, r"`like` must hold arrays of numbers; .* at `float`"),
        ({"float": np.array([{}])}, r"`like` must hold arrays of numbers; got one of object"),
    ],
)
def test_trees_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    emtp.save(tmp_path / "tree", TREE)
    with pytest.raises(ValueError, match=message):
        emtp.load(tmp_path / "tree", {**TREE, **change})


def flip(data: bytes, where: int) -> bytes:
    return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda data: data[:-1], "is damaged"),
        (lambda data: data[:200], "is damaged|was not written by"),
        (lambda data: flip(data, len(data) - 1), "is damaged"),
        (lambda data: flip(data, len(data) - 70), "is damaged"),
        (lambda data: data.replace(b"float32", b"float16", 1), "is damaged"),
        (lambda data: data + b"\0", "is damaged"),
        (lambda _: b"", "was not written by `save`"),
        (lambda _: json.dumps({"format": 3}).encode(), "was not written by `save`"),
        (lambda _: b"[]", "was not written by `save`"),
        (lambda _: pickle.dumps(TREE["numbers"]), "was not written by `save`"),
    ],
)
def test_other_files_are_refused(harm: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tree"
    emtp.save(path, TREE)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        emtp.load(path, TREE)


def test_what_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tree"
    emtp.save(path, TREE)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    for module, name in ((np, "asarray"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            with pytest.raises(OSError, match="no space left"):
                emtp.save(path, {"w": np.zeros(3)})
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["tree"]
    with pytest.raises(ValueError, match=r"`tree` must hold arrays of numbers; .* at `key`"):
        emtp.save(path, {"key": jax.random.key(0)})
    for wrong in (tmp_path / "no" / "tree", tmp_path):
        with pytest.raises(FileNotFoundError, match="`path` must name a file in a folder that"):
            emtp.save(wrong, TREE)
    with pytest.raises(FileNotFoundError):
        emtp.load(tmp_path / "nothing", TREE)
    with pytest.raises(ValueError, match="must be a tree with arrays, or with their shapes"):
        emtp.load(path, make_model)
