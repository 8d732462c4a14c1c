"""What clients see of the gateway, over an engine that answers with the digest of the weights it has."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import EngineFailed
from lorakit.server.gateway import Gateway
from tests.server.fake_engine import (
    FakeEngine,
    Served,
    fingerprint_of,
    nothing,
    overwrite,
    put_adapter,
    put_checkpoint,
    serving,
    settings_for,
)

pytestmark = pytest.mark.anyio


def assert_openai_error(answer: httpx.Response, *statuses: int) -> None:
    assert answer.status_code in (statuses or (400, 404, 422)), answer.text
    error = answer.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["code"] == answer.status_code


async def test_the_base_answers_under_the_last_part_of_its_folder(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        assert await served.revision_of("numbers") == "numbers"


async def test_every_name_of_a_run_answers_with_the_exact_revision(tmp_path: Path, numbers: Path) -> None:
    early = put_checkpoint(tmp_path / "runs" / "sql", 500, eval_loss=0.5)
    late = put_checkpoint(tmp_path / "runs" / "sql", 1000, eval_loss=0.9)
    async with serving(tmp_path, numbers) as served:
        for model, step, folder in [
            ("sql", 1000, late), ("sql@latest", 1000, late), ("sql@best", 500, early), ("sql@step-500", 500, early),
            ("sql@step-1000", 1000, late),
        ]:  # fmt: skip
            answer = await served.ask(model)
            revision = answer.headers["x-lorakit-revision"]
            assert revision.startswith(f"sql@step-{step}-")
            assert answer.json()["model"] == revision
            assert answer.json()["choices"][0]["text"] == fingerprint_of(folder)
            assert await served.revision_of(revision) == revision
            assert await served.revision_of("sql@" + revision.rpartition("-")[2]) == revision


async def test_a_stream_says_its_revision_in_the_header_and_in_every_chunk(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        answer = await served.ask("sql", stream=True)
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        assert {json.loads(line)["model"] for line in lines} == {answer.headers["x-lorakit-revision"]}


async def test_an_error_of_the_engine_names_the_revision_too(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        answer = await served.ask("sql", boom=True)
        assert answer.status_code == 400
        assert answer.headers["x-lorakit-revision"].startswith("sql@step-500-")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_adapter_that_came_back_under_another_engine_name_answers_under_its_own(
    tmp_path: Path, numbers: Path, stream: bool
) -> None:
    for run in ("a", "b"):
        put_checkpoint(tmp_path / "runs" / run, 500, seed=ord(run))
    async with serving(tmp_path, numbers, slots=1) as served:
        for run in ("a", "b", "a", "b"):
            answer = await served.ask(run, stream=stream)
            revision = answer.headers["x-lorakit-revision"]
            assert revision.startswith(f"{run}@step-500-")
            assert revision in answer.text
            assert "#" not in answer.text
            assert "#" not in revision
            if not stream:
                assert int(answer.headers["content-length"]) == len(answer.content)
        assert len(served.engine.loads) == len(set(served.engine.loads)) >= 4


async def test_the_request_reaches_the_engine_as_it_was_but_for_its_model(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        asked = {"model": "sql", "prompt": ["é☃", 1.5, None, {"deep": [True]}], "extra": {"model": "mine"}}
        answer = await served.client.post("/v1/completions", content=json.dumps(asked, ensure_ascii=False).encode())
        assert answer.status_code == 200
        assert served.engine.asked[-1] == {**asked, "model": answer.json()["model"]}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"3", b'"sql"', b"{}", b'{"model": null}', b'{"model": 3}', b'{"model": ["sql"]}',
     b'{"model": {}}', b'{"model": ""}', b'{"model": true}', b"\xff\xfe", b'{"model": "sql"', b"[" * 100_000,
     b'{"model": "sql", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", b'{"model": 1' + b"0" * 5000 + b"}",
     b'{"model": "sql" "prompt": 1}', b"\x00", b'{"model": "\\ud800"}', b'{"model": "sql@\\udfff"}'],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
async def test_a_body_that_names_no_model_is_refused_in_openais_shape(
    tmp_path: Path, numbers: Path, body: bytes
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"):
            assert_openai_error(await served.client.post(path, content=body))


@pytest.mark.parametrize(
    "model",
    ["nobody", "sql@nothing", "sql@", "@sql", "@", "sql@@latest", "sql@step-", "sql@step-5", "sql@step-500-ffffffff",
     "sql@step-99999999999999999999999", "sql@LATEST", "sql@mix", "/etc", "/etc/passwd", "../sql", "runs/sql",
     "./numbers", "mix(", "mix()", "mix(sql=", "mix(sql=0.5", "mix(sql@best=0.7,,)", "mix", "numbers@latest", " ",
     "sql ", "sql\t", "\0", "sql#2", "sql@default", "é", "sql@step-500/..", "http://x/y", "*", "%00", "sql@final"],
)  # fmt: skip
async def test_a_model_that_does_not_exist_is_never_a_500(tmp_path: Path, numbers: Path, model: str) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        assert_openai_error(await served.ask(model))
        assert_openai_error(await served.client.get(f"/v1/models/{quote(model, safe='')}"))
        assert not served.engine.asked


@settings(max_examples=60)
@given(models=st.lists(st.one_of(st.text(), st.from_regex(r"sql@[a-z0-9-]{0,12}"), st.none(), st.floats())))
def test_no_model_field_makes_the_gateway_fail(tmp_path: Path, numbers: Path, models: list[Any]) -> None:
    async def play() -> None:
        async with serving(tmp_path, numbers) as served:
            for model in models:
                body = json.dumps({"model": model, "prompt": "a"})
                answer = await served.client.post("/v1/completions", content=body)
                assert answer.status_code in (400, 404)
                assert answer.json()["error"]["code"] == answer.status_code

    asyncio.run(play())


async def test_a_body_beyond_the_limit_is_refused_before_it_is_read_to_its_end(tmp_path: Path, numbers: Path) -> None:
    given = 0

    async def endless() -> Any:
        nonlocal given
        block = b"x" * (8 * 2**20)
        while True:
            given += len(block)
            yield block

    async with serving(tmp_path, numbers) as served:
        messages: list[Any] = []
        parts = endless()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": await anext(parts), "more_body": True}

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await served.gateway(scope, receive, send)
        await parts.aclose()
        assert messages[0]["status"] == 413
        assert given <= 2**28 + 2**24


async def test_a_run_without_a_ready_revision_is_404_and_says_why(tmp_path: Path, numbers: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 500)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    async with serving(tmp_path, numbers) as served:
        answer = await served.ask("sql")
        assert_openai_error(answer, 404)
        assert "it is incomplete (adapter_model.safetensors: " in answer.json()["error"]["message"]


async def test_an_alias_moves_only_after_its_revision_is_in_the_engine(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        first = await served.revision_of("sql")
        served.engine.load_seconds = 0.2
        put_checkpoint(tmp_path / "runs" / "sql", 1000)
        await served.until(lambda: len(served.engine.loads) == 2)
        for model in ("sql", "sql@latest"):
            assert await served.revision_of(model) == first
        assert_openai_error(await served.ask("sql@step-1000"), 404)

        async def moved() -> bool:
            return await served.revision_of("sql") != first

        await served.until(moved)
        assert len(served.engine.inside) == 2


def meant(served: Served) -> str:
    revision = served.reconciler.resolve("sql")
    assert revision is not None
    return revision.label


async def test_under_load_every_answer_is_wholly_of_one_revision_and_none_fails(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    folders = {500: put_checkpoint(run, 500)}
    async with serving(tmp_path, numbers, slots=2) as served:
        fingerprints: dict[str, str] = {}
        ends = asyncio.Event()

        async def keep_asking(stream: bool) -> list[httpx.Response]:
            answers = []
            while not ends.is_set():
                answers.append(await served.ask("sql", stream=stream))
                await asyncio.sleep(0)
            return answers

        clients = [asyncio.create_task(keep_asking(bool(number % 2))) for number in range(6)]
        for step in (1000, 1500, 2000):
            folders[step] = put_checkpoint(run, step)
            await served.until(lambda step=step: meant(served) == f"step-{step}")
            answered = len(served.engine.asked)
            await served.until(lambda answered=answered: len(served.engine.asked) > answered + 12)
        ends.set()
        for step, folder in folders.items():
            fingerprints[f"step-{step}"] = fingerprint_of(folder)
        seen = set()
        for answer in [answer for answers in await asyncio.gather(*clients) for answer in answers]:
            assert answer.status_code == 200
            revision = answer.headers["x-lorakit-revision"]
            step_name = revision.partition("@")[2].rpartition("-")[0]
            seen.add(step_name)
            assert revision in answer.text
            expected = fingerprints[step_name]
            if answer.headers["content-type"].startswith("application/json"):
                assert answer.json()["choices"][0]["text"] == expected
            else:
                assert f'"text":"{expected[0]}"' in answer.text
        assert seen == set(fingerprints)


async def test_a_revision_leaves_only_after_its_last_request(tmp_path: Path, numbers: Path) -> None:
    for run in ("a", "b"):
        put_checkpoint(tmp_path / "runs" / run, 500, seed=ord(run))
    async with serving(tmp_path, numbers, slots=1) as served:
        held = asyncio.create_task(served.ask("a", hold="x"))
        await served.until(lambda: any(request.get("hold") for request in served.engine.asked))
        other = asyncio.create_task(served.ask("b"))
        await asyncio.sleep(0.05)
        assert not other.done()
        served.engine.gate("x").set()
        assert (await held).json()["model"].startswith("a@")
        assert (await other).json()["model"].startswith("b@")


async def test_when_no_slot_becomes_free_the_request_is_503_with_retry_after(tmp_path: Path, numbers: Path) -> None:
    for run in ("a", "b"):
        put_checkpoint(tmp_path / "runs" / run, 500, seed=ord(run))
    async with serving(tmp_path, numbers, slots=1, load_wait=0.05) as served:
        held = asyncio.create_task(served.ask("a", hold="x"))
        await served.until(lambda: any(request.get("hold") for request in served.engine.asked))
        answer = await served.ask("b")
        assert_openai_error(answer, 503)
        assert int(answer.headers["retry-after"]) > 0
        served.engine.gate("x").set()
        await held


async def test_many_adapters_share_few_slots_and_all_answer(tmp_path: Path, numbers: Path) -> None:
    runs = [f"r{number}" for number in range(6)]
    for number, run in enumerate(runs):
        put_checkpoint(tmp_path / "runs" / run, 500, seed=number)
    async with serving(tmp_path, numbers, slots=2, load_wait=20) as served:
        answers = await asyncio.gather(*(served.ask(run, stream=bool(turn % 2)) for turn in range(4) for run in runs))
        for answer, run in zip(answers, runs * 4, strict=True):
            assert answer.status_code == 200
            assert answer.headers["x-lorakit-revision"].startswith(f"{run}@step-500-")


async def test_a_client_that_goes_away_reaches_the_engine_and_frees_its_adapter(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "a", 500)
    async with serving(tmp_path, numbers) as served:
        gone = asyncio.Event()
        body = json.dumps({"model": "a", "hold": "for ever"}).encode()
        messages = iter([{"type": "http.request", "body": body[:5], "more_body": True},
                         {"type": "http.request", "body": body[5:], "more_body": False}])  # fmt: skip

        async def receive() -> Any:
            if message := next(messages, None):
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None: ...

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        asked = asyncio.create_task(served.gateway(scope, receive, send))
        await served.until(lambda: served.engine.asked)
        gone.set()
        await asked
        assert served.engine.disconnected == 1
        residency = served.reconciler.residency
        assert [residency.find(name).in_flight for name in residency.names] == [0]  # type: ignore[union-attr]


async def test_an_engine_that_fails_in_the_middle_of_an_answer_frees_its_adapter(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "a", 500)
    async with serving(tmp_path, numbers) as served:

        async def fails(*_: Any) -> None:
            raise OSError("broken")

        served.engine.answer = fails  # type: ignore[method-assign]
        with pytest.raises(OSError, match="broken"):
            await served.ask("a")
        residency = served.reconciler.residency
        assert [residency.find(name).in_flight for name in residency.names] == [0]  # type: ignore[union-attr]


async def test_overwriting_or_removing_the_run_changes_no_answer_of_what_is_served(
    tmp_path: Path, numbers: Path
) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 500)
    before = fingerprint_of(folder)
    async with serving(tmp_path, numbers, slots=1) as served:
        revision = await served.revision_of("sql")
        overwrite(folder, seed=77)
        after = fingerprint_of(folder)
        assert before != after

        async def moved() -> bool:
            return await served.revision_of("sql") != revision

        await served.until(moved)
        shutil.rmtree(tmp_path / "runs" / "sql")
        for model, text in ((revision, before), ("sql", after), (revision, before), ("sql@step-500", after)):
            assert (await served.ask(model)).json()["choices"][0]["text"] == text


async def test_after_a_restart_everything_answers_though_its_sources_are_gone(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500, eval_loss=0.1)
    put_checkpoint(tmp_path / "runs" / "sql", 1000, eval_loss=0.2)
    put_adapter(tmp_path / "runs" / "chat", 9)
    names = ("sql", "sql@latest", "sql@best", "sql@step-500", "sql@prod", "chat")
    async with serving(tmp_path, numbers) as served:
        await served.client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-500"})
        before = {name: await served.revision_of(name) for name in names}
        assert None not in before.values()
    shutil.rmtree(tmp_path / "runs")
    async with serving(tmp_path, numbers, slots=1, ready=False) as served:
        assert {name: await served.revision_of(name) for name in names} == before, "before /ready even"
        await served.until_ready()
        assert {name: await served.revision_of(name) for name in names} == before


async def test_while_the_engine_does_not_answer_every_request_is_503_at_once(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        served.engine.dead = True
        for method, path in [
            ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/ready"), ("POST", "/v1/completions"),
            ("GET", "/v1/adapters"), ("DELETE", "/v1/adapters/sql"), ("GET", "/whatever"),
        ]:  # fmt: skip
            answer = await served.client.request(method, path, content=b"{}")
            assert_openai_error(answer, 503)
            assert int(answer.headers["retry-after"]) > 0


async def test_before_it_has_begun_every_request_is_503() -> None:
    transport = httpx.ASGITransport(Gateway(nothing))
    async with httpx.AsyncClient(transport=transport, base_url="http://lorakit") as client:
        for path in ("/health", "/ready", "/v1/models"):
            assert_openai_error(await client.get(path), 503)


async def test_a_base_that_answers_with_no_number_does_not_start(tmp_path: Path, numbers: Path) -> None:
    engine = FakeEngine(numbers)
    engine.base_is_broken = True
    with pytest.raises(EngineFailed, match="nan"):
        await Gateway(nothing).begin(engine, settings_for(tmp_path))


@pytest.mark.parametrize("path", ["/adapters", "/adapters/sql", "/invocations"])
async def test_the_engines_other_ways_in_are_closed(tmp_path: Path, numbers: Path, path: str) -> None:
    async with serving(tmp_path, numbers) as served:
        for method in ("POST", "DELETE", "GET"):
            assert_openai_error(await served.client.request(method, path, json={"name": "x", "src": "/etc"}), 404)


async def test_without_a_model_tokenize_means_the_base(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        answer = await served.client.post("/tokenize", json={"prompt": "a"})
        assert answer.headers["x-lorakit-revision"] == "numbers"
        assert_openai_error(await served.client.post("/tokenize", json={"model": "nobody", "prompt": "a"}), 404)


async def test_a_route_that_nobody_knows_yet_reaches_a_model_through_the_gateway_alone(
    tmp_path: Path, numbers: Path
) -> None:
    async with serving(tmp_path, numbers) as served:
        assert_openai_error(await served.client.post("/v1/of-tomorrow", json={"model": "nobody"}), 404)
        assert_openai_error(await served.client.post("/v1/of-tomorrow", json={"model": "/etc"}), 404)
        assert (await served.client.post("/v1/of-tomorrow", json={"x": 1})).json() == {"detail": "Not Found"}


async def test_a_route_that_the_base_has_not_is_404_in_openais_shape(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        answer = await served.client.post("/v1/embeddings", json={"model": "numbers", "input": "a"})
        assert_openai_error(answer, 404)
        assert "/v1/embeddings" in answer.json()["error"]["message"]


async def test_what_is_not_lorakits_goes_to_the_engine(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        assert (await served.client.get("/load")).json() == {"detail": "Not Found"}


class TestWithAKey:
    @pytest.fixture(autouse=True)
    def key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORAKIT_API_KEY", "sekret")

    @pytest.mark.parametrize("given", [None, "sekret", "Bearer ", "Bearer sekre", "Bearer sekrett", "Basic sekret"])
    async def test_without_the_key_it_is_401_in_openais_shape(
        self, tmp_path: Path, numbers: Path, given: str | None
    ) -> None:
        async with serving(tmp_path, numbers) as served:
            headers = {"Authorization": given} if given else {}
            for method, path in [
                ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/adapters"), ("GET", "/metrics"),
                ("POST", "/v1/load_lora_adapter"), ("GET", "/v1/events"), ("POST", "/adapters"), ("POST", "/tokenize"),
                ("GET", "//v1/models"), ("GET", "/v1/models/"), ("POST", "/health/../v1/completions"),
            ]:  # fmt: skip
                request = served.client.build_request(method, "/", json={"model": "numbers"}, headers=headers)
                request.url = request.url.copy_with(raw_path=path.encode())
                assert_openai_error(await served.client.send(request), 401)

    async def test_a_websocket_without_the_key_is_closed(self, tmp_path: Path, numbers: Path) -> None:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        asked = {"type": "websocket", "path": "/v1/realtime", "headers": []}
        await Gateway(nothing)(asked, receive, send)
        async with serving(tmp_path, numbers) as served:
            await served.gateway(asked, receive, send)
        assert [(message["type"], message["code"]) for message in sent] == [
            ("websocket.close", 1013), ("websocket.close", 1008)
        ]  # fmt: skip

    async def test_with_the_key_it_answers_and_health_needs_none(self, tmp_path: Path, numbers: Path) -> None:
        async with serving(tmp_path, numbers) as served:
            headers = {"Authorization": "Bearer sekret"}
            answer = await served.client.post("/v1/completions", json={"model": "numbers"}, headers=headers)
            assert answer.status_code == 200
            for path in ("/ready", "/openapi.json"):
                assert (await served.client.get(path)).status_code == 200
