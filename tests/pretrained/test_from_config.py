"""Fresh models of released architectures."""

import math
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from checkpoints import FOLDER, config_of
from helpers import assert_equal

import equinox_mtp as emtp
from equinox_mtp import pretrained

NAMES = (
    *("llama3", "qwen3", "mimo", "qwen3_moe", "glm4_moe"),
    *("deepseek_v3", "qwen3_5", "qwen3_next"),
)


def fresh(config: Any, **options: Any) -> Any:
    return pretrained.from_config(config, key=jax.random.key(0), **options)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_those_of_the_folder(name: str) -> None:
    loaded: Any = pretrained.load(FOLDER / name, tokenizer=False)[0]
    num_depths = loaded.block.config.num_depths
    # Qwen3-Next does not say that it has one.
    options: dict[str, Any] = {"num_depths": num_depths} if name == "qwen3_next" else {}
    made = eqx.filter_eval_shape(lambda: fresh(FOLDER / name, **options))
    assert made.block.config.num_depths == num_depths
    shapes = [
        {
            jax.tree_util.keystr(path): x.shape
            for path, x in jax.tree.leaves_with_path(model)
            if hasattr(x, "shape")
        }
        for model in (made, loaded)
    ]
    assert shapes[0] == shapes[1]
    if not options:
        assert made.block.config == loaded.block.config
    assert made.decoder.dtype == loaded.decoder.dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_5"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    """What is made is written and read in the family's own layout."""
    made = eqx.filter_jit(fresh)(config_of(FOLDER / name))
    pretrained.save(tmp_path / "out", made, layout=name)
    loaded, _ = pretrained.load(tmp_path / "out", tokenizer=False)
    jax.tree.map(assert_equal, *(eqx.filter(x, eqx.is_array) for x in (loaded, made)))


def test_values() -> None:
    """Each matrix keeps a signal's scale, norms are neutral, and a loss is that of a guess."""
    config = config_of(FOLDER / "qwen3_5") | {"tie_word_embeddings": False}
    made: Any = fresh(config, num_depths=2)
    for rows in (made.decoder.embedding, made.decoder.head):
        np.testing.assert_allclose(np.std(rows), 1 / math.sqrt(rows.shape[1]), rtol=0.03)
    assert (
        np.abs(np.corrcoef(made.decoder.embedding.ravel(), made.decoder.head.ravel())[0, 1]) < 0.05
    )
    # Norms of this family store their scale less 1.
    np.testing.assert_array_equal(made.decoder.norm.scale, 0)
    np.testing.assert_array_equal(made.block.layers.embedding_norm.scale, 0)
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 9))
    output = eqx.filter_jit(made)(emtp.make_batch(tokens))
    guess = math.log(config["vocab_size"])
    assert abs(float(output.main.mean) - guess) < 1
    np.testing.assert_allclose(output.mtp.losses.mean, guess, atol=1)


def test_keys() -> None:
    config = config_of(FOLDER / "llama3")
    one, same = fresh(config), fresh(config)
    other: Any = pretrained.from_config(config, key=jax.random.key(1))
    jax.tree.map(assert_equal, *(eqx.filter(x, eqx.is_array) for x in (one, same)))
    assert not np.allclose(one.decoder.output_head(), other.decoder.output_head())


@pytest.mark.parametrize("num_depths", [0, 1, 3])
def test_depths(num_depths: int) -> None:
    made = eqx.filter_eval_shape(
        lambda: fresh(
            FOLDER / "deepseek_v3",
            num_depths=num_depths,
            preset="fast_mtp" if num_depths else None,
        )
    )
    wanted = emtp.MTPConfig(0) if not num_depths else emtp.MTPConfig.preset("fast_mtp", num_depths)
    assert made.block.config == wanted


def test_biases_are_as_the_configuration_says() -> None:
    config = config_of(FOLDER / "glm4_moe")
    for bias in (True, False):
        made: Any = eqx.filter_eval_shape(lambda: fresh(config | {"attention_bias": bias}))  # noqa: B023
        assert (made.decoder.layers[0].layers.attention.query_bias is not None) == bias


def test_head_is_another_matrix_unless_said() -> None:
    config = config_of(FOLDER / "llama3")
    config.pop("tie_word_embeddings", None)
    untied, tied = fresh(config).decoder, fresh(config | {"tie_word_embeddings": True}).decoder
    assert untied.head is not None
    assert tied.head is None


def test_compute_dtype() -> None:
    config = config_of(FOLDER / "llama3")
    made = fresh(config, compute_dtype="bfloat16")
    assert (made.decoder.dtype, made.decoder.embedding.dtype) == ("bfloat16", "float32")
    assert fresh(config | {"torch_dtype": "bfloat16"}).decoder.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Mamba"]}, "config.json: `architectures` must hold one of .*Mamba"),
        ({"hidden_size": None}, "config.json: `hidden_size` must be an integer, .*None"),
        ({"num_attention_heads": 3}, "config.json: .*`num_kv_heads`"),
    ],
)
def test_bad_configuration(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(config_of(FOLDER / "qwen3") | change)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no file {tmp_path}/config")):
        fresh(tmp_path)
    with pytest.raises(ValueError, match="`preset` is for fresh depths"):
        fresh(FOLDER / "qwen3", preset="fast_mtp")
    with pytest.raises(ValueError, match="`compute_dtype`"):
        fresh(FOLDER / "qwen3", compute_dtype="float16")
