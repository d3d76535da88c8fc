"""From the command line to `TrainConfig`, with its options in groups."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from ._config import TrainConfig, options
from ._options import GROUPS

_COMMON = "common"

_CONFIG = (
    "--config FILE|FOLDER starts from the options of an earlier run (its config.json, or its "
    "folder); options on this command line take precedence."
)


def parse_train_options(arguments: Sequence[str], default: TrainConfig) -> TrainConfig:
    """What the command line says; `default` where it says nothing.

    The help lists the common options first, and then each group of `TrainConfig`.

    **Raises:** `ValueError` for options that do not go together; `SystemExit` for an unknown option
    or `--help`.
    """
    parsed = tyro.cli(
        _grouped(default),
        prog="python -m equinox_mtp train",
        description=f"{_description()}\n\n{_CONFIG}",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    values = [getattr(parsed, field.name) for field in dataclasses.fields(parsed)]
    return TrainConfig(**{name: x for group in values for name, x in vars(group).items()})


def _description() -> str:
    """The docstring, up to its example."""
    return inspect.cleandoc(TrainConfig.__doc__ or "").partition("\n\n>>>")[0]


def _grouped(default: TrainConfig) -> type:
    """A dataclass of a dataclass for each group: tyro shows one panel for each."""
    types_of = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    groups: dict[str, list[tuple[str, Any, Any]]] = {name: [] for name in (_COMMON, *GROUPS)}
    for name, option in options().items():
        documented = Annotated[types_of[name], tyro.conf.arg(help=option.help)]
        field = (name, documented, dataclasses.field(default=getattr(default, name)))
        groups[_COMMON if option.is_common else option.group].append(field)
    fields = []
    for title, members in groups.items():
        name = title.replace(" ", "_")
        group = dataclasses.make_dataclass(name, members, frozen=True)
        group.__doc__ = None
        fields.append((name, group, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass("Options", fields, frozen=True)
