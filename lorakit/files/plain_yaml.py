"""YAML files of plain values: as trainers write their settings, and as people write lorakit's."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import InvalidFile, NotFound, UsageError
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


def read_strictly(file: Path) -> Any:
    """What a person wrote for lorakit: plain data, in which nothing is dropped in silence.

    Raises:
        NotFound: there is no such file.
        UsageError: it can't be read or parsed, a key stands twice, or a number is none that a person means.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Strict)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise NotFound(f"there is no file '{file}'") from None
    except OSError as error:
        raise UsageError(f"'{file}' can't be read: {error.strerror}") from None
    # A tag on what can't be one, as `!!timestamp now`, is any error to the loader.
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
    ) as error:
        raise UsageError(f"'{file}' can't be read as YAML: {' '.join(str(error).split())}") from None


class _Strict(yaml.SafeLoader):  # type: ignore[misc]
    """Plain data alone, and no key twice: of two policies the first would be dropped in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "names with values were expected", node.start_mark)
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' stands twice", node.start_mark)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return found

    def construct_yaml_int(self, node: Any) -> int:
        """YAML 1.1 takes 010 for 8, and 1:30 for 90, which nobody means here."""
        said = self.construct_scalar(node)
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", said):
            raise yaml.constructor.ConstructorError(None, None, f"write {said} in plain digits", node.start_mark)
        return int(said)


_Strict.add_constructor("tag:yaml.org,2002:int", _Strict.construct_yaml_int)
