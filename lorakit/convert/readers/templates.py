"""Names of tensors with a place for each number, as tables hold them; and what such tables need to know of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.convert.described import is_described
from lorakit.errors import InvalidFile, Refused
from lorakit.files.folders import read_json

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def template(name: str) -> tuple[str, tuple[str, ...]]:
    """`layers.3.attn.weight` as `layers.{}.attn.weight` and its numbers; braces of its own are doubled."""
    plain = name.replace("{", "{{").replace("}", "}}")
    return _NUMBER.sub("{}", plain), tuple(_NUMBER.findall(plain))


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """What the table calls it; None where it has no such name."""
    place, numbers = template(name)
    target = table.get(place)
    return None if target is None else target.format(*numbers)


def ensure_apart(names: Iterable[str], found: Mapping[str, object], where: str) -> None:
    """Raises InvalidFile where one of these names is taken: of two tensors one would be lost."""
    taken = next((name for name in names if name in found), None)
    if taken is not None:
        raise InvalidFile(f"{where} holds '{taken}' twice, under two names: it is damaged")


def config_beside(folder: Path | None, needed: str) -> Mapping[str, Any]:
    """`config.json` of a checkpoint's folder.

    Raises:
        Refused: there is none; `needed` says what for.
    """
    if folder is None or not is_described(folder):
        where = f"'{folder}'" if folder is not None else "its folder"
        raise Refused(f"{needed}, and {where} has no config.json: copy that of the base beside the weights")
    return read_json(folder / "config.json")


def head_size(config: Mapping[str, Any], where: str) -> int:
    """Rows of one attention head: `head_dim`, else the hidden size over the heads.

    Raises:
        InvalidFile: the config says neither.
    """
    size = config.get("head_dim")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = hidden // heads
    if not isinstance(size, int) or size < 2 or size % 2:
        raise InvalidFile(f"{where}: its config.json does not say how large an attention head is (head_dim)")
    return size
