"""YAML files of plain values, as trainers write their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import InvalidFile
from lorakit.files.regular import opened

MAX_YAML = 1 << 22  # bytes; settings are far shorter


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """Without `<<`, by which a mapping that takes in others grows tenfold with each line."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("a mapping takes in others (<<), which is not read here")
        super().flatten_mapping(node)


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping from a YAML file; what asks for more than plain values is not made.

    Raises:
        NotFound: there is no such file.
        InvalidFile: it is too long, can't be parsed, or holds no mapping.
    """
    with opened(file) as stream:
        raw = stream.read(MAX_YAML + 1)
    if len(raw) > MAX_YAML:
        raise InvalidFile(f"'{file}' is longer than {MAX_YAML >> 20} MB: these are no settings")
    try:
        value = yaml.load(raw, Loader=_Plain)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        raise InvalidFile(f"'{file}' can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise InvalidFile(f"'{file}' holds no mapping")
    return value
