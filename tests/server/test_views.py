"""What a server knows, as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.fake_engine import put_adapter, put_checkpoint, serving

pytestmark = pytest.mark.anyio


async def test_a_models_card_says_where_it_comes_from(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500, eval_loss=0.25)
    put_adapter(tmp_path / "runs" / "alone", 3)
    async with serving(tmp_path, numbers) as served:
        await served.until(lambda: {"sql", "alone"} <= served.reconciler.runs.keys())
        await served.until(lambda: served.revision_of("alone"))
        cards = {card["id"]: card for card in (await served.client.get("/v1/models")).json()["data"]}
        name = await served.revision_of("sql")
        assert name is not None
        for id in ("sql", "sql@latest", "sql@best", name):
            card = cards[id]
            assert (card["parent"], card["root"], card["step"], card["eval_loss"]) == ("numbers", name, 500, 0.25)
            said = card["metadata"]
            assert (said["base"], said["step"], said["eval_loss"], said["train_loss"]) == ("numbers", 500, 0.25, 1.5)
            assert said["digest"][:8] == name[-8:]
            assert said["rank"] == 2
        assert cards["alone"]["metadata"]["step"] is None
        assert cards["numbers"].get("parent") is None
