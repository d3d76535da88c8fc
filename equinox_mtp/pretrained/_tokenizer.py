"""The tokenizer of a folder, by the package `tokenizers`."""

import importlib
from pathlib import Path
from typing import Any

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""What serving engines read beside weights and configuration."""


def load_tokenizer(path: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder, or of its file; `None` if a folder has none.

    It neither truncates nor pads, whatever the file says. Chat templates are not applied.

    >>> print(pretrained.load_tokenizer(folder))
    None

    **Raises:** `ModuleNotFoundError` without the extra `hf`; `ValueError` for a damaged file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER_FILE
        if not path.is_file():
            return None
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs the package tokenizers. Install the extra `hf`, in the repository by: "
            "pip install -e '.[hf]', or pass `tokenizer=False`.",
            name=error.name,
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # For whole texts: what a file says of these is for batches of a fixed length.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:
        raise ValueError(
            f"{path}: it cannot be read: {error!s:.120}. Copy the checkpoint again."
        ) from None
