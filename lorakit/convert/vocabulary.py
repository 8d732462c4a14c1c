"""The rows of the vocabulary: as many as the config says, and one for each token of the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import Refused, WrongBase
from lorakit.files.folders import read_json


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How many rows are written, what the config has to say, and what a reader should know."""

    rows: int
    note: str | None = None


def settled(found: Mapping[str, int], said: int, tokens: int | None, *, trained: bool = True) -> Vocabulary:
    """`found`: the rows of each table; `said`: the config's vocab_size; `tokens`: the tokenizer's, if that is known.

    What was trained stays. Rows beyond the config's that no token has are padding, and are cut off, if the tokenizer is
    that which was `trained` with: another one does not know the tokens that were added. Else the config follows.

    Raises:
        WrongBase: embedding and output head have different numbers of rows.
        Refused: tokens have no row.
    """
    sizes = set(found.values())
    is_padded = trained and tokens is not None and min(sizes) >= said >= tokens
    if len(sizes) > 1 and not is_padded:
        listed = ", ".join(f"'{name}' has {rows}" for name, rows in found.items())
        raise WrongBase(f"the tables of the vocabulary differ ({listed}): look at how the model was resized")
    rows = min(sizes)
    if rows == said and len(sizes) == 1:
        beyond = tokens is not None and tokens > rows
        note = f"the tokenizer has {tokens} tokens, and the model {rows}: the last ones can't be used"
        return Vocabulary(rows, note if beyond else None)
    if tokens is not None and rows < tokens:
        raise Refused(
            f"the tokenizer has {tokens} tokens, and the checkpoint rows for {rows} (config.json says {said}): name "
            f"the folder with the tokenizer that it was trained with by --like, or leave it out with --only model"
        )
    if is_padded:
        note = f"the vocabulary is cut from {max(sizes)} to {said} rows: those beyond are padding, no token has them"
        return Vocabulary(said, note)
    note = f"vocab_size in config.json becomes {rows}, as the checkpoint has so many rows; it was {said}"
    return Vocabulary(rows, note)


def with_vocabulary(config: Mapping[str, Any], said: int, rows: int) -> dict[str, Any]:
    """The config with another vocab_size, in each part that had the old one."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size" and value == said:
            changed[key] = rows
        else:
            changed[key] = with_vocabulary(value, said, rows) if isinstance(value, dict) else value
    return changed


def tokens_of(file: Path) -> int | None:
    """One more than the highest id in a `tokenizer.json`; None where that can't be told."""
    said = read_json(file)
    model = said.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = said.get("added_tokens")
    ids: list[Any] = [entry.get("id") for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    known = [number for number in ids if isinstance(number, int) and not isinstance(number, bool)]
    return 1 + max(known) if known else None
