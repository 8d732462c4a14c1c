"""What the tests of moving start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.moving.web import Web, serving
from tests.checkpoints.written import evaluated, write_checkpoint


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as running:
        yield running


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As a trainer leaves it, evaluated at its own step, optimizer and all."""
    folder = write_checkpoint(
        tmp_path / "runs" / "sql" / "checkpoint-500",
        [{"step": 500, "loss": 0.5}, evaluated(500, 1.25)],
        base_model_name_or_path="org/llama",
    )
    (folder / "optimizer.pt").write_bytes(b"o" * 1000)
    return folder
