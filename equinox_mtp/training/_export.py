"""A trained model as a folder that other engines read: the `export` command."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from equinox_mtp import pretrained

from ._checkpoint import load_info
from ._config import TrainConfig
from ._load_model import load_model, newest_checkpoint
from ._text import TOKENIZER_FILE, keep_tokenizer

_TRANSFORMERS = "transformers 5.24 or newer: generate(use_mtp=True)"
_ENGINES = "transformers, vLLM and SGLang"
_WITH_FLAGS = "vLLM and SGLang, with the flags in equinox_mtp/pretrained/README.md"
_READERS = {
    "llama": _ENGINES,
    "llama3": _ENGINES,
    "qwen2": _ENGINES,
    "qwen3": _ENGINES,
    "mimo": _WITH_FLAGS,
    "deepseek_v3": _WITH_FLAGS,
    "bailing_moe_v2": "SGLang, with the flags in equinox_mtp/pretrained/README.md",
    "ernie4_5": _ENGINES,
    "exaone_moe": _WITH_FLAGS,
    "qwen3_moe": _ENGINES,
    "qwen3_5": _ENGINES,
    "qwen3_5_moe": _ENGINES,
    "qwen3_next": _ENGINES,
    "glm4_moe": _ENGINES,
    "transformers": _TRANSFORMERS,
    "speculators": "vLLM: vllm serve FOLDER",
    "stitched": _TRANSFORMERS,
}
_WITHOUT_MAIN_MODEL = ("speculators", "stitched")
_OF_DEPTHS = ("transformers", *_WITHOUT_MAIN_MODEL)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a trained model into a new folder, in a layout that other engines read.

    The depths must have been trained by conventions that the layout has: those of `train --preset
    fast_mtp` suit all layouts with depths, and those of `megatron` all but speculators of several.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run of `train`, or one of its checkpoints."""
    layout: str
    """transformers (main model and depths), stitched (depths beside links to the files of the
    released model), speculators (depths alone, for vLLM), or a family: llama, qwen2, qwen3, mimo,
    qwen3_moe, glm4_moe, deepseek_v3, bailing_moe_v2, ernie4_5, exaone_moe, qwen3_5, qwen3_5_moe,
    qwen3_next; or a folder, whose layout is taken."""
    out: Path
    """The folder to write; the name must be free."""
    model: Path | None = None
    """The folder of the released model that the run was trained over, if it has moved."""


def export_run(config: ExportConfig) -> None:
    """Writes the model of a run by `pretrained.save`, and prints what reads it.

    The `source` is the released model that the run was trained over, if it was. A tokenizer that
    the run keeps is copied otherwise.

    **Raises:** `FileNotFoundError` for a run or a released model that is not there; `ValueError`
    for a run that is damaged, or that the layout cannot hold; `FileExistsError` if `out` is not
    free; `OSError` if it cannot be written. Nothing is left of what was not written as a whole.
    """
    with _named_as_here():
        checkpoint = newest_checkpoint(config.run)
        trained = load_info(checkpoint).config
        _check_layout(config, trained)
        model, _ = load_model(checkpoint, model=config.model)
        source = config.model or trained.model
        # Of the head of a model the model's: its files are linked, its tokenizer is copied.
        source = None if source is None else pretrained.model_folder(source)
        pretrained.save(config.out, model, layout=config.layout, source=source)
    if source is None:
        _add_tokenizer(checkpoint.parent.parent, config.out)
    depths = f"with {trained.depths} prediction depth(s)"
    print(f"{config.out}: {config.run} {depths}, in the layout {config.layout!r}, {_for(config)}")


def _for(config: ExportConfig) -> str:
    """Who reads the folder, and how."""
    if config.layout not in _READERS:
        return f"for what reads {config.layout}"
    return f"for {_READERS[config.layout]}".replace("FOLDER", str(config.out))


def _add_tokenizer(run: Path, out: Path) -> None:
    """The one that a run of its own model keeps, if it read text by one."""
    if (run / TOKENIZER_FILE).is_file():
        try:
            keep_tokenizer(run, out)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise


def _check_layout(config: ExportConfig, trained: TrainConfig) -> None:
    """**Raises:** `ValueError` for a layout that is not of what the run has trained."""
    layout = config.layout
    if layout in _OF_DEPTHS and trained.depths == 0:
        raise ValueError(
            f"`layout` {layout!r} is of prediction depths, and {config.run} was trained without. "
            "Take that of its family, such as 'llama', 'qwen3' or 'deepseek_v3'."
        )
    if layout in _WITHOUT_MAIN_MODEL and not trained.freeze_model:
        raise ValueError(
            f"`layout` {layout!r} goes with a released model as it was, and {config.run} has "
            "trained its main model. Take 'transformers', or train with --model and --freeze-model."
        )


@contextlib.contextmanager
def _named_as_here() -> Iterator[None]:
    """Arguments have other names in errors of `load_model` and `save`."""
    try:
        yield
    except (FileExistsError, FileNotFoundError) as error:
        message = str(error).replace("`checkpoint`", "`run`").replace("`folder`", "`out`")
        raise type(error)(message) from None
