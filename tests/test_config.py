import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from jaxtyping import TypeCheckError

from equinox_mtp import MTPConfig, _config

# What a user has who does not run under the import hook of the tests: the hook would stop wrong
# values before the class itself could say what is wrong with them.
_NAMESPACE: dict[str, Any] = {"__name__": _config.__name__, "__package__": "equinox_mtp"}
exec(compile(Path(_config.__file__).read_text(), _config.__file__, "exec"), _NAMESPACE)
UnhookedConfig = _NAMESPACE["MTPConfig"]

DEFAULTS = {
    "num_depths": 1,
    "concat_order": "embedding_first",
    "input_hidden_state": "before_norm",
    "carried_hidden_state": "before_norm",
    "output_norm": "shared",
    "repeated_layer": False,
    "stop_gradient_hidden": False,
    "stop_gradient_embedding": False,
    "stop_gradient_head": False,
    "checkpoint_policy": MTPConfig().checkpoint_policy,
}

PRESETS = {
    "paper": {"concat_order": "hidden_first"},
    "maxtext": {},
    "deepseek_v3": {"input_hidden_state": "after_norm", "output_norm": "own"},
    "megatron": {
        "input_hidden_state": "after_norm",
        "carried_hidden_state": "after_norm",
        "output_norm": "own",
    },
    "fast_mtp": {
        "concat_order": "hidden_first",
        "input_hidden_state": "after_norm",
        "carried_hidden_state": "after_norm",
        "output_norm": "own",
        "repeated_layer": True,
    },
}


def test_defaults() -> None:
    assert dataclasses.asdict(MTPConfig()) == DEFAULTS


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("num_depths", [1, 3])
def test_presets(name: Any, num_depths: int) -> None:
    expected = DEFAULTS | PRESETS[name] | {"num_depths": num_depths}
    assert dataclasses.asdict(MTPConfig.preset(name, num_depths)) == expected
    assert dataclasses.asdict(MTPConfig.preset(name, num_depths=num_depths)) == expected
    assert dataclasses.asdict(MTPConfig.preset(name)) == expected | {"num_depths": 1}


def test_overrides_win_over_the_preset() -> None:
    config = MTPConfig.preset("fast_mtp", 2, repeated_layer=False, stop_gradient_head=True)
    changed = {"num_depths": 2, "repeated_layer": False, "stop_gradient_head": True}
    assert dataclasses.asdict(config) == DEFAULTS | PRESETS["fast_mtp"] | changed
    # The table of presets is not what changed.
    assert MTPConfig.preset("fast_mtp").repeated_layer


def test_equal_configs_are_one_key() -> None:
    configs = [MTPConfig(2), MTPConfig.preset("maxtext", 2), MTPConfig.preset("paper", 2)]
    assert configs[0] == configs[1] != configs[2]
    assert hash(configs[0]) == hash(configs[1])
    assert len(set(configs)) == 2
    # A policy is a function, and equal to itself alone.
    policies = [jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.nothing_saveable]
    with_policies = [MTPConfig(2, checkpoint_policy=policy) for policy in (*policies, *policies)]
    assert len(set(with_policies)) == 2
    assert with_policies[0] == with_policies[2] != configs[0]


@pytest.mark.parametrize("field", DEFAULTS)
def test_fields_cannot_be_set(field: str) -> None:
    config = MTPConfig()
    with pytest.raises(dataclasses.FrozenInstanceError, match=field):
        setattr(config, field, DEFAULTS[field])


def test_no_depths_are_legal() -> None:
    assert MTPConfig(num_depths=0).num_depths == 0
    assert MTPConfig.preset("maxtext", 0) == MTPConfig(num_depths=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_depths": -1}, r"`num_depths` must be at least 0; got -1"),
        ({"num_depths": 1.0}, r"`num_depths` must be an integer at least 0; got 1\.0"),
        ({"num_depths": True}, r"`num_depths` must be an integer at least 0; got True"),
        ({"num_depths": "2"}, r"`num_depths` must be an integer at least 0; got '2'"),
        (
            {"concat_order": "embedding"},
            r"`concat_order` must be 'embedding_first' or 'hidden_first'; got 'embedding'",
        ),
        (
            {"input_hidden_state": "norm"},
            r"`input_hidden_state` must be 'before_norm' or 'after_norm'; got 'norm'",
        ),
        (
            {"carried_hidden_state": None},
            r"`carried_hidden_state` must be 'before_norm' or 'after_norm'; got None",
        ),
        ({"output_norm": "none"}, r"`output_norm` must be 'shared' or 'own'; got 'none'"),
        ({"checkpoint_policy": "dots"}, r"`checkpoint_policy` must be a function.*got 'dots'"),
        ({"checkpoint_policy": True}, r"`checkpoint_policy` must be a function.*got True"),
        (
            {"repeated_layer": True, "num_depths": 0},
            r"`repeated_layer=True` needs at least one depth.*`num_depths=0`",
        ),
    ],
)
def test_wrong_fields_raise(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnhookedConfig(**fields)
    # `dataclasses.replace` is how configs are changed: it checks as well.
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(UnhookedConfig(), **fields)
    with pytest.raises((ValueError, TypeCheckError)):
        MTPConfig(**fields)


@pytest.mark.parametrize("field", ["repeated_layer", "stop_gradient_hidden"])
def test_flags_are_booleans(field: str) -> None:
    wrong: dict[str, Any] = {field: "no"}
    with pytest.raises((ValueError, TypeCheckError), match=field):
        MTPConfig(**wrong)
    with pytest.raises(ValueError, match=f"`{field}` must be True or False; got 'no'"):
        UnhookedConfig(**wrong)


def test_unknown_preset_raises() -> None:
    with pytest.raises(ValueError, match=r"`name` must be one of .*'fast_mtp'; got 'gpt'"):
        UnhookedConfig.preset("gpt")
    unknown: Any = "gpt"
    assert unknown not in PRESETS
    with pytest.raises((ValueError, TypeCheckError), match="name"):
        MTPConfig.preset(unknown)


def test_unknown_override_raises() -> None:
    with pytest.raises(TypeError, match="concat_ordering"):
        MTPConfig.preset("paper", concat_ordering="hidden_first")


def test_flags_must_be_boolean() -> None:
    with pytest.raises((ValueError, TypeCheckError), match="repeated_layer"):
        MTPConfig(1, repeated_layer="no")  # type: ignore[arg-type]
