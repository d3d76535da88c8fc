"""ERNIE-4.5, of which there are no recorded numbers: its names, and Llama's with other pairs."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FOLDER, changed, config_of, reference, tensors_of
from golden import quick_jit
from safetensors.numpy import save_file

import equinox_mtp as emtp
from equinox_mtp import pretrained

NAME = "ernie4_5"


def as_ernie(target: Path, **changes: Any) -> Path:
    """The model `llama3` with the features that are rotated together made neighbours."""

    def config(config: dict[str, Any]) -> None:
        config.update(architectures=["Ernie4_5ForCausalLM"], model_type=NAME, use_bias=False)
        config.update(changes)

    def tensors(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight"))]:
            halves = tensors[name].reshape(-1, 2, 8, 64)  # heads, halves, pairs, inputs
            tensors[name] = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1, 64)

    return changed("llama3", target, config=config, tensors=tensors)


def load(folder: Path, **options: Any) -> emtp.MTPModel:
    return pretrained.load(folder, tokenizer=False, **options)[0]


def test_the_recorded_numbers_of_llama(tmp_path: Path) -> None:
    model, numbers = load(as_ernie(tmp_path / "in")), reference("llama3")
    tokens = jnp.asarray(numbers["tokens"][:, :16])

    @quick_jit
    def logits(decoder: Any) -> Any:
        hidden = decoder(tokens, position_ids=jnp.tile(jnp.arange(16), (2, 1)))
        return decoder.final_norm(hidden) @ decoder.output_head().T

    np.testing.assert_allclose(logits(model.decoder), numbers["logits"], rtol=0, atol=1e-4)
    assert model.block.config.num_depths == 0


def test_names_and_round_trips(tmp_path: Path) -> None:
    folder = as_ernie(tmp_path / "in")
    model, stored = load(folder), tensors_of(folder)
    pretrained.save(tmp_path / "out", model, layout=NAME)
    pretrained.save(tmp_path / "same", model, source=folder)
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(3):
        expected |= {
            f"model.layers.{layer}.{name}.weight"
            for name in (
                *("input_layernorm", "post_attention_layernorm"),
                *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            )
        }
    for out in ("out", "same"):
        written = tensors_of(tmp_path / out)
        assert set(written) == expected
        for name, x in stored.items():
            np.testing.assert_array_equal(written[name], x, strict=True)
        assert eqx.tree_equal(load(tmp_path / out), model)
    assert config_of(tmp_path / "same") == config_of(folder)
    described = config_of(tmp_path / "out")
    assert (described["model_type"], described["use_bias"]) == (NAME, False)


def test_what_cannot_be(tmp_path: Path) -> None:
    biased = as_ernie(tmp_path / "biased", use_bias=True)
    with pytest.raises(ValueError, match="`use_bias` must be false: there are no biases here"):
        load(biased)
    depth = {"model.mtp_emb_norm.0.weight": np.ones(64, np.float32)}
    folder = as_ernie(tmp_path / "depth")
    save_file({**tensors_of(folder), **depth}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mtp_emb_norm.0.weight`: the family 'ernie4_5' has no"):
        load(folder)
    llama = load(FOLDER / "llama3")
    with pytest.raises(ValueError, match=r"`attention.rotary` is Rotary.* interleaved=False"):
        pretrained.save(tmp_path / "out", llama, layout=NAME)
    ernie = load(as_ernie(tmp_path / "in"), num_depths=1, preset="megatron", key=jax.random.key(0))
    with pytest.raises(ValueError, match="`layout` 'ernie4_5' has no place for prediction depths"):
        pretrained.save(tmp_path / "out", ernie, layout=NAME)
    with pytest.raises(ValueError, match=r"`attention.rotary` is Rotary.* interleaved=True"):
        pretrained.save(tmp_path / "out", ernie, layout="transformers")
