"""What the options of a run must agree on with one another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._options import USUAL_TEMPERATURE, check_finite, shorten


def check_options(config: Any, sizes: Mapping[str, Any]) -> None:
    """**Raises:** `ValueError` for options that do not go together.

    `sizes` are the defaults of those that a released model or an architecture decides.
    """
    _check_processes(config)
    _check_model(config, sizes)
    _check_depths(config)
    _check_own_texts(config)
    _check_hidden_states(config)
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"`accumulate` must divide `batch_size`, so that all microbatches are alike; got "
            f"{config.accumulate} and {config.batch_size}."
        )


def _check_processes(config: Any) -> None:
    bare = {"coordinator", "num_processes", "process_id"}
    given = {name for name in bare if getattr(config, name) is not None}
    if given and (given != bare or not config.distributed):
        raise ValueError(
            "`coordinator`, `num_processes` and `process_id` go together, with `distributed`; "
            f"got {', '.join(sorted(given))}. On a cluster that JAX knows --distributed is "
            "enough."
        )
    if config.num_processes is not None and not (config.process_id or 0) < config.num_processes:
        raise ValueError(
            f"`process_id` must be less than `num_processes`, which is {config.num_processes}; "
            f"got {config.process_id}. The first is 0."
        )


def _check_model(config: Any, sizes: Mapping[str, Any]) -> None:
    if config.model is not None and config.architecture is not None:
        raise ValueError(
            f"`architecture` is of a model from scratch; got {config.architecture}, and the "
            f"released `model` {config.model}. Leave one of them out."
        )
    if config.model is not None or config.architecture is not None:
        source = "released `model`" if config.architecture is None else "`architecture`"
        given = [name for name, default in sizes.items() if getattr(config, name) != default]
        if given:
            raise ValueError(
                f"`{given[0]}` is that of the {source}; got "
                f"{getattr(config, given[0])!r}. Leave it out."
            )
    if config.freeze_model and (config.model is None or config.depths == 0):
        raise ValueError(
            "`freeze_model` trains the prediction depths of a released model; got "
            f"`model={config.model}` and `depths={config.depths}`. Name its folder with --model, "
            "and ask for one depth or more."
        )


def _check_depths(config: Any) -> None:
    if config.objective != "cross_entropy" and config.depths == 0:
        raise ValueError(
            f"`objective` {config.objective!r} is of the prediction depths; got `depths=0`. Ask "
            "for one or more."
        )
    if config.draft_vocab is not None and config.objective == "cross_entropy":
        raise ValueError(
            "`draft_vocab` is of an objective on drafts; got `objective` 'cross_entropy', which is "
            "of all ids. Take 'hybrid', for instance, or leave it out."
        )
    if config.seq_len <= config.depths:
        raise ValueError(
            f"`seq_len` must be more than `depths`, or the last depth has nothing to predict; "
            f"got {config.seq_len} and {config.depths}. Take longer rows, or fewer depths."
        )
    if config.initial_depths == "trunk" and (config.model is None or config.depths == 0):
        raise ValueError(
            "`initial_depths` 'trunk' is of prediction depths over a released model; got "
            f"`model={config.model}` and `depths={config.depths}`. Name its folder with --model, "
            "or leave it out."
        )
    if config.initial_depths == "trunk" and config.distributed:
        raise ValueError(
            "`initial_depths` 'trunk' fits the depths in one process; got `distributed`. Train one "
            "step in a process of its own, and go on in all with --resume; or leave it out."
        )
    if config.curriculum != "none" and config.freeze_model:
        raise ValueError(
            f"`curriculum` {config.curriculum!r} leaves the main model to train alone for a part "
            "of the steps, and with `freeze_model` nothing of it trains. Leave one of them out."
        )


def _check_own_texts(config: Any) -> None:
    temperature = config.self_generate_temperature
    if config.self_generate is None and temperature != USUAL_TEMPERATURE:
        raise ValueError(
            f"`self_generate_temperature` is of the texts of `self_generate`; got {temperature:g} "
            "without it. Say with --self-generate how many there are, or leave it out."
        )
    if config.self_generate is not None and not config.freeze_model:
        raise ValueError(
            "`self_generate` takes the texts of a released model that stays as it is; got "
            f"`model={config.model}` and `freeze_model=False`. Name its folder with --model, and "
            "add --freeze-model."
        )


def _check_hidden_states(config: Any) -> None:
    if config.cache_hidden_states and not config.freeze_model:
        raise ValueError(
            "`cache_hidden_states` keeps what a frozen model makes of each row; got "
            "`freeze_model=False`. Freeze it with --freeze-model, or leave this out."
        )
    if config.cache_hidden_states and (config.mesh is not None or config.distributed):
        raise ValueError(
            "`cache_hidden_states` is for one device; got "
            f"`mesh={config.mesh}` and `distributed={config.distributed}`. Leave these out, or "
            "say --no-cache-hidden-states."
        )


def checked_scaling(values: Any) -> tuple[float, float]:
    if not isinstance(values, tuple) or len(values) != 2:
        raise ValueError(
            f"`mtp_scaling` must be a pair of numbers, λ before and after; got {shorten(values)}."
        )
    first, then = (check_finite("mtp_scaling", value, at_least=0) for value in values)
    return first, then


def check_paths(data: Any, **others: Any) -> None:
    if not isinstance(data, tuple) or not all(isinstance(path, Path) for path in data):
        raise ValueError(
            f"`data` must be a tuple of `pathlib.Path`s; got {shorten(data)}. For a single file "
            "write (Path(name),)."
        )
    for name, path in others.items():
        if not (path is None or isinstance(path, Path)):
            raise ValueError(f"`{name}` must be a `pathlib.Path`, or `None`; got {shorten(path)}.")
