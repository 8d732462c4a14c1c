"""Two keys, and what each can see and learn of the other's: through every route there is."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.server.access import keyring as module
from lorakit.server.requests.asking import MODEL_ROUTES
from lorakit.server.sight import events
from lorakit.server.sight.logs import log
from lorakit.store.keys import Allowance, KeyStore, Rate
from tests.server.fake_engine import FakeEngine, Served, put_adapter, put_checkpoint, serving
from tests.server.test_gateway import assert_openai_error

pytestmark = pytest.mark.anyio

ENDLESS = {"/v1/events"}
BY_QUERY = {"/v1/comparisons"}  # what is asked for by name there
MANY_NAMES = {"/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize"}  # of those that ask a model alike
METHODS = ("get", "post", "put", "delete", "patch")


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyStore]:
    monkeypatch.delenv("LORAKIT_API_KEY", raising=False)
    monkeypatch.setattr(module, "LOOK", 0.02)
    store = KeyStore(tmp_path / "home")
    yield store
    store.close()


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


async def until_known(served: Served, text: str) -> None:
    async def known() -> bool:
        return (await served.client.get("/v1/models", headers=bearer(text))).status_code == 200

    await served.until(known)


# one key


async def test_the_first_key_turns_authentication_on_and_a_revoked_one_does_not_turn_it_off(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        assert (await served.client.get("/v1/models", headers=bearer("whatever"))).status_code == 200
        text, key = keys.create(Allowance(("sql",)))

        async def status(given: str) -> int:
            return (await served.client.get("/v1/models", headers=bearer(given))).status_code

        async def refused(given: str) -> bool:
            return await status(given) == 401

        await served.until(lambda: refused("whatever"))
        assert await status(text) == 200
        assert (await served.client.get("/v1/models", headers={"x-api-key": text})).status_code == 200
        assert (await served.client.get("/v1/models", headers={"Authorization": f"bearer {text}"})).status_code == 200
        for wrong in (text[:-1], text + "x", text.upper(), "", key.digest, key.id):
            assert await refused(wrong)
        for place in (f"/v1/models?api_key={text}", f"/v1/models?key={text}"):
            assert (await served.client.get(place)).status_code == 401
        keys.revoke(key.id)
        await served.until(lambda: refused(text))
        assert await refused("whatever")
        assert (await served.client.get("/health")).status_code != 401


async def test_a_key_calls_its_own_adapters_under_each_of_their_names(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    async with two(tmp_path, numbers, keys) as there:
        for model in ("alpha", "alpha@latest", "alpha@step-100", "numbers", "mix(alpha=0.5,alpha2=1)", "amix"):
            answer = await there.ask(there.alpha, model)
            assert answer.status_code == 200, answer.text
        ids = [card["id"] for card in (await there.get(there.alpha, "/v1/models")).json()["data"]]
        assert {"numbers", "alpha", "alpha@latest", "alpha2", "amix"} <= set(ids)
        for id in ids:
            assert (await there.get(there.alpha, f"/v1/models/{id}")).json()["id"] == id
        names = [one["name"] for one in (await there.get(there.alpha, "/v1/adapters")).json()["data"]]
        assert names == ["alpha", "alpha2"]
        assert (await there.get(there.alpha, "/ready")).json()["adapters"] == ["alpha", "alpha2"]
        named = [one["name"] for one in (await there.get(there.alpha, "/v1/mixes")).json()["data"]]
        assert "amix" in named


async def test_without_the_base_a_key_has_adapters_alone(tmp_path: Path, numbers: Path, keys: KeyStore) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    text, _ = keys.create(Allowance(("sql",), base=False))
    async with serving(tmp_path, numbers, headers=bearer(text)) as served:
        assert await served.revision_of("sql")
        assert (await served.ask("numbers")).text == (await served.ask("nowhere")).text.replace("nowhere", "numbers")
        assert_openai_error(await served.client.post("/tokenize", json={"prompt": "a"}), 404)
        assert "numbers" not in [card["id"] for card in (await served.client.get("/v1/models")).json()["data"]]


# two keys


@dataclass
class Two:
    """A server with the adapters of two; `alpha` and `admin` are keys of the first one's."""

    served: Served
    folder: Path
    alpha: str
    admin: str
    beta: str
    root: str

    async def ask(self, key: str, model: str, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": "a", **more}
        return await self.served.client.post("/v1/completions", json=body, headers=bearer(key))

    async def get(self, key: str, path: str) -> httpx.Response:
        return await self.served.client.get(path, headers=bearer(key))

    def digests(self, run: str) -> list[str]:
        runs = self.served.reconciler.runs
        return [revision.digest[:8] for revision in runs[run].revisions.values()]

    async def digests_of_beta(self) -> list[str]:
        return sorted({digest for name in await self.names_of_beta() for digest in re.findall("[0-9a-f]{8}", name)})

    async def names_of_beta(self) -> list[str]:
        """Whatever names something that the second one has."""
        mixes = (await self.get(self.root, "/v1/mixes")).json()["data"]
        own = [mix["id"] for mix in mixes if "beta" in mix["mix"]] + [
            mix["revision"] for mix in mixes if "beta" in mix["mix"]
        ]
        (digest,) = self.digests("beta")
        return [
            "beta", "beta@latest", "beta@best", "beta@step-100", f"beta@step-100-{digest}", f"beta@{digest}",
            "beta@prod", "beta@step-7", "beta-broken", "mix(beta=1)", "mix(alpha=1,beta=1)", "mix(beta=1,alpha=1)",
            "mix(beta@step-100=1)", "mix(bmix=1)", *dict.fromkeys(own),
        ]  # fmt: skip


FOREIGN = {"beta": "zeta", "bmix": "zmix", "cmix": "xmix", "resp_0": "resp_9"}


def elsewhere(text: str, digests: Sequence[str] = ()) -> str:
    """The same of what does not exist."""
    for word, other in [*FOREIGN.items(), *((digest, digest[::-1]) for digest in digests)]:
        text = text.replace(word, other)
    return text


@asynccontextmanager
async def two(folder: Path, base: Path, keys: KeyStore) -> AsyncIterator[Two]:
    runs = folder / "runs"
    put_checkpoint(runs / "alpha", 100, seed=1)
    put_checkpoint(runs / "alpha2", 100, seed=2)
    put_checkpoint(runs / "beta", 100, seed=3, eval_loss=0.5)
    put_checkpoint(runs / "beta-broken", 100, seed=4, rank=32)
    put_adapter(folder / "roots" / "new", 5)
    texts = [
        keys.create(allowance)[0]
        for allowance in (
            Allowance(("alpha*",)), Allowance(("alpha*",), admin=True), Allowance(("beta*",)), Allowance(admin=True)
        )
    ]  # fmt: skip
    async with serving(
        folder, base, headers=None, slots=8, roots=(str(folder / "roots"),), max_mix_error=9.0
    ) as served:
        there = Two(served, folder, *texts)
        for name, mix in (
            ("amix", "mix(alpha=1,alpha2=0.5)"),
            ("bmix", "mix(beta=0.5)"),
            ("cmix", "mix(alpha=1,beta=1)"),
        ):
            made = await served.client.post("/v1/mixes", json={"name": name, "mix": mix}, headers=bearer(there.root))
            assert made.status_code == 201, made.text
        moved = await served.client.put(
            "/v1/adapters/beta/aliases/prod", json={"revision": "step-100"}, headers=bearer(there.root)
        )
        assert moved.status_code == 200, moved.text
        assert (await there.ask(there.beta, "mix(beta=0.25)")).status_code == 200
        yield there


def requests_for(path: str, method: str, name: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """The paths and bodies by which a route can be asked about something of a name. A route that is not known here has
    to be added, with what it takes."""
    model = name.partition("@")[0]
    filled = path.replace("{model}", name).replace("{name}", model).replace("{alias}", "prod")
    filled = filled.replace("{response_id}", name).replace("{job}", model)
    assert "{" not in filled, f"what stands in {path}? Say so here, so that it is tried with two keys"
    new = str(folder / "roots" / "new")
    bodies: dict[str, Any] = {
        "/v1/adapters": {"name": model, "source": new},
        "/v1/adapters/{name}/aliases/{alias}": {"revision": name},
        "/v1/load_lora_adapter": {"lora_name": model, "lora_path": new},
        "/v1/unload_lora_adapter": {"lora_name": model},
        "/v1/mixes": {"name": "alpha-mix", "mix": name if name.startswith("mix(") else f"mix({name}=1)"},
    }
    if path in BY_QUERY:
        yield str(httpx.URL(path, params={"adapter": ["alpha", name]})), None
    elif path in MODEL_ROUTES:
        yield filled, {"model": name, "prompt": "a", "messages": []}
    elif path in ("/", "/generate", "/generate_stream"):
        yield filled, {"inputs": "a", "parameters": {"adapter_id": name}}
    elif method in ("get", "delete") or path == "/v1/adapters/{name}/rollback":
        yield filled, None
    elif path in bodies:
        yield filled, bodies[path]
    elif path.startswith("/v1/responses/"):
        yield filled, {}
    else:
        raise AssertionError(f"what does {method.upper()} {path} take? Say so here, so that it is tried with two keys")


async def routes_of(served: Served) -> list[tuple[str, str]]:
    """All that the server describes, and what it takes beside that."""
    described = (await served.client.get("/openapi.json")).json()["paths"]
    found = {(path, method) for path, how in described.items() for method in METHODS if method in how}
    found |= {(path, "post") for path in MODEL_ROUTES}
    found |= {("/v1/responses/{response_id}", "get"), ("/v1/responses/{response_id}/cancel", "post")}
    return sorted((path, method) for path, method in found if path not in ENDLESS)


def seen(answer: httpx.Response) -> tuple[int, list[tuple[str, str]], str]:
    """All that a client sees of an answer, but for the request's id."""
    headers = [(key, value) for key, value in answer.headers.multi_items() if key != "x-request-id"]
    return answer.status_code, headers, answer.text


def seen_elsewhere(answer: httpx.Response, digests: Sequence[str] = ()) -> tuple[int, list[tuple[str, str]], str]:
    """The same, as if what was asked for had been what does not exist."""
    status, headers, text = seen(answer)
    return status, [(key, elsewhere(value, digests)) for key, value in headers], elsewhere(text, digests)


async def test_what_is_anothers_answers_as_what_does_not_exist_on_every_route(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    async with two(tmp_path, numbers, keys) as there:
        client, tried = there.served.client, 0
        names, digests = await there.names_of_beta(), await there.digests_of_beta()
        before = (await there.get(there.root, "/v1/adapters")).json()
        assert {"bmix", "cmix"} <= set(names)
        for path, method in await routes_of(there.served):
            if method == "get" and "{" not in path and path not in BY_QUERY:
                continue  # which asks for nothing by name
            for name in names if path in MANY_NAMES or path not in MODEL_ROUTES else names[::4]:
                pairs = zip(
                    requests_for(path, method, name, tmp_path),
                    requests_for(path, method, elsewhere(name, digests), tmp_path), strict=True,
                )  # fmt: skip
                for (foreign, foreign_body), (missing, missing_body) in pairs:
                    for key in (there.alpha, there.admin):
                        one = await client.request(method, foreign, json=foreign_body, headers=bearer(key))
                        other = await client.request(method, missing, json=missing_body, headers=bearer(key))
                        assert seen_elsewhere(one, digests) == seen(other), (method, foreign, foreign_body)
                        assert one.status_code < 500 or one.status_code == 503, one.text
                        tried += 1
        assert tried > 400
        assert (await there.get(there.root, "/v1/adapters")).json()["data"] == before["data"]
        mixes = {mix["name"] for mix in (await there.get(there.root, "/v1/mixes")).json()["data"]}
        assert {"bmix", "cmix"} <= mixes


async def test_a_form_names_no_model_of_anothers_either(tmp_path: Path, numbers: Path, keys: KeyStore) -> None:
    async with two(tmp_path, numbers, keys) as there:

        async def transcribe(model: str) -> httpx.Response:
            return await there.served.client.post(
                "/v1/audio/transcriptions", data={"model": model}, files={"file": b"RIFF"}, headers=bearer(there.alpha)
            )

        assert (await transcribe("alpha")).status_code == 200
        foreign = await transcribe("beta")
        assert_openai_error(foreign, 404)
        assert seen_elsewhere(foreign) == seen(await transcribe("zeta"))


async def test_nothing_that_is_listed_or_told_names_what_is_anothers(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    async with two(tmp_path, numbers, keys) as there:
        (digest,) = there.digests("beta")
        unnamed = [mix["revision"] for mix in (await there.get(there.root, "/v1/mixes")).json()["data"]]
        told = await events_for(there, there.alpha)
        assert any(event["type"] == "alias" and event["adapter"] == "alpha" for event in told)
        texts = [json.dumps(told)]
        for path, method in await routes_of(there.served):
            if method == "get" and "{" not in path:
                for key in (there.alpha, there.admin):
                    texts.append((await there.get(key, path)).text)
        for text in texts:
            assert not re.search("beta|bmix|cmix", text), text
            assert digest not in text
        shown = "".join(texts)
        assert [mix for mix in unnamed if mix in shown] == [
            mix["revision"]
            for mix in (await there.get(there.root, "/v1/mixes")).json()["data"]
            if mix["name"] == "amix"
        ]
        assert (await there.get(there.alpha, "/metrics")).status_code == 403
        assert (await there.get(there.admin, "/metrics")).status_code == 403
        assert "beta" in (await there.get(there.root, "/metrics")).text


async def events_for(there: Two, key: str, last: str | None = None) -> list[dict[str, Any]]:
    """What comes at once."""
    found: list[dict[str, Any]] = []
    ends = asyncio.Event()
    begun = False

    async def receive() -> dict[str, Any]:
        nonlocal begun
        if not begun:
            begun = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await ends.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        for block in message.get("body", b"").decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines())
            if "data" in lines:
                found.append({**json.loads(lines["data"]), "id": lines["id"]})

    headers = [(b"authorization", f"Bearer {key}".encode())]
    if last is not None:
        headers.append((b"last-event-id", last.encode()))
    scope = {
        "type": "http", "method": "GET", "path": "/v1/events", "raw_path": b"/v1/events", "headers": headers,
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("lorakit", 80), "client": ("c", 1),
        "http_version": "1.1",
    }  # fmt: skip
    asking = asyncio.create_task(there.served.gateway(scope, receive, send))
    kept = there.served.reconciler.events.kept

    async def answered() -> bool:
        expected = [event for event in kept if event.data.get("adapter") == "alpha"]
        return len(found) >= len(expected)

    await there.served.until(answered if last is None else lambda: True)
    await asyncio.sleep(0)
    ends.set()
    await asking
    return found


async def test_the_numbers_of_events_say_nothing_of_how_many_others_there_were(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    async with two(tmp_path, numbers, keys) as there:
        told = await events_for(there, there.alpha)
        ids = [int(event["id"]) for event in told]
        everything = there.served.reconciler.events.kept
        assert len(set(ids)) == len(ids) < len(everything)
        assert not set(ids) & set(range(len(everything) + 1))
        for event in told:
            assert event.get("adapter", "mix").startswith("alpha") or event["mix"].startswith("mix(alpha")
        assert not any("beta" in json.dumps(event) for event in told)


async def test_a_stream_of_events_ends_with_its_key(
    tmp_path: Path, numbers: Path, keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "STILL", 0.05)
    text, key = keys.create(Allowance())
    other, _ = keys.create(Allowance())
    async with serving(tmp_path, numbers, headers=bearer(text)) as served:
        streaming = asyncio.create_task(served.client.get("/v1/events"))  # which waits for the end
        keyring = served.gateway._keyring
        assert keyring is not None
        await served.until(lambda: key.id in keyring._used)  # it has come in
        keys.revoke(key.id)
        assert (await asyncio.wait_for(streaming, 60)).status_code == 200
        assert (await served.client.get("/v1/models")).status_code == 401
        assert (await served.client.get("/v1/models", headers=bearer(other))).status_code == 200


async def test_an_answer_that_another_asked_for_is_not_there(tmp_path: Path, numbers: Path, keys: KeyStore) -> None:
    async with two(tmp_path, numbers, keys) as there:
        client = there.served.client
        there.served.engine.gate("g").set()
        asked = {"model": "beta", "input": "a", "background": True, "later": "g"}
        made = (await client.post("/v1/responses", json=asked, headers=bearer(there.beta))).json()
        id, none = made["id"], elsewhere(made["id"])
        assert (await there.get(there.beta, f"/v1/responses/{id}")).status_code == 200
        assert (await there.get(there.root, f"/v1/responses/{id}")).status_code == 200
        for key in (there.alpha, there.admin):
            for path in ("/v1/responses/{}", "/v1/responses/{}/input_items"):
                one, other = await there.get(key, path.format(id)), await there.get(key, path.format(none))
                assert_openai_error(one, 404)
                assert seen_elsewhere(one) == seen(other)
            follow = [
                await client.post(
                    "/v1/responses", json={"model": "alpha", "input": "a", "previous_response_id": which},
                    headers=bearer(key),
                )
                for which in (id, none)
            ]  # fmt: skip
            assert_openai_error(follow[0], 404)
            assert seen_elsewhere(follow[0]) == seen(follow[1])
        assert (await client.options(f"/v1/responses/{id}")).headers.get("x-lorakit-revision") is None


async def test_what_is_done_to_adapters_takes_an_admin_and_what_is_the_servers_one_for_all(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    async with two(tmp_path, numbers, keys) as there:
        client, new = there.served.client, str(tmp_path / "roots" / "new")
        changes: list[tuple[str, str, Any]] = [
            ("POST", "/v1/adapters", {"name": "alpha3", "source": new}),
            ("PUT", "/v1/adapters/alpha/aliases/prod", {"revision": "step-100"}),
            ("POST", "/v1/mixes", {"name": "alpha-mix", "mix": "mix(alpha=0.25)"}),
            ("DELETE", "/v1/mixes/alpha-mix", None),
            ("DELETE", "/v1/adapters/alpha3", None),
        ]
        for method, path, body in changes:
            assert_openai_error(await client.request(method, path, json=body, headers=bearer(there.alpha)), 403)
            answer = await client.request(method, path, json=body, headers=bearer(there.admin))
            assert answer.status_code in (200, 201), answer.text
        for path in ("/metrics", "/load", "/server_info", "/v1/of-tomorrow"):
            for key in (there.alpha, there.admin):
                assert_openai_error(await there.get(key, path), 403)
            assert (await there.get(there.root, path)).status_code in (200, 404)
        for method, path, body in (
            ("POST", "/v1/adapters", {"name": "other", "source": new}),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "other", "lora_path": new}),
            ("POST", "/v1/mixes", {"name": "other", "mix": "mix(alpha=1)"}),
        ):  # fmt: skip
            assert_openai_error(await client.request(method, path, json=body, headers=bearer(there.admin)), 403)
        assert (await there.ask(there.admin, "alpha")).status_code == 200
        assert (await there.ask(there.root, "beta")).status_code == 200


async def test_what_another_is_served_from_is_not_to_be_loaded_under_a_name_of_ones_own(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    async with two(tmp_path, numbers, keys) as there:
        served, runs = there.served, tmp_path / "runs"
        (tmp_path / "roots" / "link").symlink_to(runs / "beta")
        for source in (
            runs / "beta" / "checkpoint-100", runs / "beta", runs, tmp_path, runs / "zeta" / "checkpoint-100",
            tmp_path / "roots" / "link", tmp_path / "roots" / ".." / "runs" / "beta",
        ):  # fmt: skip
            for path, body in (
                ("/v1/adapters", {"name": "alpha-mine", "source": str(source)}),
                ("/v1/load_lora_adapter", {"lora_name": "alpha-mine", "lora_path": str(source)}),
            ):
                answer = await served.client.post(path, json=body, headers=bearer(there.admin))
                assert_openai_error(answer, 400)
                assert "is not under a folder" in answer.text
        body = {"name": "mine", "source": str(runs / "beta" / "checkpoint-100")}
        assert (await served.client.post("/v1/adapters", json=body, headers=bearer(there.root))).status_code == 201


async def test_how_busy_anothers_adapter_is_is_not_to_be_learned(tmp_path: Path, numbers: Path, keys: KeyStore) -> None:
    put_checkpoint(tmp_path / "runs" / "beta", 100)
    alpha, beta = keys.create(Allowance(("alpha",)))[0], keys.create(Allowance(("beta",)))[0]
    async with serving(tmp_path, numbers, max_requests_per_adapter=1) as served:

        async def ask(key: str, model: str, **more: Any) -> httpx.Response:
            body = {"model": model, "prompt": "a", **more}
            return await served.client.post("/v1/completions", json=body, headers=bearer(key))

        held = asyncio.create_task(ask(beta, "beta", hold="h"))
        await served.until(lambda: served.engine.asked)
        assert (await ask(beta, "beta")).status_code == 429
        assert seen_elsewhere(await ask(alpha, "beta")) == seen(await ask(alpha, "zeta"))
        served.engine.gate("h").set()
        assert (await held).status_code == 200


# limits


async def test_a_key_with_a_rate_is_told_when_to_come_again_and_others_are_not_held_up(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    slow, fast = keys.create(Allowance(rate=Rate(2, 3600.0)))[0], keys.create(Allowance())[0]
    async with serving(tmp_path, numbers) as served:
        for _ in range(2):
            assert (await served.client.get("/v1/models", headers=bearer(slow))).status_code == 200
        answer = await served.client.get("/v1/models", headers=bearer(slow))
        assert_openai_error(answer, 429)
        assert 0 < int(answer.headers["retry-after"]) <= 1800
        assert (await served.client.get("/v1/models", headers=bearer(fast))).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_counted_by_key_and_day_through_a_restart(
    tmp_path: Path, numbers: Path, keys: KeyStore, stream: bool
) -> None:
    text, key = keys.create(Allowance(tokens=12))
    other = keys.create(Allowance())[0]
    asked = 0
    async with serving(tmp_path, numbers, headers=bearer(text)) as served:
        while (answer := await served.ask("numbers", stream=stream)).status_code == 200:
            asked += 1
        assert_openai_error(answer, 429)
        assert "midnight" in answer.text
        assert 0 < int(answer.headers["retry-after"]) <= 86_400
        assert (await served.client.get("/v1/models")).status_code == 200, "what asks no model costs no tokens"
        assert (
            await served.client.post("/v1/completions", json={"model": "numbers"}, headers=bearer(other))
        ).is_success
    assert asked == 2  # of 3 and 5 tokens
    async with serving(tmp_path, numbers, headers=bearer(text)) as served:
        assert_openai_error(await served.ask("numbers"), 429)
    (spent,) = [keys.tokens_on(day)[key.id] for day in [module._today()]]
    assert spent == 16
    assert next(one for one in keys.all() if one.id == key.id).used is not None


async def test_a_stream_says_what_it_used_to_the_server_and_to_a_client_that_asked(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    limited, free = keys.create(Allowance(tokens=1000))[0], keys.create(Allowance())[0]
    async with serving(tmp_path, numbers) as served:
        heard = served.heard()

        async def stream(key: str, **more: Any) -> str:
            body = {"model": "numbers", "prompt": "a", "stream": True, **more}
            return (await served.client.post("/v1/completions", json=body, headers=bearer(key))).text

        plain = await stream(free)
        assert "usage" not in plain
        assert await stream(limited) == plain
        assert [answer.prompt_tokens for answer in heard] == [None, 3]
        wanted = {"stream_options": {"include_usage": True}}
        assert '"completion_tokens":5' in await stream(limited, **wanted)
        assert await stream(limited, **wanted) == await stream(free, **wanted)


async def test_what_is_made_in_the_background_is_counted_when_it_is_complete(
    tmp_path: Path, numbers: Path, keys: KeyStore
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    text, _ = keys.create(Allowance(tokens=5))
    async with serving(tmp_path, numbers, headers=bearer(text)) as served:
        body = {"model": "sql", "input": "a", "background": True, "later": "g"}
        made = (await served.client.post("/v1/responses", json=body)).json()
        assert (await served.client.post("/v1/responses", json={**body, "later": "h"})).status_code == 200
        served.engine.gate("g").set()

        async def spent() -> bool:
            return (await served.ask("sql")).status_code == 429

        served.engine.gate("h").set()
        await served.until(spent)
        assert (await served.client.get(f"/v1/responses/{made['id']}")).status_code == 200


async def test_requests_at_once_are_counted_by_key(tmp_path: Path, numbers: Path, keys: KeyStore) -> None:
    one, other = keys.create(Allowance())[0], keys.create(Allowance())[0]
    async with serving(tmp_path, numbers, max_requests_per_key=1) as served:

        async def ask(headers: dict[str, str], **more: Any) -> int:
            body = {"model": "numbers", "prompt": "a", **more}
            return (await served.client.post("/v1/completions", json=body, headers=headers)).status_code

        held = asyncio.create_task(ask(bearer(one), hold="h"))
        await served.until(lambda: served.engine.asked)
        assert await ask({"x-api-key": one}) == 429
        assert await ask(bearer(other)) == 200
        served.engine.gate("h").set()
        assert await held == 200


# secrets


async def test_no_key_is_told_logged_or_handed_to_who_answers(
    tmp_path: Path, numbers: Path, keys: KeyStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_API_KEY", "root-of-all-keys")
    text, _ = keys.create(Allowance(("alpha",)))
    caplog.set_level("DEBUG", logger="lorakit")
    monkeypatch.setattr(log, "propagate", True)
    async with serving(tmp_path, numbers, engine=FakeEngine(numbers)) as served:
        told = []
        for given in (text, "root-of-all-keys"):
            assert (await served.client.get("/v1/models", headers=bearer(given))).status_code == 200
        for given in (text, "root-of-all-keys", text + "wrong"):
            for path in ("/v1/models", "/v1/models/none", "/metrics", "/v1/adapters/none", "/nowhere"):
                told.append((await served.client.get(path, headers=bearer(given))).text)
            told.append(
                (await served.client.post("/v1/completions", json={"model": "numbers"}, headers=bearer(given))).text
            )
        told += [event.as_sse() for event in served.reconciler.events.kept]
    assert not any(secret in shown for secret in (text, "root-of-all-keys") for shown in [*told, caplog.text])
