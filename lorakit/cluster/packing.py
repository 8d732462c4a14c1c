"""Values on their way to another process, whose working directory is another one: every path in them is absolute."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any


class _Absolute(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Path):
            return type(value), (str(value.absolute()),)
        return NotImplemented


def packed(value: Any) -> bytes:
    """A plan, or a part of one, as bytes for a task; `unpacked` there gives it back."""
    stream = io.BytesIO()
    _Absolute(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def unpacked(block: bytes) -> Any:
    """Only of what this very work has packed: it is a pickle."""
    return pickle.loads(block)
