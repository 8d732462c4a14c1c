"""What the verbs that merge are tried on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.folders import write_adapter, write_base

if TYPE_CHECKING:
    from tests.server.running import Running


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", shards=2)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))


@pytest.fixture
def server(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A running server that the verbs find by themselves: `sql` at two steps, and room to load more from `roots`."""
    from tests.server.fake_engine import put_checkpoint
    from tests.server.running import running

    put_checkpoint(tmp_path / "runs" / "sql", 500, eval_loss=0.5)
    put_checkpoint(tmp_path / "runs" / "sql", 1000, eval_loss=0.75)
    (tmp_path / "roots").mkdir()
    monkeypatch.delenv("LORAKIT_API_KEY", raising=False)
    with running(tmp_path, base, roots=(str(tmp_path / "roots"),)) as there:
        monkeypatch.setenv("LORAKIT_URL", there.url)
        yield there
