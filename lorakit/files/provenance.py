"""`lorakit.json`: what every folder that lorakit writes says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit import __version__
from lorakit.files.folders import write_json

FILE = "lorakit.json"


def write_provenance(
    folder: Path, operation: str, parents: list[dict[str, Any]], settings: dict[str, Any], **measured: Any
) -> None:
    """Version, operation, parents with digests and weights, settings, and what was measured."""
    record = {
        "lorakit": __version__,
        "operation": operation,
        "parents": parents,
        "settings": settings,
        **measured,
    }
    write_json(folder / FILE, record)
