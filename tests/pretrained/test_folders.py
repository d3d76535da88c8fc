"""Folders that are not right: one line names the file and the tensor, before anything is read."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from checkpoints import FOLDER, changed, config_of, tensors_of
from safetensors.numpy import save_file

from equinox_mtp import pretrained

NAME = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[Path], Any]


def config(**values: Any) -> Change:
    """Sets keys of config.json; `...` removes them."""

    def change(folder: Path) -> None:
        written = config_of(folder)
        for key, value in values.items():
            written.pop(key, None) if value is ... else written.update({key: value})
        (folder / "config.json").write_text(json.dumps(written))

    return change


def tensors(function: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def change(folder: Path) -> None:
        stored = tensors_of(folder)
        function(stored)
        save_file(stored, folder / "model.safetensors")

    return change


def header(function: Callable[[dict[str, Any]], Any]) -> Change:
    """Changes what the file says of its tensors."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        written = json.loads(content[8 : 8 + length])
        function(written)
        text = json.dumps(written).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return change


def content(function: Callable[[bytes], bytes], file: str = "model.safetensors") -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_bytes(function((folder / file).read_bytes()))

    return change


def in_shards(function: Callable[[dict[str, Any], Path], Any]) -> Change:
    """Two shards with an index, which is then changed."""

    def change(folder: Path) -> None:
        stored = tensors_of(folder)
        (folder / "model.safetensors").unlink()
        names = sorted(stored)
        files: dict[str, Any] = {
            name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)
        }
        for file in ("model-1.safetensors", "model-2.safetensors"):
            save_file({n: stored[n] for n in names if files[n] == file}, folder / file)
        function(files, folder)
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def set_entry(key: str, value: Any) -> Change:
    return header(lambda written: written[NAME].update({key: value}))


def _repeated(file: bytes) -> bytes:
    """A header with the same name again."""
    length = int.from_bytes(file[:8], "little")
    text = file[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(text)[NAME]).encode()
    text = text[:-1] + b', "' + NAME.encode() + b'": ' + entry + b"}"
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


CASES: dict[str, tuple[Change, str]] = {
    # Files
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: it is missing"),
    "config not JSON": (content(lambda b: b"{", "config.json"), "config.json: it is not JSON"),
    "config a list": (content(lambda b: b"[]", "config.json"), "config.json: it is no JSON object"),
    "config nested": (
        content(lambda b: b'{"a":' * 10**5, "config.json"),
        "config.json: it is not JSON",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"there are no \*.safetensors"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pytorch_model.bin: such files run code",
    ),
    "empty file": (content(lambda b: b""), "model.safetensors: it is cut short"),
    "a few bytes": (content(lambda b: b[:7]), "model.safetensors: it is cut short"),
    "cut header": (content(lambda b: b[:100]), "model.safetensors: it is cut short: its header"),
    "cut data": (content(lambda b: b[:-5]), r"model.safetensors: tensor `.*`: it would lie at"),
    "trailing bytes": (content(lambda b: b + b"xy"), "its tensors end at byte"),
    "huge header": (
        content(lambda b: (2**62).to_bytes(8, "little") + b[8:]),
        "its header would be longer than the file",
    ),
    "header not JSON": (content(lambda b: b[:8] + b"#" + b[9:]), "its header is no JSON object"),
    "not safetensors": (content(lambda b: b"PK\x03\x04" + b[4:]), "it is cut short"),
    # Headers
    "unknown dtype": (set_entry("dtype", "F4"), f"tensor `{NAME}`: unknown dtype 'F4'"),
    "dtype a list": (set_entry("dtype", []), f"tensor `{NAME}`: unknown dtype"),
    "shape of text": (set_entry("shape", ["96", 64]), f"tensor `{NAME}`: its shape and offsets"),
    "shape negative": (set_entry("shape", [-96, -64]), f"tensor `{NAME}`: its shape and offsets"),
    "shape huge": (set_entry("shape", [2**40, 2**40]), f"tensor `{NAME}`: shape .* needs"),
    "offsets swapped": (set_entry("data_offsets", [64, 0]), f"tensor `{NAME}`: it would lie at"),
    "offsets beyond": (set_entry("data_offsets", [0, 2**50]), f"tensor `{NAME}`: it would lie at"),
    "offsets missing": (
        header(lambda h: h[NAME].pop("data_offsets")),
        f"tensor `{NAME}`: its shape and offsets",
    ),
    "entry a number": (header(lambda h: h.update({NAME: 1})), f"tensor `{NAME}`: unknown dtype"),
    "one over another": (
        header(lambda h: h.update({"x": h[NAME]})),
        "it lies over another tensor",
    ),
    # Tensors
    "missing": (tensors(lambda t: t.pop(NAME)), f"tensor `{NAME}` is missing"),
    "missing head": (
        tensors(lambda t: t.pop("lm_head.weight")),
        "tensor `lm_head.weight` is missing",
    ),
    "wrong shape": (
        tensors(lambda t: t.update({NAME: t[NAME][:90]})),
        rf"tensor `{NAME}`: it must have shape \(96, 64\) by config.json; got \(90, 64\)",
    ),
    "transposed": (
        tensors(lambda t: t.update({NAME: np.ascontiguousarray(t[NAME].T)})),
        rf"tensor `{NAME}`: it must have shape \(96, 64\)",
    ),
    "integers": (
        tensors(lambda t: t.update({NAME: t[NAME].astype(np.int32)})),
        f"tensor `{NAME}`: it must be of floating point; got int32",
    ),
    "unknown tensor": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.lora": t[NAME]})),
        "tensor `model.layers.0.self_attn.q_proj.lora`: the family 'qwen3' has no place",
    ),
    "layer too many": (config(num_hidden_layers=2), "tensor `model.layers.2.*no place for it"),
    "layer too few": (config(num_hidden_layers=4), "tensor `model.layers.3.* is missing"),
    # Configurations
    "unknown family": (
        config(architectures=["GPT2LMHeadModel"]),
        "config.json: `architectures` must hold one of LlamaForCausalLM",
    ),
    "no family": (config(architectures=...), "`architectures` must hold one of"),
    "another family": (config(architectures=["LlamaForCausalLM"]), "'llama' has no place for it"),
    "no size": (config(hidden_size=...), "`hidden_size` must be an integer, at least 1; got None"),
    "size of text": (config(hidden_size="64"), "`hidden_size` must be an integer"),
    "size negative": (config(vocab_size=-1), "`vocab_size` must be an integer, at least 1; got -1"),
    "size huge": (config(num_hidden_layers=2**40), "`num_hidden_layers` must be an integer"),
    "another size": (config(vocab_size=321), "tensor `model.embed_tokens.weight`: it must have"),
    "epsilon": (config(rms_norm_eps=None, rope_theta="x"), "`rope_theta` must be a number"),
    "heads": (config(num_key_value_heads=3), "`num_kv_heads` must divide"),
    "rope": (config(rope_scaling={"rope_type": "dynamic"}), "`rope_type` must be default or"),
    "rope factor": (config(rope_scaling={"type": "linear"}), "`factor` must be a number; got None"),
    "dtype": (config(torch_dtype="int8"), "`dtype` must be float32 or bfloat16 or float16"),
    "activation": (config(hidden_act="gelu"), "`hidden_act` must be 'silu'; got 'gelu'"),
    "depths of nothing": (config(num_mtp_layers=1), "tensor `mtp.* is missing"),
    "many layers": (
        config(num_hidden_layers=20_000),
        "`num_hidden_layers` must be at most 36, the number of tensors; got 20000",
    ),
    "many depths": (config(num_mtp_layers=10**6), "`num_mtp_layers` must be at most 36"),
    "window": (
        config(
            architectures=["LlamaForCausalLM"],
            layer_types=["sliding_attention"] * 3,
            sliding_window=4,
        ),
        "`use_sliding_window` must be false in this family",
    ),
    "partial rotary": (config(partial_rotary_factor=0.5), "`partial_rotary_factor` must be 1 in"),
    "rotary too large": (config(partial_rotary_factor=2), "`partial_rotary_factor` must be above"),
    "rope nested": (
        config(rope_scaling=None, rope_parameters={"full_attention": {"rope_theta": 5.0}}),
        "`rope_scaling` must be an object of numbers and names",
    ),
    "rope a list": (config(rope_scaling={"rope_type": []}), "`rope_type` must be default or"),
    "theta negative": (config(rope_theta=-1), "config.json: `theta` must be above 0"),
    "epsilon negative": (config(rms_norm_eps=-1), "config.json: `epsilon` must be at least 0"),
    "output bias of one layer": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.zeros(64, "f4")})),
        "tensor `model.layers.1.self_attn.o_proj.bias` is missing",
    ),
    "feed-forward bias": (
        tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": np.zeros(96, "f4")})),
        "`mlp_bias` must be false: only attention has biases here; got None",
    ),
    "hints": (
        config(architectures=["Qwen3ForCausalLM"], num_mtp_layers=1, equinox_mtp={"x": 1}),
        "config.json: .*'x'",
    ),
    "compute dtype": (
        config(equinox_mtp={"compute_dtype": ["int8"]}),
        r"`equinox_mtp.compute_dtype` must be float32 or bfloat16; got \['int8'\]",
    ),
    "a name in two lines": (
        tensors(lambda t: t.update({"a\nb": t[NAME]})),
        r"tensor `a\\nb`: the family",
    ),
    "a header's name twice": (
        content(lambda b: _repeated(b)),
        "its header is no JSON object",
    ),
    "a gap": (header(lambda h: h.pop(NAME)), "it leaves a gap before it"),
    "long file name": (
        in_shards(lambda files, f: files.update({NAME: "x" * 300})),
        "which is no file of this folder",
    ),
    # Indices
    "missing shard": (
        in_shards(lambda files, f: (f / "model-2.safetensors").unlink()),
        "model-2.safetensors is missing",
    ),
    "index lies": (
        in_shards(lambda files, f: files.update({"x": "model-1.safetensors"})),
        "tensor `x` is not in model-1.safetensors",
    ),
    "index leaves out": (
        in_shards(lambda files, f: files.pop(NAME)),
        f"tensor `{NAME}` of model-.* is not listed",
    ),
    "path escapes": (
        in_shards(lambda files, f: files.update({NAME: "../secret.safetensors"})),
        "would be in '../secret.safetensors', which is no file of this folder",
    ),
    "absolute path": (
        in_shards(lambda files, f: files.update({NAME: "/etc/passwd"})),
        "would be in '/etc/passwd'",
    ),
    "parent": (in_shards(lambda files, f: files.update({NAME: ".."})), r"would be in '\.\.'"),
    "file a number": (in_shards(lambda files, f: files.update({NAME: 1})), "would be in '1'"),
    "empty index": (in_shards(lambda files, f: files.clear()), "it has no `weight_map`"),
    "shard a folder": (
        in_shards(
            lambda files, f: (
                (f / "model-2.safetensors").unlink(),
                (f / "model-2.safetensors").mkdir(),
            )
        ),
        "model-2.safetensors is missing, or no file",
    ),
    "twice": (
        lambda f: shutil.copy(f / "model.safetensors", f / "other.safetensors"),
        "is in model.safetensors, too, and there is no",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_is_not_right(name: str, tmp_path: Path) -> None:
    change, message = CASES[name]
    folder = changed("qwen3", tmp_path / "bad")
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load(folder, tokenizer=False)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400 + 2 * len(str(folder))


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    from equinox_mtp.pretrained._folder import CheckpointFolder

    for quantization, message in (
        ({"weight_block_size": [32]}, "has no `weight_block_size` of two numbers"),
        ({"weight_block_size": [64, 64]}, "blocks of 64 by 64 need scales"),
        ({"weight_block_size": [0, 32]}, "has no `weight_block_size` of two numbers"),
        ({"weight_block_size": ["a", 3]}, "has no `weight_block_size` of two numbers"),
        (None, "has no `weight_block_size`"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(FOLDER / "fp8", folder)
        config(quantization_config=quantization)(folder)
        with pytest.raises(ValueError, match=message):
            CheckpointFolder(folder).view("model.layers.3.self_attn.q_a_proj.weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_depths": 2}, "`key` must be given for the initial values of 2 fresh"),
        ({"num_depths": -1}, "`num_depths` must be at least 0"),
        ({"dtype": "int8"}, "`dtype` must be 'float32' or"),
        ({"compute_dtype": "float16"}, "`compute_dtype` must be 'float32' or 'bfloat16'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained.load(FOLDER / "qwen3", tokenizer=False, **arguments)


@pytest.mark.parametrize("function", [pretrained.load, pretrained.save])
def test_help_shows_no_tables(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    names = ("llama", "qwen2", "qwen3", "ernie4_5", "mimo", "qwen3_moe", "glm4_moe")
    names += ("deepseek_v3", "bailing_moe_v2", "exaone_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next")
    families = f"({', '.join(f'Family({name!r})' for name in names)})"
    assert repr(parameters["families"].default) == families
    if "rules" in parameters:
        rules = parameters["rules"].default
        assert repr(rules) == "DEFAULT_RULES"
        # Other rules show what they are.
        assert "'vocab': None" in repr(rules.replace(vocab=None))


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`folder`: there is no folder"):
        pretrained.load(tmp_path / "no")
    shutil.copytree(FOLDER / "fastmtp", tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match=r"`verifier` must be given: .*'qwen3' is not"):
        pretrained.load(tmp_path / "alone")
    model, _ = pretrained.load(tmp_path / "alone", verifier=FOLDER / "qwen3", tokenizer=False)
    assert model.block.config.num_depths == 3


def test_nothing_is_read_of_a_folder_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equinox_mtp.pretrained import _read

    def read(shape: Any, dtype: Any) -> Any:
        raise AssertionError("something was read")

    monkeypatch.setattr(_read, "_aligned_empty", read)
    name = "model.mtp_layers.0.input_proj.weight"
    missing = changed("mimo", tmp_path / "missing", tensors=lambda t: t.pop(name))
    unknown = changed("mimo", tmp_path / "unknown", tensors=lambda t: t.update(x=t[name]))
    for folder in (missing, unknown):
        with pytest.raises(ValueError, match=r"is missing|has no place for it"):
            pretrained.load(folder)


def test_numbers_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    def spoil(stored: dict[str, np.ndarray]) -> None:
        stored[NAME][3, 4] = np.nan
        stored["model.norm.weight"][0] = np.inf

    folder = changed("qwen3", tmp_path / "nan", tensors=spoil)
    with pytest.warns(UserWarning, match=r"2 tensor\(s\) hold numbers that are not finite") as said:
        model, _ = pretrained.load(folder, tokenizer=False)  # this line
    assert NAME in str(said[0].message)
    assert said[0].filename == __file__
    assert Path(__file__).read_text().splitlines()[said[0].lineno - 1].endswith("# this line")
    up: Any = model.decoder.layers.feed_forward.up  # type: ignore[attr-defined]
    assert np.isnan(up.kernel[1, 4, 3])
    with warnings.catch_warnings(action="error"):
        pretrained.load(FOLDER / "qwen3", tokenizer=False)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    folder = changed("qwen3", tmp_path / "bad")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: it cannot be read"):
        pretrained.load(folder)


def test_the_tokenizers_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[hf\]'"):
        pretrained.load(FOLDER / "qwen3")
    assert pretrained.load(FOLDER / "qwen3", tokenizer=False)[1] is None


# Memory and devices

LARGE = """
    import json, resource, sys
    import jax, jax.numpy as jnp, numpy as np
    from equinox_mtp import pretrained

    def peak():  # of this process, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    pretrained.load(small, tokenizer=False, **options)  # what everything else takes
    before = peak()
    model, _ = pretrained.load(large, tokenizer=False, **options)
    leaves = [x for x in jax.tree.leaves(model) if hasattr(x, "nbytes")]
    print(json.dumps([peak() - before, sum(x.nbytes for x in leaves)]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a GiB in three shards, the embedding a large part of it."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 60_000}
    config = {**config_of(FOLDER / "llama3"), **sizes, "num_hidden_layers": 16}
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    matrix = {"q": (512, 512), "k": (512, 512), "v": (512, 512), "o": (512, 512)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (60_000, 512),
        "lm_head.weight": (60_000, 512),
    }
    shapes["model.norm.weight"] = (512,)
    for layer in range(16):
        start = f"model.layers.{layer}"
        for name, shape in matrix.items():
            shapes[f"{start}.self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", (2048, 512)), ("up", (2048, 512)), ("down", (512, 2048))):
            shapes[f"{start}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{start}.{name}.weight"] = (512,)
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(shapes)}
    for file in set(files.values()):
        ones = {n: np.full(shapes[n], 0.5, np.float32) for n in shapes if files[n] == file}
        save_file(ones, folder / file)
    index = {"weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_memory_at_the_peak(dtype: str | None, large: Path) -> None:
    """Also for weights that are cast while they are read: the stored ones are never all there."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", textwrap.dedent(LARGE), str(FOLDER / "llama3"), str(large)]
    done = subprocess.run(
        [*command, json.dumps({"dtype": dtype})],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    peak, parameters = json.loads(done.stdout)
    assert parameters > 200_000_000
    assert peak <= 1.15 * parameters, peak / parameters


def test_weights_go_straight_to_their_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece that is read is a whole matrix that is to be split."""
    from equinox_mtp.pretrained import _read
    from equinox_mtp.sharding import DEFAULT_RULES, make_mesh, parameter_shardings

    mesh = make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    sizes = []
    real = _read._aligned_empty

    def counted(shape: Any, dtype: Any) -> Any:
        sizes.append(int(np.prod(shape)))
        return real(shape, dtype)

    monkeypatch.setattr(_read, "_aligned_empty", counted)
    model, _ = pretrained.load(FOLDER / "mimo", mesh=mesh)
    whole, _ = pretrained.load(FOLDER / "mimo")
    arrays, same = (jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (model, whole))
    wanted = jax.tree.leaves(parameter_shardings(model, mesh, DEFAULT_RULES))
    for x, y, sharding in zip(arrays, same, wanted, strict=True):
        assert x.sharding == sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    # Every number once, and matrices in pieces: read for the mesh, and then for one device.
    total = sum(x.size for x in arrays)
    assert sum(sizes) == 2 * total
    assert len(sizes) > 3 * len(arrays)


def test_fresh_depths_are_made_in_their_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same values as on one device; no matrix is on one device first."""
    from equinox_mtp.sharding import DEFAULT_RULES, make_mesh, parameter_shardings

    mesh = make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    options: Any = {"num_depths": 2, "key": jax.random.key(0), "dtype": "bfloat16"}
    whole, _ = pretrained.load(FOLDER / "mimo", **options)
    moved = []
    real = jax.device_put

    def counted(x: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(x.size)
        return real(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", counted)
    model, _ = pretrained.load(FOLDER / "mimo", **options, mesh=mesh)
    assert moved == [1]  # the key
    arrays, same = (jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (model, whole))
    wanted = jax.tree.leaves(parameter_shardings(model, mesh, DEFAULT_RULES))
    for x, y, sharding in zip(arrays, same, wanted, strict=True):
        assert x.sharding == sharding
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
        assert x.ndim < 3 or not x.is_fully_replicated


def test_rules_may_name_parameters_of_the_depths_alone() -> None:
    from equinox_mtp.sharding import DEFAULT_RULES, make_mesh

    mesh = make_mesh({"data": 4, "tensor": 2})
    rules = DEFAULT_RULES.replace(parameters={"projection_layer.kernel": "_ vocab"})
    for options in ({}, {"num_depths": 1, "key": jax.random.key(0)}):
        model, _ = pretrained.load(FOLDER / "mimo", mesh=mesh, rules=rules, **options)
        kernel: Any = model.block.layers.projection_layer.kernel  # type: ignore[union-attr]
        assert kernel.sharding.shard_shape(kernel.shape) == (1, 128, 32)
