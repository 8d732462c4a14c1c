"""LoRAX's routes, over an engine that answers letters with logprobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.server.engines.engine import LoadFailed
from tests.server.fake_engine import Served, fingerprint_of, put_adapter, put_checkpoint, serving
from tests.server.speaking_engine import ROOM, SpeakingEngine

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def speaking(folder: Path, base: Path, **more: Any) -> AsyncIterator[Served]:
    """The run sql, and an engine that answers with the fingerprint of what it has."""
    put_checkpoint(folder / "runs" / "sql", 500)
    async with serving(folder, base, engine=SpeakingEngine(base), **more) as served:
        yield served


def fingerprint(folder: Path) -> str:
    return fingerprint_of(folder / "runs" / "sql" / "checkpoint-500")


async def generate(served: Served, path: str = "/generate", inputs: str = "ask", **parameters: Any) -> httpx.Response:
    stream = parameters.pop("stream", None)
    body = {"inputs": inputs, "parameters": parameters, **({} if stream is None else {"stream": stream})}
    return await served.client.post(path, json=body)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "text/event-stream"
    return [json.loads(line.removeprefix("data:")) for line in answer.text.split("\n\n") if line]


async def test_an_adapter_answers_by_the_name_it_is_served_by(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers) as served:
        for name in ("sql", "sql@latest", "sql@step-500"):
            answer = await generate(served, adapter_id=name, max_new_tokens=4, details=True)
            assert answer.json()["generated_text"] == fingerprint(tmp_path)[:4]
            assert answer.headers["x-adapter-id"] == name
            assert answer.headers["x-model-id"] == "numbers"
            assert answer.headers["x-lorakit-revision"].startswith("sql@step-500-")
            counted = [answer.headers[f"x-{what}-tokens"] for what in ("prompt", "generated", "total")]
            assert counted == ["3", "4", "7"]
        for none in (None, "", "numbers", "__base_model__"):
            answer = await generate(served, adapter_id=none)
            assert answer.json() == {"generated_text": "base"}


async def test_the_root_answers_in_a_list_and_token_by_token(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers) as served:
        said = fingerprint(tmp_path)
        (told,) = (await generate(served, "/", adapter_id="sql", max_new_tokens=2)).json()
        assert told == {"generated_text": said[:2]}
        for path, stream in (("/", True), ("/generate_stream", None)):
            told = events(await generate(served, path, adapter_id="sql", max_new_tokens=2, details=True, stream=stream))
            assert [event["token"]["text"] for event in told] == [*said[:2]]
            assert told[-1]["generated_text"] == said[:2]
            assert told[-1]["details"]["prompt_tokens"] == 3


async def test_an_answer_has_all_the_room_there_is_where_nothing_is_said(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers) as served:
        await generate(served, inputs="a" * 10)
        assert served.engine.asked[-1]["max_tokens"] == ROOM - 10
        await generate(served, inputs="a" * 100, truncate=4)
        assert served.engine.asked[-1]["max_tokens"] == ROOM - 4
        answer = await generate(served, inputs="a" * ROOM)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert str(ROOM) in answer.json()["error"]


async def test_merged_adapters_are_a_mix_of_their_deltas(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "chat", 1)
    async with speaking(tmp_path, numbers, max_mix_error=1.0) as served:
        merged: dict[str, Any] = {"ids": ["sql", "chat@latest"], "weights": [0.7, 0.3], "density": 0.5}
        for more, mix in (
            ({}, "mix(sql=0.7,chat@latest=0.3)"),
            ({"merge_strategy": "ties"}, "mix(sql=0.7,chat@latest=0.3,method=ties,density=0.5)"),
            ({"merge_strategy": "dare_ties", "majority_sign_method": "frequency"},
             "mix(sql=0.7,chat@latest=0.3,method=dare_ties,density=0.5,majority_sign=frequency)"),
            ({"ids": ["sql", "sql"]}, "mix(sql=1)"),
        ):  # fmt: skip
            answer = await generate(served, merged_adapters={**merged, **more}, max_new_tokens=3)
            assert answer.headers["x-lorakit-revision"] == await served.revision_of(mix)
            assert answer.headers["x-adapter-id"] == ",".join({**merged, **more}["ids"])
        for wrong in (["sql", "nothing"], ["sql,chat", "chat"], ["mix(sql)", "chat"]):
            answer = await generate(served, merged_adapters={**merged, "ids": wrong})
            assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")


async def test_a_folder_of_the_servers_roots_is_brought_in_when_it_is_asked_for(tmp_path: Path, numbers: Path) -> None:
    shelf = tmp_path / "shelf"
    folder = put_adapter(shelf / "Größe 1", 7)
    async with speaking(tmp_path, numbers, roots=(str(shelf),)) as served:

        async def ask() -> httpx.Response:
            return await generate(served, adapter_id=str(folder), adapter_source="local", max_new_tokens=4)

        answers = await asyncio.gather(*(ask() for _ in range(8)))
        assert {answer.json()["generated_text"] for answer in answers} == {fingerprint_of(folder)[:4]}
        assert len({answer.headers["x-lorakit-revision"] for answer in answers}) == 1
        before = list(served.engine.loads)
        await ask()
        assert served.engine.loads == before
        other = put_adapter(tmp_path / "other", 8)
        for file in folder.iterdir():
            file.write_bytes((other / file.name).read_bytes())
        again = await ask()  # LoRAX would answer with what it read first
        assert again.json()["generated_text"] == fingerprint_of(other)[:4]
        assert again.headers["x-lorakit-revision"] not in {answer.headers["x-lorakit-revision"] for answer in answers}


async def test_a_folder_that_is_watched_is_its_revision(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers) as served:
        watched = tmp_path / "runs" / "sql" / "checkpoint-500"
        answer = await generate(served, adapter_id=str(watched), adapter_source="local", max_new_tokens=4)
        assert answer.headers["x-lorakit-revision"] == await served.revision_of("sql@step-500")
        assert list(served.reconciler.runs) == ["sql"]


async def test_no_other_place_is_read(tmp_path: Path, numbers: Path) -> None:
    put_adapter(tmp_path / "elsewhere")
    (tmp_path / "shelf" / "empty").mkdir(parents=True)
    (tmp_path / "shelf" / "way").symlink_to(tmp_path / "elsewhere")
    async with speaking(tmp_path, numbers, roots=(str(tmp_path / "shelf"),)) as served:
        for wrong in ("elsewhere", "shelf/way", "shelf/../elsewhere", "shelf/nothing", "shelf/empty", "runs/sql"):
            answer = await generate(served, adapter_id=f"{tmp_path}/{wrong}", adapter_source="local")
            assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), wrong
        for source in ("hub", "s3", "pbase"):
            answer = await generate(served, adapter_id="org/name", adapter_source=source)
            assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert [name for name in served.engine.loads if not name.startswith("sql@")] == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"inputs": 1}', b'{"inputs": ""}',
     b'{"inputs": "a", "stream": 3}', b'{"inputs": "a", "parameters": {"top_p": 2}}',
     b'{"inputs": "a", "parameters": []}'],
    ids=range(11),
)  # fmt: skip
async def test_what_can_not_be_read_is_a_validation_error(tmp_path: Path, numbers: Path, body: bytes) -> None:
    async with serving(tmp_path, numbers, engine=SpeakingEngine(numbers)) as served:
        for path in ("/", "/generate", "/generate_stream"):
            answer = await served.client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 422
            assert answer.json().keys() == {"error", "error_type"}
            assert answer.json()["error_type"] == "validation"


async def test_errors_of_the_engine_have_lorax_kinds(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers) as served:
        assert isinstance(served.engine, SpeakingEngine)
        for status, told, kind in ((400, 422, "validation"), (500, 424, "generation"), (503, 503, "overloaded")):
            served.engine.error = status
            for path in ("/", "/generate", "/generate_stream"):
                answer = await generate(served, path, adapter_id="sql", max_new_tokens=2)
                assert answer.status_code == told
                assert answer.json() in (
                    {"error": "the engine says no", "error_type": kind},
                    [{"error": "the engine says no", "error_type": kind}],
                )
        served.engine.error = 500
        answer = await generate(served, adapter_id="sql")  # its tokens could not even be counted
        assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")


async def test_a_stream_that_breaks_off_ends_in_an_error(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers) as served:
        assert isinstance(served.engine, SpeakingEngine)
        served.engine.breaks_after = 2
        told = events(await generate(served, "/generate_stream", adapter_id="sql", max_new_tokens=4))
        assert [event.get("error_type") for event in told] == [None, None, "incomplete_generation"]


async def test_limits_hold_for_lorax_requests_as_for_all(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers, max_requests_per_adapter=1, max_body=1) as served:
        heard = served.heard()
        first = asyncio.create_task(served.ask("sql", hold="door"))
        await served.until(lambda: served.engine.asked)
        answer = await generate(served, adapter_id="sql", max_new_tokens=2)
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        assert answer.headers["retry-after"]
        served.engine.gate("door").set()
        await first
        answer = await generate(served, inputs="a" * 2**20)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        await generate(served, adapter_id="sql", max_new_tokens=2)
        assert heard[-1].revision is not None
        assert (heard[-1].model, heard[-1].prompt_tokens, heard[-1].completion_tokens) == ("sql", 3, 2)


async def test_a_client_that_leaves_ends_its_answer(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers) as served:
        body = json.dumps({"inputs": "a", "parameters": {"adapter_id": "sql", "max_new_tokens": 2}}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
        held = asyncio.Event()

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            held.set()
            raise OSError("the client is gone")

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/generate_stream",
            "headers": [(b"content-type", b"application/json")],
        }
        with pytest.raises(OSError, match="gone"):
            await served.gateway(scope, receive, send)
        assert not served.reconciler.residency.find(served.reconciler.resolve("sql").name).in_flight


async def test_a_load_that_the_engine_refuses_is_a_validation_error(tmp_path: Path, numbers: Path) -> None:
    folder = put_adapter(tmp_path / "shelf" / "bad", 7)
    async with speaking(tmp_path, numbers, roots=(str(tmp_path / "shelf"),)) as served:
        served.engine.refuses.add(fingerprint_of(folder))
        answer = await generate(served, adapter_id=str(folder), adapter_source="local")
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert LoadFailed.__name__ not in answer.text


async def test_a_name_that_no_header_can_hold_is_told_in_another_way(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers) as served:
        body = json.dumps({"inputs": "a", "parameters": {"adapter_id": "a\r\nset-cookie: b=ü\ud800"}})
        answer = await served.client.post("/generate", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert "set-cookie" not in answer.headers


async def test_what_is_served_is_told_in_lorax_words(tmp_path: Path, numbers: Path) -> None:
    async with speaking(tmp_path, numbers, max_requests=9) as served:
        said = (await served.client.get("/info")).json()
        assert said["model_id"] == "numbers"
        assert (said["max_input_length"], said["max_total_tokens"], said["max_concurrent_requests"]) == (63, 64, 9)
        described = (await served.client.get("/openapi.json")).json()["paths"]
        assert {"/", "/generate", "/generate_stream", "/info"} <= described.keys()
        assert described["/generate"]["post"]["responses"].keys() >= {"200", "422", "424", "429", "500"}
