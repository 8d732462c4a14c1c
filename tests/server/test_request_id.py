"""One id for a request, wherever it is spoken of."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lorakit.server.requests.answered import Answered
from tests.server.fake_engine import put_checkpoint, serving

pytestmark = pytest.mark.anyio


async def test_a_clients_id_is_in_its_answer_in_the_engine_and_in_the_log(
    tmp_path: Path, numbers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        seen: list[Answered] = []
        served.reconciler.observers.append(seen.append)
        with caplog.at_level(logging.INFO, "lorakit"):
            answer = await served.client.post(
                "/v1/completions", json={"model": "sql", "prompt": "a"}, headers={"X-Request-Id": "mine-1"}
            )
        assert answer.headers.get_list("x-request-id") == ["mine-1"]
        assert served.engine.headers[-1][b"x-request-id"] == b"mine-1"
        assert [one.request_id for one in seen] == ["mine-1"]


async def test_a_request_without_an_id_gets_one_of_its_own_even_when_it_fails(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        answers = [await served.ask("nobody"), await served.ask("numbers"), await served.client.get("/v1/models")]
        ids = [answer.headers["x-request-id"] for answer in answers]
        assert len(set(ids)) == 3
        assert all(len(id) == 32 for id in ids)


@pytest.mark.parametrize("given", ["", " ", "a b", "x" * 129, "-starts-odd", "é", "a,b", '"quoted"', "[x]"])
async def test_an_id_that_could_not_stand_in_a_log_line_is_replaced(tmp_path: Path, numbers: Path, given: str) -> None:
    async with serving(tmp_path, numbers) as served:
        answer = await served.client.get("/v1/models", headers={"x-request-id": given.encode()})
        assert answer.headers["x-request-id"].isalnum()
        assert answer.headers["x-request-id"] != given
