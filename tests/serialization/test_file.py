"""A model in a single file."""

import hashlib
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from sharded_step import make_model

import equinox_mtp as emtp
from equinox_mtp._safetensors import DTYPES
from equinox_mtp.pretrained._tensor_file import TensorFile
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
    path = tmp_path / "tree.safetensors"
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
    assert [file.name for file in tmp_path.iterdir()] == ["tree.safetensors"]


def zero(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.zeros_like(x)
    return jnp.zeros_like(x) if eqx.is_array(x) else type(x)(0)


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


def test_other_libraries_read_the_file(tmp_path: Path) -> None:
    """The library safetensors takes it, which checks the header and every place."""
    path = tmp_path / "tree"
    emtp.save(path, TREE)
    read = safetensors.safe_open(path, framework="np")
    assert set(read.metadata()) == {"sha256", "equinox_mtp", "numbers"}
    assert [*json.loads(read.metadata()["numbers"])][1] == ["numbers.1", "float", 0.25]
    names = ["['a']['b']", "['a.b']", "bfloat16", "empty", "flag", "float", "float8", "host"]
    assert sorted(read.keys()) == sorted([*names, "on_host", "scalar", "turned"])
    for name in ("empty", "flag", "float", "host", "scalar", "turned"):
        np.testing.assert_array_equal(read.get_tensor(name), np.asarray(TREE[name]), strict=True)
    raw = dict(safetensors.deserialize(path.read_bytes()))
    for name, dtype in (("bfloat16", "BF16"), ("float8", "F8_E4M3")):
        assert raw[name]["dtype"] == dtype
        assert raw[name]["data"] == np.asarray(TREE[name]).tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_one_table_of_dtypes(name: str, tmp_path: Path) -> None:
    """What `save` calls a dtype the library safetensors does, and so do released models."""
    values = np.arange(8).astype(DTYPES[name])
    emtp.save(tmp_path / "one", {"x": values})
    ((key, entry),) = safetensors.deserialize((tmp_path / "one").read_bytes())
    assert (key, entry["dtype"], bytes(entry["data"])) == ("x", name, values.tobytes())
    read = TensorFile(tmp_path / "one").view("x")
    assert (read.dtype, read.tobytes()) == (values.dtype, values.tobytes())


def test_names_are_those_of_the_fields(tmp_path: Path) -> None:
    model: Any = make_model()
    emtp.save(tmp_path / "model.safetensors", model)
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        arrays["decoder.layers.attention.query_kernel"], model.decoder.layers.attention.query_kernel
    )
    assert len(arrays) == len(jax.tree.leaves(eqx.filter(model, eqx.is_array)))


@pytest.mark.parametrize(
    "tree",
    [
        jnp.arange(3.0),
        {"__metadata__": jnp.arange(3.0)},
        {},
        {"only": 3},
        [np.arange(3, dtype=">i4"), np.arange(3, dtype=">f8")],
        {"not finite": jnp.asarray([jnp.nan, jnp.inf]), "nor": float("-inf")},
        {"one": jnp.zeros(3, bool), "two": np.zeros(1), "three": jnp.ones(5, jnp.int8)},
        {"": {"": jnp.ones(2)}, 'ü\n"': jnp.zeros(2)},
    ],
)
def test_unusual_trees(tree: Any, tmp_path: Path) -> None:
    emtp.save(tmp_path / "tree", tree)
    loaded = emtp.load(tmp_path / "tree", jax.tree.map(zero, tree))
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    assert [x.dtype for x in map(np.asarray, jax.tree.leaves(loaded))] == [
        x.dtype for x in map(np.asarray, jax.tree.leaves(tree))
    ]
    safetensors.deserialize((tmp_path / "tree").read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"float": jnp.zeros((3, 2))},
            r"at `float` it has float32\[3,2\] where the file has float32\[2,3\]",
        ),
        ({"float": jnp.zeros((2, 3), int)}, r"at `float` it has int32\[2,3\] where the file has"),
        ({"zzz": jnp.zeros(1)}, r"at `zzz` it has float32\[1\] where the file has nothing"),
        ({"turned": None}, r"at `turned` it has nothing where the file has float64\[3,2\]"),
        ({"numbers": (3, 1, True)}, r"at `numbers.1` it has int where the file has float"),
        ({"numbers": (2**70, 0.25, True, 1.0)}, r"at `numbers.4` it has nothing .* has complex"),
        ({"name": 3}, r"at `name` it has int where the file has nothing"),
        (
            {"float": jax.random.key(0)},
            r"`like` must hold arrays of numbers.* at `float`.*key_data",
        ),
        ({"float": np.array([{}])}, r"`like` must hold arrays of numbers.*; got one of object"),
        (
            {"float": jax.ShapeDtypeStruct((2, 3), np.float64)},
            "`like` has float64 at `float`, which JAX would cut to 32 bits",
        ),
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
        (lambda data: data[:200], "is cut short"),
        (lambda data: flip(data, len(data) - 1), "is damaged"),
        (lambda data: flip(data, len(data) - 70), "is damaged"),
        (lambda data: data.replace(b"F32", b"F16", 1), "is damaged"),
        (lambda data: data.replace(b"0.25", b"0.35", 1), "is damaged"),
        (lambda data: data + b"\0", "is damaged"),
        (lambda data: flip(data, 6), "is cut short"),
        (lambda _: b"", "was not written by `save`"),
        (lambda _: b"\3\0\0\0\0\0\0\0{}", "was not written by `save`"),
        (lambda _: b"\2\0\0\0\0\0\0\0{}", "no digest in its metadata"),
        (lambda _: json.dumps({"format": 3}).encode(), "was not written by `save`"),
        (lambda _: b"[]", "was not written by `save`"),
        (lambda _: pickle.dumps(TREE["numbers"]), "was not written by `save`"),
        (lambda _: safetensors.numpy.save({"w": np.zeros(3)}), "no digest in its metadata"),
        (
            lambda _: b'{"format": "equinox_mtp 1", "arrays": [], "numbers": []}\n' + b"0" * 64,
            "the format that `save` had before safetensors. Load it with the version",
        ),
    ],
)
def test_other_files_are_refused(harm: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tree"
    emtp.save(path, TREE)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        emtp.load(path, TREE)


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path, tree = tmp_path / "tree", {"w": jnp.arange(3.0), "n": 0.25}
    emtp.save(path, tree)
    data = path.read_bytes()
    for where in range(len(data)):
        path.write_bytes(flip(data, where))
        with pytest.raises(ValueError, match=f"{path}"):
            emtp.load(path, tree)
        path.write_bytes(data[:where])
        with pytest.raises(ValueError, match=f"{path}"):
            emtp.load(path, tree)


# Files made to mislead: their digest is right


SMALL = {"w": np.arange(3.0, dtype=np.float32), "v": np.ones(2, np.float32), "n": 0.25}


def forge(path: Path, change: Callable[[Any], Any], body: Callable[[bytes], bytes]) -> None:
    """Changes header and body of a file, and gives it the digest that it should have."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    digest = json.loads(data[8 : 8 + length])["__metadata__"]["sha256"].encode()
    new = len(text).to_bytes(8, "little") + text + body(data[8 + length :])
    right = hashlib.sha256(new.replace(digest, b"0" * 64)).hexdigest()
    path.write_bytes(new.replace(digest, right.encode()))


def entry(name: str, **changes: Any) -> Callable[[Any], Any]:
    def change(header: Any) -> Any:
        header[name].update(changes)
        return header

    return change


def metadata(name: str, value: Any) -> Callable[[Any], Any]:
    def change(header: Any) -> Any:
        header["__metadata__"][name] = value
        return header

    return change


def without(*names: str) -> Callable[[Any], Any]:
    def change(header: Any) -> Any:
        inner = header
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]
        return header

    return change


def nested(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return text[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("change", "body", "message"),
    [
        (dict, lambda data: data[:-4], "its arrays take 16 bytes, where 20 are needed"),
        (dict, lambda data: data + b"\0" * 4, "its arrays take 24 bytes, where 20 are needed"),
        (entry("w", shape=["3"]), bytes, "is damaged: its header puts arrays in other places"),
        (entry("w", shape=3), bytes, "where the file has no description of an array"),
        (entry("w", dtype=[]), bytes, "where the file has no description of an array"),
        (entry("w", dtype="F64"), bytes, r"it has float32\[3\] where the file has float64\[3\]"),
        (entry("w", shape=[2**62]), bytes, r"where the file has float32\[4611686018427387904\]"),
        (entry("w", data_offsets=["0", "12"]), bytes, "puts arrays in other places"),
        (entry("w", data_offsets=[0, 12]), bytes, "puts arrays in other places"),  # overlap
        (entry("w", data_offsets=[-12, 0]), bytes, "puts arrays in other places"),
        (entry("w", data_offsets=[2**40, 2**40 + 12]), bytes, "puts arrays in other places"),
        (entry("w", more=1), bytes, "puts arrays in other places"),
        (without("w"), bytes, r"at `w` it has float32\[3\] where the file has nothing"),
        (without("w", "dtype"), bytes, "where the file has no description of an array"),
        (without("w", "data_offsets"), bytes, "puts arrays in other places"),
        (without("__metadata__", "numbers"), bytes, "its metadata lack Python's numbers"),
        (metadata("numbers", "["), bytes, "its metadata lack Python's numbers"),
        (metadata("numbers", "[" * 10_000), bytes, "its metadata lack Python's numbers"),
        (metadata("numbers", 3), bytes, "its metadata lack Python's numbers"),
        (metadata("numbers", '[["n", "float", "0.25"]]'), bytes, "lack Python's numbers"),
        (metadata("numbers", '[["n", "float", 1]]'), bytes, "lack Python's numbers"),
        (metadata("numbers", '[["n", "float"]]'), bytes, "lack Python's numbers"),
        (metadata("numbers", '[["n", "complex", [1, 2]]]'), bytes, "lack Python's numbers"),
        (metadata("numbers", "[]"), bytes, "at `n` it has float where the file has nothing"),
        (nested, bytes, "its header is no JSON object with metadata"),
        (lambda header: [header], bytes, "its header is no JSON object with metadata"),
        (
            lambda header: header["__metadata__"],
            bytes,
            "its header is no JSON object with metadata",
        ),
        (
            lambda header: {**header, **{f"layer {k}": {} for k in range(100_000)}},
            bytes,
            "`like` does not fit .* its header takes .* bytes",
        ),
    ],
)
def test_files_made_to_mislead(
    change: Callable[[Any], Any], body: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tree"
    emtp.save(path, SMALL)
    forge(path, lambda header: header, bytes)
    assert emtp.load(path, SMALL)["w"].tolist() == [0, 1, 2]
    forge(path, change, body)
    with pytest.raises(ValueError, match=message) as caught:
        emtp.load(path, SMALL)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_nothing_is_allocated_on_a_headers_word(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    emtp.save(path, SMALL)
    data = path.read_bytes()
    for length in (60_000_000, 2**62):
        # A sparse file: of that size, as its header says, but not on disk.
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        os.truncate(path, 70_000_000)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"does not fit|is cut short"):
            emtp.load(path, SMALL)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for wrong in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(
            ValueError, match=r"`path` must name a file; .* is a folder or a device"
        ):
            emtp.load(wrong, SMALL)


def test_what_is_no_array_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A `like` in the place of the model would write the bytes of pointers over it."""
    path = tmp_path / "tree"
    emtp.save(path, SMALL)
    before = path.read_bytes()
    donated = jnp.ones(3)
    donated.delete()
    for tree, message in (
        (eqx.filter_eval_shape(make_model), "got the shape of one at `.*the `like` of `load`"),
        ({"w": jnp.ones(3), "v": jax.ShapeDtypeStruct((2,), jnp.float32)}, "of one at `v`"),
        ({"w": donated}, "the one at `w` was deleted, or donated"),
        ({"key": jax.random.key(0)}, r"`tree` must hold arrays of numbers.* at `key`.*key_data"),
        ({"w": np.zeros(2, np.complex128)}, "got one of complex128 at `w`"),
        ({"w": np.zeros(2, "datetime64[s]")}, r"got one of datetime64\[s\] at `w`"),
        ({"w": np.array(["text"])}, "got one of <U4 at `w`"),
    ):
        with pytest.raises(ValueError, match=message):
            emtp.save(path, tree)
        with pytest.raises(ValueError, match=message):
            emtp.save(tmp_path / "new", tree)
    with pytest.raises(ValueError, match="got a traced one at `w`"):
        jax.jit(lambda x: emtp.save(path, {"w": x}))(1.0)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tree"]


def test_what_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tree"
    emtp.save(path, TREE)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    for module, name in ((np, "ascontiguousarray"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            with pytest.raises(OSError, match="no space left"):
                emtp.save(path, {"w": np.zeros(3)})
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["tree"]
    for wrong in (tmp_path / "no" / "tree", tmp_path):
        with pytest.raises(FileNotFoundError, match="`path` must name a file in a folder that"):
            emtp.save(wrong, TREE)
    with pytest.raises(FileNotFoundError):
        emtp.load(tmp_path / "nothing", TREE)
    with pytest.raises(ValueError, match="must be a tree with arrays, or with their shapes"):
        emtp.load(path, make_model)
