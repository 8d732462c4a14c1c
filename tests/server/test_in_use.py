"""What a running server may be asked for is in use for as long as it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import Conflict
from lorakit.store.serving import in_use, serving_now
from lorakit.store.trash import find_stored, trash_stored
from tests.server.fake_engine import put_checkpoint, serving

pytestmark = pytest.mark.anyio


async def test_a_server_holds_what_its_aliases_point_at_until_it_stops(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500, eval_loss=0.5)
    async with serving(tmp_path, numbers) as served:
        name = await served.revision_of("sql")
        home = served.gateway.reconciler.store.home
        assert len(serving_now(home)) == 1
        assert len(in_use(home)) == 1
        with pytest.raises(Conflict, match="in use: the server"):
            trash_stored(find_stored(name, home), home, force=True)
        assert await served.revision_of("sql") == name
    assert serving_now(home) == []
    trash_stored(find_stored(name, home), home, force=True)
