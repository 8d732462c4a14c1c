"""The runs that are watched, as OpenAI shows fine-tuning jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.server.access import keyring
from lorakit.store.keys import Allowance, KeyStore
from tests.server.fake_engine import Served, fingerprint_of, put_adapter, put_checkpoint, serving

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


async def get(served: Served, path: str, **query: Any) -> Any:
    answer = await served.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_run_is_a_job_and_its_checkpoints_are_models(tmp_path: Path, numbers: Path) -> None:
    for step, loss in ((10, 1.5), (20, 2.5), (30, None)):
        put_checkpoint(tmp_path / "runs" / "sql", step, eval_loss=loss)
    async with serving(tmp_path, numbers) as served:
        job = await get(served, f"{JOBS}/sql")
        assert (job["id"], job["object"], job["model"], job["status"]) == (
            "sql",
            "fine_tuning.job",
            "numbers",
            "running",
        )
        assert (job["fine_tuned_model"], job["finished_at"]) == ("sql", None)
        assert job["metadata"]["revision"] == await served.revision_of("sql")
        assert (await get(served, JOBS))["data"] == [job]
        found = (await get(served, f"{JOBS}/sql/checkpoints"))["data"]
        assert [one["step_number"] for one in found] == [30, 20, 10]
        assert [one["metrics"]["full_valid_loss"] for one in found] == [None, 2.5, 1.5]
        assert {one["metrics"]["train_loss"] for one in found} == {1.5}
        for one in found:
            assert one["fine_tuning_job_id"] == "sql"
            assert await served.revision_of(one["fine_tuned_model_checkpoint"]) == one["id"]


async def test_a_run_with_its_last_save_has_succeeded(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    last = put_adapter(tmp_path / "last", 3)
    for file in last.iterdir():
        (tmp_path / "runs" / "sql" / file.name).write_bytes(file.read_bytes())
    async with serving(tmp_path, numbers) as served:
        job = await get(served, f"{JOBS}/sql")
        assert job["status"] == "succeeded"
        assert job["finished_at"] >= job["created_at"]
        assert len((await get(served, f"{JOBS}/sql/checkpoints"))["data"]) == 2


async def test_an_adapter_by_itself_is_no_job(tmp_path: Path, numbers: Path) -> None:
    folder = put_adapter(tmp_path / "alone")
    async with serving(tmp_path, numbers, adapters={"alone": str(folder)}) as served:
        assert (await get(served, JOBS))["data"] == []
        for path in (f"{JOBS}/alone", f"{JOBS}/alone/checkpoints", f"{JOBS}/none", f"{JOBS}/a%0Ab"):
            assert (await served.client.get(path)).status_code == 404


async def test_pages_come_one_after_the_other(tmp_path: Path, numbers: Path) -> None:
    for step in range(1, 6):
        put_checkpoint(tmp_path / "runs" / "sql", step)
    for name in ("a", "b", "c"):
        put_checkpoint(tmp_path / "runs" / name, 1, seed=ord(name))
    async with serving(tmp_path, numbers, slots=8) as served:
        for path, count in ((JOBS, 4), (f"{JOBS}/sql/checkpoints", 5)):
            whole = await get(served, path, limit=100)
            assert (len(whole["data"]), whole["has_more"]) == (count, False)
            found: list[Any] = []
            while True:
                page = await get(served, path, limit=2, **({"after": found[-1]["id"]} if found else {}))
                found += page["data"]
                assert page["has_more"] is (len(found) < count)
                if not page["has_more"]:
                    break
            assert found == whole["data"]
            assert (await served.client.get(path, params={"after": "nothing"})).status_code == 404
            for wrong in ("0", "101", "x"):
                assert (await served.client.get(path, params={"limit": wrong})).status_code == 400
        page = await get(served, f"{JOBS}/sql/checkpoints", limit=2)
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][1]["id"])


async def test_what_the_engine_refuses_is_no_checkpoint(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    async with serving(tmp_path, numbers) as served:
        folder = put_checkpoint(tmp_path / "aside", 20)
        served.engine.refuses.add(fingerprint_of(folder))
        folder.rename(tmp_path / "runs" / "sql" / folder.name)
        await served.until(lambda: any(state == "refused" for state in states(served)))
        found = (await get(served, f"{JOBS}/sql/checkpoints"))["data"]
        assert [one["step_number"] for one in found] == [10]


def states(served: Served) -> list[str]:
    known = served.reconciler
    return [known.state_of(one)[0] for one in known.runs["sql"].revisions.values()]


async def test_a_key_sees_its_own_runs_alone(tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "LOOK", 0.02)
    for name in ("sql", "chat"):
        put_checkpoint(tmp_path / "runs" / name, 1, seed=len(name))
    keys = KeyStore(tmp_path / "home")
    text, _ = keys.create(Allowance(("sql*",)))
    keys.close()
    async with serving(tmp_path, numbers, headers={"authorization": f"Bearer {text}"}, ready=False) as served:
        await served.until_ready()
        assert [job["id"] for job in (await get(served, JOBS))["data"]] == ["sql"]
        hidden, none = [(await served.client.get(f"{JOBS}/{name}")) for name in ("chat", "none")]
        assert hidden.status_code == none.status_code == 404
        assert hidden.json()["error"]["message"].replace("chat", "none") == none.json()["error"]["message"]
