"""FastMTP heads in the format of speculators: one layer, repeated, without embedding and head."""

from pathlib import Path
from typing import Any

from .._checks import check_integer
from .._config import MTPConfig
from .._types import checked
from ._dense import MTP_LAYER
from ._folder import CONFIG_FILE, CheckpointFolder, read_json
from ._settings import Settings
from ._tables import MTPTable

HEAD_KIND_KEY = "speculators_model_type"

_CONFIG: dict[str, Any] = {
    "concat_order": "embedding_first",
    "input_hidden_state": "after_norm",
    "carried_hidden_state": "after_norm",
    "output_norm": "own",
    "repeated_layer": True,
}


def head_table() -> MTPTable:
    """MiMo's names; but the embedding comes first."""
    return MTPTable(prefix="mtp_layers.{depth}.", table=MTP_LAYER, config=_CONFIG)


def depths_of_head(folder: CheckpointFolder, num_depths: int | None) -> MTPConfig:
    """As many depths as the head was made to draft; the layer is the same in all of them."""
    settings = Settings(folder.config, folder.path / CONFIG_FILE)
    kind = settings.get(HEAD_KIND_KEY)
    if kind != "mtp":
        raise settings.error(HEAD_KIND_KEY, "'mtp'", kind)
    if settings.integer("num_nextn_predict_layers", 1) != 1:
        raise settings.error(
            "num_nextn_predict_layers", "1", settings.get("num_nextn_predict_layers")
        )
    if num_depths is None:
        num_depths = _drafts(settings)
    return MTPConfig(check_integer("num_depths", num_depths, at_least=1), **_CONFIG)


def _drafts(settings: Settings) -> int:
    config = settings.get("speculators_config", {})
    methods = config.get("proposal_methods") if isinstance(config, dict) else None
    first = methods[0] if isinstance(methods, list) and methods else {}
    method = Settings(first if isinstance(first, dict) else {}, settings.path)
    return method.integer("speculative_tokens", 1)


@checked
def model_folder(folder: str | Path) -> Path:
    """The folder of the main model: the one that a FastMTP head names, or `folder` itself.

    It has the tokenizer, and the `config.json` that says which tokens end a text.

    >>> pretrained.model_folder(folder) == folder
    True

    **Raises:** `FileNotFoundError` if a head's model is not where it says; `ValueError` without a
    `config.json`.
    """
    path = Path(folder)
    config = read_json(path / CONFIG_FILE)
    return verifier_folder(path, config, None) if HEAD_KIND_KEY in config else path


def verifier_folder(head: Path, config: dict[str, Any], verifier: str | Path | None) -> Path:
    """The folder of the model that a head was made for.

    **Raises:** `FileNotFoundError` if it is not given, and not where the head says.
    """
    if verifier is not None:
        return Path(verifier)
    config = config.get("speculators_config", {})
    named = config.get("verifier") if isinstance(config, dict) else None
    name = named.get("name_or_path") if isinstance(named, dict) else None
    if isinstance(name, str) and name:
        for path in (head.parent / name, head.parent / Path(name).name, Path(name)):
            if (path / CONFIG_FILE).is_file():
                return path
    raise FileNotFoundError(
        f"`verifier` must be given: {head} holds a head alone, and its model {name!r:.80} "
        "is not beside it. Pass `verifier=FOLDER`."
    )


def head_config(verifier: dict[str, Any], name: str, num_depths: int) -> dict[str, Any]:
    """The `config.json` of a head, from that of its model."""
    return {
        "architectures": ["MTPDraftModel"],
        HEAD_KIND_KEY: "mtp",
        "num_nextn_predict_layers": 1,
        "transformer_layer_config": verifier,
        "torch_dtype": verifier["torch_dtype"],
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "mtp",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_depths}],
            "verifier": {"name_or_path": name, "architectures": verifier["architectures"]},
        },
    }
