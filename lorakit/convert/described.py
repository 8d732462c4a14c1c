"""Whether a folder says which model it is of: other programs write a `config.json`, too."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import InvalidFile
from lorakit.files.folders import read_json

CONFIG = "config.json"


def is_described(folder: Path) -> bool:
    """Whether its `config.json` is a model's. One that is damaged may be: whoever reads it says so."""
    file = folder / CONFIG
    if not file.is_file():
        return False
    try:
        kind = read_json(file).get("model_type")
    except InvalidFile:
        return True
    return isinstance(kind, str) and bool(kind)
