"""From a checkpoint folder to an `MTPModel`."""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PRNGKeyArray

from .._block import MultiTokenPredictionBlock
from .._config import Preset
from .._model import MTPModel
from .._types import checked, module_of, warn_caller
from ..sharding import DEFAULT_RULES, ShardingRules, parameter_shardings
from ._array_place import Place
from ._depths import (
    check_options,
    copied_tensors,
    depth_prefixes,
    fresh_block,
    fresh_config,
    made_there,
    own_depths,
)
from ._folder import CONFIG_FILE, CheckpointFolder
from ._places import Layout
from ._read import Reader
from ._registry import FAMILIES, family_of
from ._settings import Settings, errors_of
from ._shapes import check_same, decoder_shapes, depth_shapes
from ._speculators import HEAD_KIND_KEY, depths_of_head, head_table, verifier_folder
from ._tables import Family
from ._tokenizer import load_tokenizer
from ._transformers import COUNT_KEY


@checked
def load(
    folder: str | Path,
    *,
    num_depths: int | None = None,
    preset: Preset | None = None,
    key: PRNGKeyArray | None = None,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    verifier: str | Path | None = None,
    tokenizer: bool = True,
    families: Sequence[Family] = FAMILIES,
) -> tuple[MTPModel, Any]:
    """Reads a released model: `config.json`, `*.safetensors` and `tokenizer.json` of a folder.

    Llama 3, Qwen2, Qwen3, Qwen3-MoE, Qwen3.5 (dense, with experts, and the text of both with
    vision), Qwen3-Next, GLM-4.5, DeepSeek-V3 and MiMo-7B, by their names alone ERNIE-4.5
    (dense), Ling 2 and K-EXAONE, and FastMTP heads in the format of speculators, over the folder of
    the model that they were made for. The prediction depths are those of the folder, or fresh ones.

        model, tokenizer = pretrained.load("MiMo-7B")  # with its own depth
        model, tokenizer = pretrained.load("Qwen3-0.6B", num_depths=3, preset="fast_mtp", key=key)

    >>> loaded, tokenizer = pretrained.load(folder, num_depths=2, key=jax.random.key(0))
    >>> loaded.block.config.num_depths, tokenizer
    (2, None)

    Weights are read from a memory map, a piece at a time, and go straight to their devices: beside
    the parameters less than a tenth of their memory is taken. Weights of 8 bits with scales of
    blocks are dequantized. Numbers that are not finite are kept, and reported by a warning.

    **Arguments:**

    - `folder`: the checkpoint; or one with a FastMTP head alone.
    - `num_depths`: fresh prediction depths in place of the folder's own; 0 for none. `None` takes
        the folder's, which are none for most models. Of a FastMTP head it is how often its own
        layer is repeated, unless `preset` asks for fresh ones.
    - `preset`: the conventions of fresh depths, see `MTPConfig.preset`; `"deepseek_v3"` if `None`.
        It needs `num_depths`.
    - `key`: for the initial values of fresh depths.
    - `dtype`: of the parameters; as they are stored if `None`. Fresh depths are float32 then. Train
        in float32 or bfloat16: optax keeps Adam's moments in the dtype of the parameters, and in
        float16 its epsilon of 1e-8 is 0, as are small squares, so that updates are not finite.
    - `compute_dtype`: float32 or bfloat16. `None` takes what `save` noted, and otherwise follows
        the configuration: bfloat16 if parameters are stored so, float32 if not.
    - `mesh`, `rules`: where parameters go; everything on one device without a mesh.
    - `verifier`: the folder of a FastMTP head's model; `None` looks for the one that it names.
    - `tokenizer`: whether to read the tokenizer, which needs the extra `hf`.
    - `families`: the architectures that are known; `(mine, *pretrained.FAMILIES)` adds one.

    **Returns:** the model, and a `tokenizers.Tokenizer`, or `None` where the folder has none.

    **Raises:** `FileNotFoundError` if there is no such folder; `ValueError`, in one line that names
    the file and the tensor, for a folder that is damaged, of an unknown family, or not what its
    configuration says, before anything is allocated.
    """
    check_options(dtype, compute_dtype, preset, num_depths)
    checkpoint, head_folder = _open_folders(folder, verifier)
    compute_dtype = _compute_dtype(compute_dtype, head_folder)
    settings = Settings(checkpoint.config, checkpoint.path / CONFIG_FILE)
    family = family_of(settings, families, checkpoint)
    _check_counts(settings, family, checkpoint)
    with errors_of(settings):
        decoder = decoder_shapes(settings, family, checkpoint, compute_dtype)
    stored, config = own_depths(settings, family, checkpoint)
    own = stored if config.num_depths else None
    is_fresh = num_depths is not None and (head_folder is None or num_depths == 0)
    if is_fresh or preset is not None:
        own, config = None, fresh_config(num_depths, preset, key)
    elif head_folder is not None:
        own, config = head_table(), depths_of_head(head_folder, num_depths)
    layout = Layout(family, own, checkpoint)
    parts = [_Part(checkpoint, decoder, layout.decoder_places(decoder))]
    if own is not None:
        source = head_folder or checkpoint
        with errors_of(settings):
            layers = depth_shapes(settings, family, source, config)
        parts.append(_Part(source, layers, layout.block_places(layers, decoder.num_layers)))
    left_out = [] if own is stored else depth_prefixes(settings, stored, checkpoint)
    copies = copied_tensors(settings, family, stored, checkpoint) if own is stored else {}
    _check_all_used(parts, family, left_out, copies)
    readers = [Reader(part.folder, dtype, settings.dtype) for part in parts]
    for part, reader in zip(parts, readers, strict=True):
        for place in part.places:
            reader.check(place)
    for copy, of in copies.items():
        check_same(checkpoint, of, copy, "and depths have no embedding or head of their own here.")
    make = partial(fresh_block, settings, family, checkpoint, config, dtype)
    is_made = own is None and config.num_depths > 0
    layers = parts[1].shapes if own is not None else None
    block = module_of(MultiTokenPredictionBlock, config=config, layers=layers)
    block = eqx.filter_eval_shape(make, key) if is_made else block
    shardings = _shardings(MTPModel(decoder, block), mesh, rules)
    # Nothing is allocated before all is known to fit.
    decoder = _fill(parts[0], readers[0], shardings.decoder)
    if own is not None:
        layers = _fill(parts[1], readers[1], shardings.block.layers)
        block = module_of(MultiTokenPredictionBlock, config=config, layers=layers)
    elif is_made:
        block = made_there(make, key, shardings.block)
    _report_not_finite(readers)
    return MTPModel(decoder, block), load_tokenizer(checkpoint.path) if tokenizer else None


def _open_folders(
    folder: str | Path, verifier: str | Path | None
) -> tuple[CheckpointFolder, CheckpointFolder | None]:
    """The main model's folder, and that of a FastMTP head over it, or `None`."""
    checkpoint = CheckpointFolder(Path(folder))
    if HEAD_KIND_KEY in checkpoint.config:
        where = verifier_folder(checkpoint.path, checkpoint.config, verifier)
        return CheckpointFolder(where), checkpoint
    if verifier is not None:
        raise ValueError(
            f"`verifier` is for the folder of a FastMTP head; got {str(verifier)!r} for "
            f"{str(folder)!r}, which holds a model. Leave it out."
        )
    return checkpoint, None


def _compute_dtype(compute_dtype: str | None, head_folder: CheckpointFolder | None) -> str | None:
    """The one that is asked for, or that a head notes; its model's own note comes after both."""
    if compute_dtype is None and head_folder is not None:
        head = Settings(head_folder.config, head_folder.path / CONFIG_FILE)
        return head.noted_compute_dtype
    return compute_dtype


class _Part(NamedTuple):
    """A decoder, or the layers of all depths: their shapes, and where their arrays are."""

    folder: CheckpointFolder
    shapes: Any
    places: list[Place]


def _shardings(model: MTPModel, mesh: Mesh | None, rules: ShardingRules) -> Any:
    """Where each array goes, in its place; `None` in place of anything else.

    Without a mesh it is the default device, and arrays are not committed to it: optimizer states
    are not, and a step of arrays of both kinds would be compiled again once all are committed.
    """
    if mesh is not None:
        return parameter_shardings(model, mesh, rules)
    (here,) = jnp.zeros(()).devices()  # the default one
    return jax.tree.map(
        lambda x: SingleDeviceSharding(here) if isinstance(x, jax.ShapeDtypeStruct) else None, model
    )


def _fill(part: _Part, reader: Reader, shardings: Any) -> Any:
    """The arrays in place of their shapes."""
    places = iter(part.places)

    def fill(x: Any, sharding: Any) -> Any:
        return x if sharding is None else reader.array(next(places), x.shape, sharding)

    return jax.tree.map(fill, part.shapes, shardings, is_leaf=lambda x: x is None)


def _report_not_finite(readers: Sequence[Reader]) -> None:
    found = [reader.folder.where(name) for reader in readers for name in sorted(reader.not_finite)]
    if found:
        warn_caller(f"{len(found)} tensor(s) hold numbers that are not finite, such as {found[0]}.")


def _check_counts(settings: Settings, family: Family, folder: CheckpointFolder) -> None:
    """**Raises:** `ValueError` for more layers than there are tensors: none is built for them."""
    mtp = family.mtp
    for key in ("num_hidden_layers", COUNT_KEY if mtp is None else mtp.count_key):
        count = settings.integer(key, 0, at_least=0)
        if count > len(folder):
            raise settings.error(key, f"at most {len(folder)}, the number of tensors", count)


def _check_all_used(
    parts: Sequence[_Part], family: Family, left_out: list[str], copies: Collection[str]
) -> None:
    """**Raises:** `ValueError` for a tensor that nothing is made of.

    Depths whose names begin like those `left_out` may be there, copies, and a head that is tied.
    """
    used = set(copies)
    used |= {name for part in parts for place in part.places for name in place.flat_names}
    used.add(family.decoder["head"].name)
    left_out = [*left_out, *family.other_parts]
    for folder in {id(part.folder): part.folder for part in parts}.values():
        for name in folder:
            is_ignored = name.endswith(tuple(family.ignored)) or name.startswith(tuple(left_out))
            if name not in used and not folder.is_scale(name) and not is_ignored:
                raise ValueError(
                    f"{folder.where(name)}: the family {family.name!r} has no place for it. Does "
                    "`architectures` name the right one?"
                )
