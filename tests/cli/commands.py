"""Run the command line in this process, and see what a shell would."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from lorakit.cli import main


@dataclass(frozen=True)
class Ended:
    """`key` is what was in LORAKIT_API_KEY then."""

    code: int
    out: str
    err: str
    key: str | None = None


def lorakit(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ended:
    before = signal.getsignal(signal.SIGTERM)
    try:
        # a process of its own would keep its variables to itself
        with patch.dict(os.environ):
            with pytest.raises(SystemExit) as ended:
                main([str(argument) for argument in arguments])
            key = os.environ.get("LORAKIT_API_KEY")
    finally:
        signal.signal(signal.SIGTERM, before)
    code = ended.value.code
    assert isinstance(code, int)
    return Ended(code, *capsys.readouterr(), key)
