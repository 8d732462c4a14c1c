"""Is an adapter's tokenizer its base's? vLLM reads every prompt with that, whatever an adapter was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorakit.convert.answers import Check
from lorakit.errors import InvalidFile
from lorakit.files.digests import file_digest
from lorakit.files.folders import read_json

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"  # of a tokenizer that is written in files of another form
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class _File:
    """Two of one content are the same."""

    digest: str
    path: Path = field(compare=False)


def same_tokens(adapter: Path, base: Path) -> Check:
    """Whether prompts are read as the adapter was trained: two folders."""
    reason = foreign_tokens(adapter, base)
    return Check("tokenizer", reason is None, reason or "it has no tokens of its own", _CURE if reason else None)


def foreign_tokens(adapter: Path, base: Path) -> str | None:
    """Why prompts would be read otherwise than the adapter was trained; None where they are read alike, or where one of
    the two has no tokenizer to compare.

    A token for padding alone stands in no prompt.
    """
    if not (base / TOKENIZER).is_file():
        return None
    found = next((adapter / name for name in (TOKENIZER, ADDED) if (adapter / name).is_file()), None)
    if found is None:
        return None
    try:
        return _difference(_File(file_digest(found), found), _known(base / TOKENIZER), _padding(adapter))
    except InvalidFile as error:
        return f"its tokenizer can't be read: {error}"


def _known(file: Path) -> _File:
    state = file.stat()
    return _File(_digest_once(file, state.st_size, state.st_mtime_ns), file)


@lru_cache(maxsize=8)
def _digest_once(file: Path, size: int, changed: int) -> str:
    return file_digest(file)


@lru_cache(maxsize=64)
def _difference(own: _File, base: _File, padding: str) -> str | None:
    if own == base:
        return None
    ids, known = _ids(own.path), _ids(base.path)
    added = sorted(ids.keys() - known.keys() - {padding}, key=lambda token: ids[token])
    if added:
        shown = ", ".join(f"'{token}'" for token in added[:_SHOWN]) + (", …" if len(added) > _SHOWN else "")
        return f"its tokenizer adds {len(added)} tokens ({shown}), {_READ}"
    if moved := [token for token, id in ids.items() if known.get(token, id) != id]:
        return f"its tokenizer is another than the base's ('{moved[0]}' is {ids[moved[0]]} in one), {_READ}"
    return None


_READ = "and vLLM reads every prompt with the base's"
_CURE = (
    "train with that, or merge the adapter (lorakit merge), which brings its tokenizer along, and serve what comes out"
)


def _ids(file: Path) -> Mapping[str, int]:
    """Each token's id. Raises InvalidFile where it has no form that is known."""
    said = read_json(file)
    if file.name == ADDED:
        return {token: int(id) for token, id in said.items()}
    model = said.get("model")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        raise InvalidFile(f"'{file}' has no vocabulary")
    try:
        added = {entry["content"]: int(entry["id"]) for entry in said.get("added_tokens") or []}
    except (LookupError, TypeError, ValueError):
        raise InvalidFile(f"'{file}' has added tokens without an id") from None
    return {**vocabulary, **added}


def _padding(adapter: Path) -> str:
    """The token for padding; empty where none is named."""
    said: Any = read_json(adapter / CONFIG).get("pad_token") if (adapter / CONFIG).is_file() else None
    return str(said.get("content", "") if isinstance(said, dict) else said or "")
