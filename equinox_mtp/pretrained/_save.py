"""From an `MTPModel` to a folder that others read."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .._checks import check_integer
from .._model import MTPModel
from .._types import checked
from ..nn import TransformerDecoder
from ._contents import Contents, contents_of
from ._folder import CONFIG_FILE, CheckpointFolder
from ._registry import FAMILIES
from ._tables import Family
from ._tokenizer import TOKENIZER_FILES
from ._write import new_folder, write_file, write_index, write_json, write_tensors

_ALIASES = {"llama3": "llama"}
_OTHER_LAYOUTS = ("transformers", "speculators", "stitched")
_MTP_FILE = "mtp.safetensors"
# What the other parts of a model read, if these are copied.
_PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")


@checked
def save(
    folder: str | Path,
    model: MTPModel,
    *,
    layout: str | Path | None = None,
    source: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes a model into a new folder, in a layout that other engines read.

    | layout | what is written | read by |
    |---|---|---|
    | a folder, or `None` with `source` | as it came from there | what read that |
    | `"llama"`, `"qwen2"`, `"qwen3"` | the main model | transformers, vLLM, SGLang |
    | `"qwen3_moe"` | the main model | transformers, vLLM, SGLang |
    | `"qwen3_5"`, `"qwen3_5_moe"` | main model and one depth | transformers, vLLM, SGLang |
    | `"qwen3_next"` | main model and one depth | transformers, vLLM, SGLang |
    | `"ernie4_5"` | the main model | transformers, vLLM, SGLang |
    | `"bailing_moe_v2"` | main model and depths | SGLang |
    | `"glm4_moe"` | main model and depths | transformers, vLLM, SGLang |
    | `"mimo"`, `"deepseek_v3"` | main model and depths | vLLM, SGLang |
    | `"exaone_moe"` | main model and one depth | vLLM, SGLang |
    | `"transformers"` | main model and depths (`num_mtp_layers`) | transformers |
    | `"speculators"` | one depth alone | speculators, vLLM |
    | `"stitched"` | the depths as `mtp.*` beside links to the files of `source` | transformers |

    `"stitched"` is for depths that were trained over a main model that stayed as it is in `source`.
    `"llama3"` is another name of `"llama"`.

        pretrained.save("out", model, layout="mimo", source="Qwen2-7B")

    >>> pretrained.save("out", main_model, layout="llama")
    >>> sorted(path.name for path in Path("out").iterdir())
    ['config.json', 'model.safetensors']

    `"speculators"` writes the absolute path of `source` into `config.json`, at
    `speculators_config.verifier.name_or_path`, as the model that the head is for (`"."` without a
    `source`). Put the model's name on the Hub there before you give the folder to others.

    The folder gets its name when all is in it. What a layout says in another way is rewritten
    exactly: the halves of the projection change places, a shared norm is copied, biases of 0 are
    added.

    **Arguments:**

    - `folder`: a name that is free, in a folder that exists.
    - `model`: with a `TransformerDecoder`.
    - `layout`: one of the above.
    - `source`: the folder that the model came from. Its tokenizer is copied, and of its
        `config.json` the special tokens and the longest text (4,096 tokens without a `source`);
        all of it if its layout is taken.
    - `max_shard_bytes`: files are at most of this size, or hold a single tensor.
    - `families`: the architectures that are known, as in `load`.

    **Raises:** `ValueError`, before anything is written, for a model that the layout cannot hold;
    `FileExistsError` if `folder` is not free; `OSError` if it cannot be written.
    """
    max_bytes = check_integer("max_shard_bytes", max_shard_bytes, at_least=1)
    if not isinstance(model.decoder, TransformerDecoder):
        raise ValueError(
            "`model` must have a `nn.TransformerDecoder` to be written in a released layout; got a "
            f"{type(model.decoder).__name__}. `equinox_mtp.save` writes any model."
        )
    named = {family.name: family for family in families}
    layout = _ALIASES.get(str(layout), layout)
    if layout not in (*_OTHER_LAYOUTS, *named):
        if layout is not None and not Path(layout).is_dir():
            known = ", ".join(map(repr, (*named, *_OTHER_LAYOUTS)))
            raise ValueError(f"`layout` must be {known}, or a folder; got {str(layout)!r:.80}.")
        source = layout if layout is not None else source
        if source is None:
            raise ValueError(
                "`layout` must be given, or `source`, the folder whose layout is to be taken."
            )
        layout = "source"
    origin = None if source is None else CheckpointFolder(Path(source))
    contents = contents_of(str(layout), model, origin, families)
    linked: list[str] = []
    if layout == "stitched":
        assert origin is not None
        _check_no_depths(origin, contents)
        linked = [*origin]
    contents.check(str(layout), linked)
    with new_folder(Path(folder)) as temporary:
        if layout == "stitched":
            assert origin is not None
            _link_files(temporary, origin, contents)
        else:
            write_tensors(temporary, contents.tensors, max_bytes)
        write_json(temporary / CONFIG_FILE, contents.config)
        if origin is not None:
            processor_files = _PROCESSOR_FILES if layout == "source" else ()
            for name in (*TOKENIZER_FILES, *processor_files):
                if (origin.path / name).is_file():
                    shutil.copyfile(origin.path / name, temporary / name)


def _link_files(temporary: Path, origin: CheckpointFolder, contents: Contents) -> None:
    """Links to the source's tensor files (copies on other disks), and one file more."""
    files = {name: origin.where_file(name) for name in origin}
    # Readers take a file of this name for the whole model, and look for no index.
    renamed = {"model.safetensors": "model-00001-of-00002.safetensors"}
    for file in sorted(set(files.values())):
        target = temporary / renamed.get(file, file)
        try:
            os.link((origin.path / file).resolve(), target)
        except OSError:
            shutil.copyfile(origin.path / file, target)
    write_file(temporary / _MTP_FILE, contents.tensors)
    files = {name: renamed.get(file, file) for name, file in files.items()}
    files |= {tensor.name: _MTP_FILE for tensor in contents.tensors}
    size = sum(origin.info(name).stop - origin.info(name).start for name in origin)
    write_index(temporary, files, size + sum(tensor.num_bytes for tensor in contents.tensors))


def _check_no_depths(origin: CheckpointFolder, contents: Contents) -> None:
    taken = {tensor.name for tensor in contents.tensors} & set(origin)
    files = {origin.where_file(name) for name in origin}
    if taken or _MTP_FILE in files:
        raise ValueError(
            f"{origin.path}: it has depths already, such as `{sorted(taken or [_MTP_FILE])[0]}`. "
            "Take the folder of the main model alone."
        )
