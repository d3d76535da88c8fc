"""The conventions in which implementations of Multi-Token Prediction differ, as typed data."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax

from ._checks import check_checkpoint_policy, check_choice, check_flag, check_integer

ConcatOrder: TypeAlias = Literal["embedding_first", "hidden_first"]
NormPlacement: TypeAlias = Literal["before_norm", "after_norm"]
OutputNorm: TypeAlias = Literal["shared", "own"]
Preset: TypeAlias = Literal["paper", "maxtext", "deepseek_v3", "megatron", "fast_mtp"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "concat_order": get_args(ConcatOrder),
    "input_hidden_state": get_args(NormPlacement),
    "carried_hidden_state": get_args(NormPlacement),
    "output_norm": get_args(OutputNorm),
}

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"concat_order": "hidden_first"},
    "maxtext": {},
    "deepseek_v3": {"output_norm": "own", "input_hidden_state": "after_norm"},
    "megatron": {
        "output_norm": "own",
        "input_hidden_state": "after_norm",
        "carried_hidden_state": "after_norm",
    },
    "fast_mtp": {
        "concat_order": "hidden_first",
        "output_norm": "own",
        "input_hidden_state": "after_norm",
        "carried_hidden_state": "after_norm",
        "repeated_layer": True,
    },
}


ATTENDED, PROJECTED = "attended", "projected"
"""The checkpoint names of what attention, and a depth's projection, gave."""
_SAVE_THESE = jax.checkpoint_policies.save_only_these_names(ATTENDED, PROJECTED)


def _keep_small(*args: Any, **kwargs: Any) -> Any:
    return _SAVE_THESE(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """The number of depths, and the conventions of a Multi-Token Prediction block.

    | field | paper | MaxText | DeepSeek-V3 weights | Megatron | FastMTP |
    |---|---|---|---|---|---|
    | `concat_order` | hidden first | embedding first | embedding first | embedding first | hidden first |
    | `input_hidden_state` | not said | before norm | after norm | after norm | after norm |
    | `carried_hidden_state` | before norm | before norm | before norm | after norm | after norm |
    | `output_norm` | not said | shared | own | own | own |
    | `repeated_layer` | no | no | no (D = 1) | optional | yes |
    | `stop_gradient_…` | not said | no | weights do not tell | no | MTP layer alone |

    Sources: DeepSeek-V3 (arXiv 2412.19437, §2.2); MaxText's `multi_token_prediction`; the released
    DeepSeek-V3 weights as vLLM runs them; Megatron-LM's `multi_token_prediction`; FastMTP (arXiv
    2509.18362) on MiMo-7B. Where the paper is silent its preset takes MaxText's choice. The defaults
    are MaxText's, which no released checkpoint follows: `pretrained.load` takes the conventions of
    its family.

    >>> config = emtp.MTPConfig(num_depths=2, output_norm="own")
    >>> config.concat_order
    'embedding_first'

    **Fields:**

    - `num_depths`: the number of prediction depths D. 0 is legal: a block that does nothing.
    - `concat_order`: the order in which normalised embedding and hidden state enter the projection.
    - `input_hidden_state`: whether the main model's hidden state enters depth 1 before or after its
        final norm. The block is always given the one before, and applies the norm itself.
    - `carried_hidden_state`: whether a depth passes its hidden state on before or after the norm
        that precedes the head.
    - `output_norm`: the norm before the head: the main model's (`"shared"`), or one of each MTP
        layer (`"own"`).
    - `repeated_layer`: one layer at every depth, instead of D layers.
    - `stop_gradient_hidden`: no MTP gradient into the main model's hidden states.
    - `stop_gradient_embedding`: no MTP gradient into the embedding.
    - `stop_gradient_head`: no MTP gradient into the output head and the main model's final norm.
    - `checkpoint_policy`: what a depth's layer keeps for the backward pass, as in `jax.checkpoint`.
        By default its input and what projection and attention gave: two arrays of the input's size
        that take much time to compute. (Of attention by tiles, or by a TPU's kernel; the others
        run again.) The rest is recomputed. `None` keeps the input alone; a
        function of `jax.checkpoint_policies` trades memory for time.

    **Raises:** `ValueError` for a value or a combination that makes no sense.
    """  # noqa: E501

    num_depths: int = 1
    concat_order: ConcatOrder = "embedding_first"
    input_hidden_state: NormPlacement = "before_norm"
    carried_hidden_state: NormPlacement = "before_norm"
    output_norm: OutputNorm = "shared"
    repeated_layer: bool = False
    stop_gradient_hidden: bool = False
    stop_gradient_embedding: bool = False
    stop_gradient_head: bool = False
    checkpoint_policy: Callable[..., Any] | None = _keep_small

    def __post_init__(self) -> None:
        num_depths = check_integer("num_depths", self.num_depths, at_least=0)
        object.__setattr__(self, "num_depths", num_depths)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                value = check_flag(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)
        check_checkpoint_policy(self.checkpoint_policy)
        if self.repeated_layer and self.num_depths == 0:
            raise ValueError(
                "`repeated_layer=True` needs at least one depth to repeat the layer at; got "
                "`num_depths=0`. Set `repeated_layer=False`, or `num_depths` to 1 or more."
            )

    @classmethod
    def preset(cls, name: Preset, num_depths: int = 1, **overrides: Any) -> "MTPConfig":
        """The conventions of a known implementation: a column of the table above.

        >>> emtp.MTPConfig.preset("fast_mtp", num_depths=3).repeated_layer
        True

        **Arguments:**

        - `name`: `"paper"`, `"maxtext"`, `"deepseek_v3"`, `"megatron"` or `"fast_mtp"`.
        - `num_depths`: the number of prediction depths D.
        - `overrides`: fields to set otherwise than the preset does.

        **Raises:** `ValueError` if there is no such preset.
        """
        if name not in _PRESETS:
            known = ", ".join(repr(preset) for preset in _PRESETS)
            raise ValueError(f"`name` must be one of the presets {known}; got {name!r}.")
        return cls(num_depths, **{**_PRESETS[name], **overrides})
