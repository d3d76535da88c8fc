"""A model of a released architecture with new parameters: a configuration without its weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .._block import MultiTokenPredictionBlock
from .._config import Preset
from .._model import MTPModel
from .._types import checked, module_of
from ._depths import check_options, fresh_config, own_depths
from ._folder import CONFIG_FILE, read_json
from ._registry import FAMILIES, family_of
from ._settings import Settings, errors_of
from ._shapes import make_block, make_decoder
from ._tables import Family


@checked
def from_config(
    config: str | Path | Mapping[str, Any],
    *,
    num_depths: int | None = None,
    preset: Preset | None = None,
    compute_dtype: str | None = None,
    families: Sequence[Family] = FAMILIES,
    key: PRNGKeyArray,
) -> MTPModel:
    """A fresh model of the architecture that a `config.json` describes, to be trained from scratch.

    It is the model that `load` would read from a folder of this configuration, with new values in
    it: matrices are drawn with the standard deviation of one over the square root of their inputs'
    number, and `save` writes it in the family's layout. Under `eqx.filter_eval_shape` nothing is
    allocated: so shapes, parameters and `flops_per_token` of a large model are known.

    >>> config = {
    ...     "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 64, "hidden_size": 16,
    ...     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    ...     "intermediate_size": 32, "moe_intermediate_size": 8, "num_experts": 8,
    ...     "num_experts_per_tok": 2,
    ... }
    >>> fresh = pretrained.from_config(config, num_depths=1, key=jax.random.key(0))
    >>> fresh.decoder.layers.feed_forward.experts.gate.shape  # layer, expert, embed, mlp
    (2, 8, 16, 8)

    **Arguments:**

    - `config`: the file, the folder that holds it, or what it holds. Keys that it leaves out have
        the defaults of the family's readers; embedding and head are two matrices unless
        `tie_word_embeddings` is true.
    - `num_depths`: how many prediction depths the model has. `None` takes the configuration's own
        number and its family's conventions.
    - `preset`: the conventions of depths, see `MTPConfig.preset`; `"deepseek_v3"` if `None`. It
        needs `num_depths`.
    - `compute_dtype`: float32 or bfloat16; parameters are float32. `None` follows the
        configuration, as `load` does.
    - `families`: see `load`.
    - `key`: for the initial values.

    **Raises:** `FileNotFoundError` if there is no such file; `ValueError`, in one line that names
    the file and the key, for a configuration that is not right or of an unknown family.
    """
    settings = _settings(config)
    family = family_of(settings, families, ())
    check_options(None, compute_dtype, preset, num_depths)
    names = _optional_tensors(settings, family)
    decoder_key, block_key = jax.random.split(key)
    with errors_of(settings):
        decoder = make_decoder(settings, family, names, compute_dtype, decoder_key)
        if num_depths is None:
            _, depths = own_depths(settings, family, names)
        else:
            depths = fresh_config(num_depths, preset, block_key)
        if not depths.num_depths:
            return MTPModel(
                decoder, module_of(MultiTokenPredictionBlock, config=depths, layers=None)
            )
        return MTPModel(decoder, make_block(settings, family, names, depths, block_key))


def _settings(config: str | Path | Mapping[str, Any]) -> Settings:
    if isinstance(config, Mapping):
        return Settings(dict(config), Path(CONFIG_FILE))
    path = Path(config)
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"`config`: there is no file {path}. Name a {CONFIG_FILE}, or the folder of one."
        )
    return Settings(read_json(path), path)


def _optional_tensors(settings: Settings, family: Family) -> set[str]:
    """The tensors by which layers would know of optional arrays, as the configuration has them."""
    names = {family.decoder["head"].name}
    if settings.flag("attention_bias", False):
        names.add("self_attn.q_proj.bias")
    return names
