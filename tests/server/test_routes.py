"""lorakit's own routes, and vLLM's two that are answered here."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import FakeEngine, fingerprint_of, put_adapter, put_checkpoint, serving
from tests.server.test_gateway import assert_openai_error

pytestmark = pytest.mark.anyio


async def adapter(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    answer = await client.get(f"/v1/adapters/{name}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# /ready and /v1/models


async def test_ready_is_503_until_what_was_named_is_there_or_refused(tmp_path: Path, numbers: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    async with serving(tmp_path, numbers, adapters={"chat": str(folder)}, ready=False) as served:
        await asyncio.sleep(0.1)
        answer = await served.client.get("/ready")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        (folder / "adapter_model.bin").write_bytes(b"")
        (folder / "adapter_config.json").write_text("{}")
        await served.until_ready()
        assert (await served.client.get("/ready")).json()["refused"] == ["chat"]


async def test_models_begin_with_the_base_and_hold_every_name_once(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500, eval_loss=0.5)
    put_checkpoint(tmp_path / "runs" / "sql", 1000)
    put_adapter(tmp_path / "runs" / "chat", 3)
    async with serving(tmp_path, numbers) as served:
        await served.until(lambda: "chat" in served.reconciler.runs)
        await served.client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-500"})
        cards = (await served.client.get("/v1/models")).json()["data"]
        ids = [card["id"] for card in cards]
        assert ids[0] == "numbers"
        assert len(ids) == len(set(ids))
        assert {"sql", "sql@latest", "sql@best", "sql@prod", "chat"} <= set(ids)
        assert "sql@final" not in ids
        for card in cards:
            assert card["object"] == "model"
            answered = await served.revision_of(card["id"])
            assert answered == (card["root"] if card["id"] != "numbers" else "numbers")
            one = (await served.client.get(f"/v1/models/{card['id']}")).json()
            assert one["id"] == card["id"]


async def test_a_name_is_listed_while_its_revision_comes_back_into_the_engine(tmp_path: Path, numbers: Path) -> None:
    for run in ("a", "b"):
        put_checkpoint(tmp_path / "runs" / run, 500, seed=ord(run))
    async with serving(tmp_path, numbers, slots=1) as served:
        gone = "a" if any(name.startswith("b@") for name in served.engine.inside) else "b"
        served.engine.load_seconds = 0.2
        asked = asyncio.create_task(served.ask(gone))
        await asyncio.sleep(0.05)
        ids = [card["id"] for card in (await served.client.get("/v1/models")).json()["data"]]
        assert gone in ids
        for model in (gone, f"{gone}@step-500", f"{gone}@latest"):
            assert (await served.client.get(f"/v1/models/{model}")).status_code == 200
        assert (await asked).status_code == 200


# /v1/adapters


async def test_an_adapter_shows_its_revisions_with_step_losses_and_aliases(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500, eval_loss=0.5)
    put_checkpoint(tmp_path / "runs" / "sql", 1000, eval_loss=float("nan"))
    (tmp_path / "runs" / "sql" / "checkpoint-1500").mkdir()
    put_checkpoint(tmp_path / "runs" / "sql", 2000, rank=32)
    async with serving(tmp_path, numbers) as served:
        await served.ask("sql")
        shown = await adapter(served.client, "sql")
        assert shown["state"] == "ready"
        assert shown["requests"] == 1
        assert shown["aliases"]["latest"] == shown["revision"]
        by_step = {one["step"]: one for one in shown["revisions"]}
        assert {step: one["state"] for step, one in by_step.items()} == {
            500: "ready", 1000: "ready", 1500: "incomplete", 2000: "refused",
        }  # fmt: skip
        assert "--max-lora-rank" in by_step[2000]["reason"]
        assert by_step[500]["eval_loss"] == 0.5
        assert by_step[500]["train_loss"] == 1.5
        assert by_step[1000]["eval_loss"] is None, "JSON has no NaN"
        assert "best" in by_step[500]["aliases"]
        assert {"sql", "latest"} <= set(by_step[1000]["aliases"])
        everything = (await served.client.get("/v1/adapters")).json()["data"]
        assert [one["name"] for one in everything] == ["sql"]


async def test_every_revision_has_the_same_fields_served_or_not_and_its_name_those_of_the_default(
    tmp_path: Path, numbers: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500, eval_loss=0.5)
    put_checkpoint(tmp_path / "runs" / "sql", 1000, rank=32)
    async with serving(tmp_path, numbers) as served:
        shown = await adapter(served.client, "sql")
        ready, refused = shown["revisions"]
        assert ready.keys() == refused.keys()
        assert (ready["residency"], refused["residency"]) == ("memory", None)
        for field in ("step", "epoch", "train_loss", "eval_loss", "state", "reason", "aliases", "requests"):
            assert field in shown
            assert field in ready
        assert (shown["step"], shown["eval_loss"], shown["train_loss"]) == (500, 0.5, 1.5)


async def test_a_name_says_what_a_rollback_of_it_would_lead_to(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        first = await adapter(served.client, "sql")
        assert first["previous"] is None
        put_checkpoint(tmp_path / "runs" / "sql", 1000)
        await served.until(lambda: served.reconciler.resolve("sql").facts.step == 1000)
        assert (await adapter(served.client, "sql"))["previous"] == first["revision"]
        back = (await served.client.post("/v1/adapters/sql/rollback")).json()
        assert back["revision"] == first["revision"]


async def test_a_name_of_which_nothing_is_served_is_shown_with_its_reason(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100, rank=32)
    async with serving(tmp_path, numbers) as served:
        shown = await adapter(served.client, "sql")
        assert (shown["state"], shown["revision"]) == ("refused", None)
        assert "lorakit shrink" in shown["reason"]
        assert_openai_error(await served.client.get("/v1/adapters/nobody"), 404)


async def test_a_folder_whose_name_is_no_text_breaks_no_list(tmp_path: Path, numbers: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "other", 100)
    os.rename(os.fsencode(folder.parent), os.fsencode(tmp_path / "runs") + b"/\xff\xfe")
    async with serving(tmp_path, numbers) as served:
        for path in ("/v1/adapters", "/ready", "/v1/models"):
            assert (await served.client.get(path)).status_code == 200
        (shown,) = (await served.client.get("/v1/adapters")).json()["data"]
        assert shown["state"] == "refused"


async def test_an_adapter_is_added_moved_and_removed(tmp_path: Path, numbers: Path) -> None:
    one, two = put_adapter(tmp_path / "runs" / "x" / "one", 1), put_adapter(tmp_path / "runs" / "x" / "two", 2)
    async with serving(tmp_path, numbers) as served:
        answer = await served.client.post("/v1/adapters", json={"name": "chat", "source": str(one)})
        assert answer.status_code == 201
        first = answer.json()["revision"]
        assert await served.revision_of("chat") == first
        second = (await served.client.post("/v1/adapters", json={"name": "chat", "source": str(two)})).json()
        assert second["revision"] != first
        assert await served.revision_of("chat") == second["revision"]
        back = await served.client.post("/v1/adapters/chat/rollback")
        assert back.json()["revision"] == first == await served.revision_of("chat")
        moved = await served.client.put(
            "/v1/adapters/chat/aliases/prod", json={"revision": second["revision"].partition("@")[2]}
        )
        assert moved.json()["aliases"]["prod"] == second["revision"] == await served.revision_of("chat@prod")
        gone = await served.client.delete("/v1/adapters/chat")
        assert gone.json()["deleted"]
        for model in ("chat", "chat@prod", first):
            assert_openai_error(await served.ask(model), 404)
        assert_openai_error(await served.client.delete("/v1/adapters/chat"), 404)
        await served.until(lambda: not served.engine.inside)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"{}", b'{"name": 3, "source": "/x"}', b'{"name": "a"}', b'{"name": "a", "source": 1}',
     b'{"name": "a", "source": "/x", "surprise": 1}', b'{"name": "latest", "source": "/"}', b"\xff",
     b'{"name": "\\ud800", "source": "/x"}', b'{"name": "a", "source": "\\u0000"}', b'{"name": "a", "source": ""}',
     b'{"name": "a", "source": "https://example.com/a"}', b'{"name": "a", "source": "org/repo"}'],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
async def test_a_body_that_cant_be_read_is_refused_in_openais_shape(tmp_path: Path, numbers: Path, body: bytes) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        headers = {"content-type": "application/json"}
        assert_openai_error(await served.client.post("/v1/adapters", content=body, headers=headers))
        put = await served.client.put("/v1/adapters/sql/aliases/prod", content=body, headers=headers)
        assert_openai_error(put)
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            vllm_body = body.replace(b'"name"', b'"lora_name"').replace(b'"source"', b'"lora_path"')
            assert_openai_error(await served.client.post(path, content=vllm_body, headers=headers))


async def test_unknown_methods_and_paths_have_openais_shape(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        assert_openai_error(await served.client.post("/v1/models"), 405)
        assert_openai_error(await served.client.patch("/v1/adapters"), 405)
        assert_openai_error(await served.client.get("/v1/adapters/a/b/c"), 404)
        assert_openai_error(await served.client.put("/v1/adapters/a/aliases/b", json={"revision": "latest"}), 404)
        assert_openai_error(await served.client.post("/v1/adapters/a/rollback"), 404)


# roots


async def test_only_what_lies_under_a_root_is_loaded(tmp_path: Path, numbers: Path) -> None:
    outside = put_adapter(tmp_path / "outside", 1)
    inside = put_adapter(tmp_path / "roots" / "good", 2)
    (tmp_path / "roots" / "link").symlink_to(outside)
    (tmp_path / "roots-too").mkdir()
    put_adapter(tmp_path / "roots-too" / "a", 3)
    async with serving(tmp_path, numbers, roots=(str(tmp_path / "roots"),)) as served:
        for source in (
            outside, tmp_path / "roots" / "link", tmp_path / "roots" / ".." / "outside", tmp_path / "roots-too" / "a",
            "roots/good", "~/x", "/", "/proc/self/cwd", "good", "org/repo", "file://" + str(inside),
        ):  # fmt: skip
            for path, body in (
                ("/v1/adapters", {"name": "x", "source": str(source)}),
                ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(source)}),
            ):
                answer = await served.client.post(path, json=body)
                assert_openai_error(answer, 400)
                assert "--root" in answer.text or "fetch" in answer.text
        answer = await served.client.post("/v1/adapters", json={"name": "x", "source": str(inside)})
        assert answer.status_code == 201


# vLLM's two


async def test_vllms_load_and_unload_behave_as_vllms_do(tmp_path: Path, numbers: Path) -> None:
    one = put_adapter(tmp_path / "runs" / "x" / "one", 1)
    async with serving(tmp_path, numbers) as served:
        load = {"lora_name": "chat", "lora_path": str(one)}
        answer = await served.client.post("/v1/load_lora_adapter", json=load)
        assert answer.status_code == 200
        assert answer.text == "Success: LoRA adapter 'chat' added successfully."
        assert "chat" in [card["id"] for card in (await served.client.get("/v1/models")).json()["data"]]
        answer = await served.client.post("/v1/unload_lora_adapter", json={"lora_name": "chat", "lora_int_id": 1})
        assert answer.status_code == 200
        assert answer.text == "Success: LoRA adapter 'chat' removed successfully."
        for body in ({"lora_name": "chat"}, {"lora_name": "nobody"}):
            assert_openai_error(await served.client.post("/v1/unload_lora_adapter", json=body), 404)
        for body in ({"lora_name": "", "lora_path": "/x"}, {"lora_name": "a", "lora_path": ""}, {"lora_name": "a"}):
            assert_openai_error(await served.client.post("/v1/load_lora_adapter", json=body), 400)
        missing = {"lora_name": "a", "lora_path": str(tmp_path / "runs" / "nothing")}
        assert_openai_error(await served.client.post("/v1/load_lora_adapter", json=missing), 404)


@pytest.mark.parametrize("inplace", [False, True])
async def test_vllms_load_of_a_name_that_exists_makes_a_new_revision(
    tmp_path: Path, numbers: Path, inplace: bool
) -> None:
    folder = put_adapter(tmp_path / "runs" / "x" / "one", 1)
    async with serving(tmp_path, numbers) as served:
        load = {"lora_name": "chat", "lora_path": str(folder), "load_inplace": inplace}
        await served.client.post("/v1/load_lora_adapter", json=load)
        old, old_text = await served.revision_of("chat"), fingerprint_of(folder)
        other = put_adapter(tmp_path / "other", 2)
        for file in other.iterdir():
            file.replace(folder / file.name)
        assert (await served.client.post("/v1/load_lora_adapter", json=load)).status_code == 200
        assert await served.revision_of("chat") != old
        assert (await served.ask("chat")).json()["choices"][0]["text"] == fingerprint_of(folder)
        assert (await served.ask(old)).json()["choices"][0]["text"] == old_text


async def test_what_the_engine_refuses_is_400_with_its_words(tmp_path: Path, numbers: Path) -> None:
    folder = put_adapter(tmp_path / "runs" / "x" / "one", 1)
    engine = FakeEngine(numbers)
    engine.refuses.add(fingerprint_of(folder))
    async with serving(tmp_path, numbers, engine=engine) as served:
        answer = await served.client.post("/v1/adapters", json={"name": "chat", "source": str(folder)})
        assert_openai_error(answer, 400)
        assert "not loaded here" in answer.text


# /v1/events and the description


async def first_events(served: Any, count: int, last: str | None = None) -> list[dict[str, Any]]:
    """httpx's ASGI transport waits for the whole body, and this one has no end."""
    found: list[dict[str, Any]] = []
    enough = asyncio.Event()
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        for block in message.get("body", b"").decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "data" in lines:
                data = json.loads(lines["data"])
                assert (lines["event"], lines["id"].isdecimal()) == (data["type"], True)
                found.append({**data, "id": int(lines["id"])})
        if len(found) >= count:
            enough.set()

    headers = [(b"last-event-id", last.encode())] if last is not None else []
    scope = {
        "type": "http", "method": "GET", "path": "/v1/events", "raw_path": b"/v1/events", "headers": headers,
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("lorakit", 80), "client": ("c", 1),
        "http_version": "1.1",
    }  # fmt: skip
    async with asyncio.timeout(5):
        await served.gateway(scope, receive, send)
    return found


async def test_events_tell_what_happens_from_where_a_client_broke_off(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        events = await first_events(served, 4)
        assert [event["type"] for event in events] == ["found", "loaded", "alias", "ready"]
        assert [event["id"] for event in await first_events(served, 2, last="2")] == [3, 4]
        late = asyncio.create_task(first_events(served, 1, last="4"))
        put_checkpoint(tmp_path / "runs" / "sql", 200)
        assert (await late)[0]["revision"].startswith("sql@step-200-")


@pytest.mark.parametrize("last", ["", "x", "-1", "9" * 5000, "٣", "99999"])
async def test_an_event_number_that_means_nothing_is_the_beginning(tmp_path: Path, numbers: Path, last: str) -> None:
    async with serving(tmp_path, numbers) as served:
        assert (await first_events(served, 1, last=last))[0]["id"] == 1


async def test_the_description_holds_the_engines_routes_and_lorakits(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        paths = (await served.client.get("/openapi.json")).json()["paths"]
        assert {"/v1/completions", "/v1/adapters", "/v1/adapters/{name}", "/v1/models", "/ready"} <= set(paths)
