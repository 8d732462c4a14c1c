"""Tokens of a base by their ids: which are special, and how one that was not chosen would read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer.json"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's; a piece that is decoded by itself loses it


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`special` maps ids to texts. A base without a `tokenizer.json` has an empty one, which reads nothing."""

    special: Mapping[int, str] = field(default_factory=dict)
    tokenizer: Any = None

    @property
    def reads(self) -> bool:
        return self.tokenizer is not None

    def text(self, id: int) -> str:
        """One token by itself; half a letter is U+FFFD."""
        if id in self.special:
            return self.special[id]
        piece, text = self.tokenizer.id_to_token(id) or "", str(self.tokenizer.decode([id]))
        return f" {text}" if piece.startswith(_SPACE) and not text.startswith(" ") else text


def read_vocabulary(base: Path) -> Vocabulary:
    """The one of a model's folder; what can't be read is as good as not there: vLLM reads by its own."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(base / TOKENIZER))
    except Exception:  # it raises Exception itself, for a file that is missing as for one that is none
        return Vocabulary()
    added = tokenizer.get_added_tokens_decoder()
    return Vocabulary({id: token.content for id, token in added.items() if token.special}, tokenizer)
