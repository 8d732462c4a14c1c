"""A store whose disk is full or can't be written, under a server: what is in it is served on."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from lorakit.errors import OutOfSpace
from tests.disks import small_disk_at
from tests.server.fake_engine import fingerprint_of, put_adapter, put_checkpoint, serving
from tests.server.test_reconciler import room

pytestmark = pytest.mark.anyio


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


async def test_a_full_disk_keeps_what_is_served_and_takes_in_the_rest_when_there_is_room(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "runs" / "sql"
    with small_disk_at(tmp_path / "disk", 2048) as disk:
        async with room(tmp_path, numbers, slots=1, home=str(disk / "home")) as r:
            for step in (100, 200):
                put_checkpoint(run, step)
                await r.step()
            filler = fill(disk)
            put_checkpoint(run, 300)
            await r.step()
            assert r.meant("sql") == "step-200"
            assert "no space left" in r.why("sql")
            assert "will be tried again" in r.why("sql")
            with pytest.raises(OutOfSpace):
                await r.reconciler.rollback("sql")
            with pytest.raises(OutOfSpace):
                await r.reconciler.load("chat", put_adapter(tmp_path / "chat"))
            assert r.meant("sql") == "step-200"
            for step in (100, 200):  # from the store into the one slot, and back
                revision = r.reconciler.resolve(f"sql@step-{step}")
                assert revision is not None
                await r.reconciler.bring_in(revision)
                assert r.text(f"sql@step-{step}") == fingerprint_of(run / f"checkpoint-{step}")
            filler.unlink()
            await r.step()
            assert (r.meant("sql"), r.why("sql")) == ("step-300", "")


@pytest.mark.parametrize("how", ["full", "read-only"])
async def test_a_server_that_starts_on_what_it_cant_write_serves_what_is_in_it(
    tmp_path: Path, numbers: Path, how: str
) -> None:
    run = tmp_path / "runs" / "sql"
    with small_disk_at(tmp_path / "disk", 2048) as disk:
        async with serving(tmp_path, numbers, home=str(disk / "home")) as served:
            put_checkpoint(run, 100)
            await served.until(lambda: "sql" in served.reconciler.runs)
            first = await served.until(lambda: served.revision_of("sql"))
        fill(disk) if how == "full" else subprocess.run(["mount", "-o", "remount,ro", disk], check=True)  # noqa: ASYNC221
        put_checkpoint(run, 200)
        async with serving(tmp_path, numbers, home=str(disk / "home")) as served:
            assert await served.revision_of("sql") == first
            await served.reconciler.step()
            assert await served.revision_of("sql@latest") == first
            refused = await served.client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-100"})
            assert refused.status_code == 500
            assert ("no space left" if how == "full" else "read-only") in refused.json()["error"]["message"]
            assert (await served.client.get("/v1/adapters/sql")).json()["revisions"][-1]["state"] == "incomplete"
