"""ERNIE-4.5, dense: Llama's names and layers, in which neighbours are rotated together.

Its own prediction depths have no norm in front of the head, which no `MTPConfig` says: folders with
them are refused.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

from jaxtyping import PRNGKeyArray

from .. import nn
from . import _dense
from ._settings import Settings
from ._tables import Family

_make_layer = partial(
    _dense.make_layer, biases="said", has_norm=False, has_window=False, interleaved=True
)


def make_layer(
    settings: Settings, index: int, names: Collection[str], *, key: PRNGKeyArray
) -> nn.TransformerDecoderLayer:
    """A layer of grouped-query attention and SwiGLU."""
    if settings.flag("use_bias", False):
        raise settings.error("use_bias", "false: there are no biases here", True)
    return _make_layer(settings, index, names, key=key)


def config_of(decoder: nn.TransformerDecoder) -> dict[str, Any]:
    """The keys of `config.json` that describe a decoder; `save` compares what they give."""
    return {**_dense.config_of(decoder), "use_bias": False}


ERNIE4_5 = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    make_layer=make_layer,
    config_of=config_of,
    layer={**_dense.ATTENTION, **_dense.FEED_FORWARD},
)
"""Names only, no number checked: no recorded numbers of its own were there."""
