"""What the verbs that merge are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.folders import write_adapter, write_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", shards=2)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
