"""The digest by which a run knows the model that its depths were trained over."""

import shutil
from pathlib import Path
from typing import Any

import checkpoints as released
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equinox_mtp import pretrained
from equinox_mtp.training._model_digest import model_digest

FOLDER = released.FOLDER / "qwen3"


def digest(folder: Path, **options: Any) -> str:
    return model_digest(pretrained.load(folder, tokenizer=False, **options)[0].decoder)


def test_digests_differ_in_one_bit(tmp_path: Path) -> None:
    assert digest(FOLDER) == digest(shutil.copytree(FOLDER, tmp_path / "moved"))
    # Runs remember it: another one would refuse them all.
    assert digest(FOLDER).startswith("6ce88726873d")
    assert digest(FOLDER) != digest(released.one_bit_changed(tmp_path / "changed"))
    assert digest(FOLDER) != digest(FOLDER, dtype="bfloat16")
    assert digest(FOLDER) != digest(FOLDER, compute_dtype="bfloat16")

    def swap(tensors: dict[str, np.ndarray]) -> None:
        weight = tensors["model.norm.weight"]
        weight[:2] = weight[1::-1].copy()
        assert weight[0] != weight[1]

    def turn(config: dict[str, Any]) -> None:
        config["rope_theta"] = 9999.0

    assert digest(FOLDER) != digest(released.changed("qwen3", tmp_path / "a", tensors=swap))
    assert digest(FOLDER) != digest(released.changed("qwen3", tmp_path / "b", config=turn))


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "float32"])
def test_digests_of_every_dtype(dtype: str) -> None:
    decoder: Any = pretrained.load(FOLDER, tokenizer=False)[0].decoder

    def of(x: Any) -> str:
        return model_digest(eqx.tree_at(lambda d: d.norm.scale, decoder, jnp.asarray(x, dtype)))

    assert of([1, 0, 0]) == of([1, 0, 0])
    assert len({of(x) for x in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [[1, 0, 0]])}) == 5


def test_digests_do_not_depend_on_devices() -> None:
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    assert digest(FOLDER) == digest(FOLDER, mesh=mesh)
