"""What `lorakit serve` answers, on real vLLM, compared with a cold server by logprobs."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file, save_file

from tests.cli.commands import lorakit
from tests.readme import blocks
from tests.server.real import PROMPTS, Answer, Server, answer_of, ask, make_random_adapter, serving, write_checkpoint
from tests.world import SLOTS, World

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def client(world: World) -> Iterator[httpx.Client]:
    with world.server.client() as client:
        yield client


def put(world: World, run: str, adapter: int, step: int, eval_loss: float | None = None) -> str:
    """Write a checkpoint, wait until its run's name means it, and give back the revision's name."""
    write_checkpoint(world.watched / run, world.adapters[adapter], step, eval_loss)
    return wait_for_step(world, run, step)


def wait_for_step(world: World, run: str, step: int) -> str:
    def there() -> Any:
        name = world.server.adapter(run)["revision"]
        return name if name and name.startswith(f"{run}@step-{step}-") else None

    found: str = world.server.wait_until(there)
    return found


def assert_cold(world: World, client: httpx.Client, model: str, adapter: int | None) -> None:
    for prompt in PROMPTS:
        assert ask(client, model, prompt).agrees_with(world.cold_answer(adapter, prompt))


@contextmanager
def load_on(server: Server, *models: str, clients: int = 4) -> Iterator[list[tuple[str, str, Answer | str]]]:
    """Clients that ask without a pause, streaming and not: (model, prompt, answer, or what went wrong)."""
    seen: list[tuple[str, str, Answer | str]] = []
    ends = threading.Event()

    def keep_asking(number: int) -> None:
        with server.client() as client:
            turn = number
            while not ends.is_set():
                model, prompt = models[turn % len(models)], PROMPTS[turn % len(PROMPTS)]
                turn += 1
                try:
                    answer = streamed(client, model, prompt) if turn % 2 else ask(client, model, prompt)
                    seen.append((model, prompt, answer))
                except Exception as error:  # every failure is a finding
                    seen.append((model, prompt, f"{type(error).__name__}: {error}"))

    threads = [threading.Thread(target=keep_asking, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ends.set()
        for thread in threads:
            thread.join()


def streamed(client: httpx.Client, model: str, prompt: str) -> Answer:
    asked = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1, "stream": True}
    tokens: list[str] = []
    logprobs: list[float] = []
    with client.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200, response.read()
        revision = response.headers["x-lorakit-revision"]
        for line in response.iter_lines():
            if line.startswith("data: {"):
                part = answer_of(json.loads(line[6:]), revision)
                tokens += part.tokens
                logprobs += part.logprobs
    return Answer(tuple(tokens), tuple(logprobs), revision)


def test_every_name_answers_as_its_own_revision_does_on_a_cold_server(world: World, client: httpx.Client) -> None:
    first = put(world, "names", 0, 10, eval_loss=1.0)
    second = put(world, "names", 1, 20, eval_loss=2.0)
    for model, revision, adapter in [
        ("names", second, 1), ("names@latest", second, 1), ("names@best", first, 0), ("names@step-10", first, 0),
        ("names@step-20", second, 1), (second, second, 1), (first.replace("step-10-", ""), first, 0),
    ]:  # fmt: skip
        assert ask(client, model).revision == revision
        assert_cold(world, client, model, adapter)
    assert ask(client, "base").revision == "base"
    assert_cold(world, client, "base", None)


def test_a_checkpoint_written_under_load_is_served_and_no_request_fails_or_is_mixed(
    world: World, client: httpx.Client
) -> None:
    which = {put(world, "busy", 0, 1): 0}
    with load_on(world.server, "busy", "base", "busy@latest") as seen:
        for step, adapter in ((2, 1), (3, 2), (4, 3), (5, 0)):
            which[put(world, "busy", adapter, step)] = adapter
            assert_cold(world, client, "busy", adapter)
    assert {model for model, _, _ in seen} == {"busy", "base", "busy@latest"}
    for _, prompt, answer in seen:
        assert isinstance(answer, Answer), answer
        expected = None if answer.revision == "base" else which[str(answer.revision)]
        assert answer.agrees_with(world.cold_answer(expected, prompt))


def test_overwriting_a_served_folder_in_place_changes_no_answer_of_its_revision(
    world: World, client: httpx.Client
) -> None:
    before = put(world, "overwritten", 0, 7)
    folder = world.watched / "overwritten" / "checkpoint-7"
    with (folder / "adapter_model.safetensors").open("r+b") as file:  # the same inode, as safetensors before 0.8 does
        file.write((world.adapters[1] / "adapter_model.safetensors").read_bytes())
    shutil.copyfile(folder / "trainer_state.json", folder / "trainer_state.json.new")
    (folder / "trainer_state.json.new").replace(folder / "trainer_state.json")
    after = world.server.wait_until(lambda: _other_than(before, world.server.adapter("overwritten")["revision"]))
    assert_cold(world, client, before, 0)
    assert_cold(world, client, "overwritten", 1)
    assert ask(client, "overwritten@step-7").revision == after


def _other_than(name: str, found: str) -> str | None:
    return found if found != name else None


def test_deleting_a_served_run_changes_no_answer(world: World, client: httpx.Client) -> None:
    first, second = put(world, "deleted", 2, 1), put(world, "deleted", 3, 2)
    shutil.rmtree(world.watched / "deleted")
    for number in range(SLOTS + 1):  # others take the slots, so that these have to be loaded again
        put(world, f"other{number}", number, 1)
    assert_cold(world, client, first, 2)
    assert_cold(world, client, second, 3)
    assert_cold(world, client, "deleted", 3)


def test_more_adapters_than_slots_all_answer_right_and_the_base_stays_the_base(
    world: World, client: httpx.Client
) -> None:
    which = {put(world, "many", number, number + 1): number for number in range(len(world.adapters))}
    with load_on(world.server, *which, "base") as seen:
        world.server.wait_until(lambda: len(seen) > 60)
    for model, prompt, answer in seen:
        assert isinstance(answer, Answer), answer
        assert answer.revision == model
        assert answer.agrees_with(world.cold_answer(which.get(model), prompt))
    inside = [
        revision["id"]
        for adapter in client.get("/v1/adapters").json()["data"]
        for revision in adapter["revisions"]
        if revision["in_engine"]
    ]
    assert len(inside) <= SLOTS


def test_a_run_that_is_started_again_is_followed_from_its_first_step(world: World, client: httpx.Client) -> None:
    put(world, "again", 0, 100)
    put(world, "again", 1, 200)
    put(world, "again", 2, 50)
    assert_cold(world, client, "again@latest", 2)
    put(world, "again", 3, 200)
    assert_cold(world, client, "again@step-200", 3)
    assert_cold(world, client, "again", 3)


def test_the_openai_client_works_unchanged(world: World) -> None:
    revision = put(world, "sdk", 1, 3)
    with openai.OpenAI(base_url=f"{world.server.url}/v1", api_key="unused") as sdk:
        listed = [model.id for model in sdk.models.list()]
        assert listed[0] == "base"
        assert {"sdk", "sdk@latest", revision} <= set(listed)
        assert sdk.models.retrieve("sdk").id == "sdk"
        messages: Any = [{"role": "user", "content": "hi"}]
        raw = sdk.chat.completions.with_raw_response.create(model="sdk", messages=messages, max_tokens=4)
        assert raw.headers["x-lorakit-revision"] == revision
        assert raw.parse().model == revision
        chunks = list(sdk.chat.completions.create(model="sdk", messages=messages, max_tokens=4, stream=True))
        assert {chunk.model for chunk in chunks} == {revision}
        with pytest.raises(openai.NotFoundError, match="nothing-of-this-name"):
            sdk.completions.create(model="nothing-of-this-name", prompt="x")


def test_the_readmes_openai_example_runs(world: World) -> None:
    put(world, "sql", 2, 500)
    (example,) = [block for block in blocks("python") if "OpenAI(" in block]
    example = example.replace("http://127.0.0.1:8000", world.server.url) + "\nclient.close()\n"
    exec(compile(example, "README.md", "exec"), {})
    assert world.server.adapter("sql")["requests"] == 1


def test_what_can_not_be_served_right_is_refused_with_the_reason_and_the_rest_goes_on(
    world: World, client: httpx.Client, tmp_path: Path
) -> None:
    good = put(world, "mixed-bag", 0, 1)
    tensors = load_file(world.adapters[1] / "adapter_model.safetensors")
    config = json.loads((world.adapters[1] / "adapter_config.json").read_text())
    key = next(name for name in tensors if "q_proj.lora_A" in name)

    def broken(step: int, tensors: dict[str, Any], **changes: Any) -> None:
        folder = tmp_path / f"broken-{step}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        write_checkpoint(world.watched / "mixed-bag", folder, step)

    broken(2, {**tensors, key: tensors[key] * float("nan")})
    broken(3, {**tensors, key: tensors[key][:, :-8].copy()})
    broken(4, {name.replace("q_proj", "p_proj"): tensor for name, tensor in tensors.items()})
    broken(5, tensors, use_dora=True)
    make_random_adapter(tmp_path / "rank16", world.base, 9, r=16)
    write_checkpoint(world.watched / "mixed-bag", tmp_path / "rank16", 6)
    expected = {2: "NaN", 3: "another base", 4: "p_proj", 5: "lorakit merge", 6: "--max-lora-rank 16"}

    def refused() -> Any:
        found = {r["step"]: r for r in world.server.adapter("mixed-bag")["revisions"] if r["state"] == "refused"}
        return found if found.keys() == expected.keys() else None

    for step, revision in world.server.wait_until(refused).items():
        assert expected[step] in revision["reason"]
    assert ask(client, "mixed-bag").revision == good
    assert_cold(world, client, "mixed-bag", 0)


def test_patterns_and_raw_names_are_repaired_as_they_enter_the_store(
    world: World, client: httpx.Client, tmp_path: Path
) -> None:
    """vLLM before 0.32 ignores alpha_pattern; PEFT's own merge says what the answer has to be."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = make_random_adapter(
        tmp_path / "patterned", world.base, 11, rank_pattern={"down_proj": 4}, alpha_pattern={"q_proj": 64}
    )
    write_checkpoint(world.watched / "patterned", adapter, 1)
    wait_for_step(world, "patterned", 1)
    assert "rank_pattern" in world.server.adapter("patterned")["revisions"][0]["repaired"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), adapter)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        told = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
        asked = {"model": "patterned", "prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
        assert client.post("/v1/completions", json=asked).json()["choices"][0]["token_ids"] == told.tolist()


def test_unloading_forgets_a_name_and_frees_its_slot(world: World, client: httpx.Client) -> None:
    put(world, "brief", 4, 1)
    with load_on(world.server, "brief") as seen:
        world.server.wait_until(lambda: len(seen) > 10)
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "brief"}).status_code == 200
    answered = [answer for _, _, answer in seen if isinstance(answer, Answer)]
    assert len(answered) >= 10
    assert all(a.agrees_with(world.cold_answer(4, prompt)) for _, prompt, a in seen if isinstance(a, Answer))
    assert all("404" in answer for _, _, answer in seen if isinstance(answer, str))
    assert client.get("/v1/adapters/brief").status_code == 404
    folder = str(world.watched / "brief" / "checkpoint-1")
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "brief", "lora_path": folder})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'brief' added successfully.")
    assert_cold(world, client, "brief", 4)


def test_vllms_own_ways_around_the_gateway_are_closed(world: World, client: httpx.Client) -> None:
    path = str(world.adapters[0])
    assert client.post("/adapters", json={"name": "x", "src": path}).status_code == 404
    assert client.delete("/adapters/x").status_code == 404
    assert client.post("/invocations", json={"model": path, "prompt": "x"}).status_code == 404
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path}).status_code == 400
    assert client.post("/v1/completions", json={"model": path, "prompt": "x"}).status_code == 404
    described = client.get("/openapi.json").json()["paths"]
    assert not [path for path in described if path.startswith(("/adapters", "/invocations"))]
    assert {"/v1/adapters", "/v1/completions"} <= described.keys()


def test_every_route_that_names_a_model_answers_as_the_revision(world: World, client: httpx.Client) -> None:
    """Four runs, three slots: the second time round each was out of the engine, and is in again under another name."""
    names = {run: put(world, run, number, 1) for number, run in enumerate(("one", "two", "three", "four"))}
    for _ in range(2):
        for run, revision in names.items():
            for stream in (False, True):
                messages = [{"role": "user", "content": "hi"}]
                for path, asked in (
                    ("/v1/chat/completions", {"messages": messages, "max_tokens": 2, "stream": stream}),
                    ("/v1/responses", {"input": "hi", "max_output_tokens": 2, "stream": stream}),
                    ("/v1/messages", {"messages": messages, "max_tokens": 2, "stream": stream}),
                ):
                    answer = client.post(path, json={"model": run, **asked})
                    assert answer.headers["x-lorakit-revision"] == revision
                    assert set(re.findall(r'"model": ?"([^"]*)"', answer.text)) == {revision}, path
            assert client.post("/tokenize", json={"model": run, "prompt": "a"}).json()["count"] >= 1
    refused = client.post("/v1/embeddings", json={"model": "one", "input": "a"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (404, "NotFoundError")


def test_an_adapter_with_a_chat_template_of_its_own_is_asked_by_it_on_every_route(
    world: World, client: httpx.Client
) -> None:
    folder = world.watched / "templated" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    revision = put(world, "templated", 0, 1)
    put(world, "plain", 0, 1)
    messages = [{"role": "user", "content": "hi"}]
    exact = {"max_tokens": 6, "temperature": 0}
    for model, prompt in (("templated", "<hi>"), ("plain", "user: hi\nassistant:"), ("base", "user: hi\nassistant:")):
        expected = ask(client, model, prompt)
        asked = {"model": model, "messages": messages, "tools": TOOLS, "tool_choice": "none", "logprobs": True, **exact}
        (choice,) = client.post("/v1/chat/completions", json=asked).json()["choices"]
        told = choice["logprobs"]["content"]
        answer = Answer(tuple(t["token"] for t in told), tuple(t["logprob"] for t in told), expected.revision)
        assert answer.agrees_with(expected)
        several = client.post("/v1/chat/completions", json={**asked, "temperature": 1, "n": 2}).json()
        assert (several["model"], len(several["choices"])) == (expected.revision, 2)
        completion = client.post("/v1/completions", json={"model": model, "prompt": prompt, **exact}).json()
        text = completion["choices"][0]["text"]
        batch = client.post("/v1/chat/completions/batch", json={"model": model, "messages": [messages] * 2, **exact})
        assert [choice["message"]["content"] for choice in batch.json()["choices"]] == [text, text]
        response = client.post("/v1/responses", json={"model": model, "input": "hi", **exact, "max_output_tokens": 6})
        assert "".join(part["text"] for item in response.json()["output"] for part in item["content"]) == text
        message = client.post("/v1/messages", json={"model": model, "messages": messages, **exact}).json()
        assert "".join(part["text"] for part in message["content"]) == text
        counted = client.post("/tokenize", json={"model": model, "messages": messages}).json()
        assert counted["count"] == len(prompt)
    assert ask(client, "templated").revision == revision
    brought = {"model": "base", "messages": messages, "chat_template": "{{ 1 }}"}
    assert client.post("/v1/chat/completions", json=brought).status_code == 400


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def test_an_adapter_with_tokens_of_its_own_is_refused_with_the_reason(world: World) -> None:
    folder = world.watched / "tokens" / "checkpoint-1"
    folder.mkdir(parents=True)
    tokenizer = json.loads((world.base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 900, "content": "<think>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_checkpoint(world.watched / "tokens", world.adapters[0], 1)

    def refused() -> Any:
        (revision,) = world.server.adapter("tokens")["revisions"]
        return revision["state"] == "refused" and revision["reason"]

    assert "adds 1 tokens ('<think>')" in world.server.wait_until(refused)


def test_an_answer_made_in_the_background_is_of_the_revision_that_was_asked(world: World, client: httpx.Client) -> None:
    revision = put(world, "behind", 1, 1)
    asked = {"model": "behind", "input": "hi", "temperature": 0, "max_output_tokens": 100}
    told = client.post("/v1/responses", json={**asked, "background": True})
    put(world, "behind", 2, 2)
    for number in range(SLOTS + 1):  # others want its slot meanwhile
        put(world, f"beside{number}", number, 1)

    def made() -> Any:
        found = client.get(f"/v1/responses/{told.json()['id']}")
        assert found.headers["x-lorakit-revision"] == found.json()["model"] == revision
        return found.json()["status"] not in ("queued", "in_progress") and found.json()

    def text(answer: Any) -> str:
        return str(answer["output"][0]["content"][0]["text"])

    at_once = client.post("/v1/responses", json={**asked, "model": revision}).json()
    assert text(world.server.wait_until(made)) == text(at_once)


def test_a_client_that_leaves_ends_its_answer_in_the_engine(world: World, client: httpx.Client) -> None:
    put(world, "left", 0, 1)
    answers, tokens = 16, 240  # enough that the client is gone long before the last token, however busy the machine
    asked = {"model": "left", "prompt": "hi", "n": answers, "max_tokens": tokens, "ignore_eos": True}

    def generated() -> float:
        return sum(map(float, re.findall(r"vllm:generation_tokens_total{.*} (.*)", client.get("/metrics").text)))

    before = generated()
    with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as response:
        next(response.iter_lines())
    world.server.wait_until(lambda: "499 /v1/completions left" in world.server.log.read_text(errors="replace"))
    assert [revision["in_flight"] for revision in world.server.adapter("left")["revisions"]] == [0]
    client.post("/v1/completions", json=asked).raise_for_status()  # in whose time the other would have been completed
    assert answers * tokens <= generated() - before < 2 * answers * tokens


@pytest.mark.slow
def test_in_one_slot_two_runs_and_the_base_take_turns_and_a_new_checkpoint_gets_its_own(
    world: World, tmp_path: Path
) -> None:
    watched = tmp_path / "runs"
    for run, adapter in (("x", 0), ("y", 1)):
        write_checkpoint(watched / run, world.adapters[adapter], 1)
    flags = ("--watch", str(watched), "--max-loras", "1", "--max-lora-rank", "8", "--log-format", "json")
    with serving(world.base, tmp_path / "home", tmp_path / "serve.log", *flags) as server:
        which = {server.adapter("x")["revision"]: 0, server.adapter("y")["revision"]: 1, "base": None}
        with load_on(server, "x", "y", "base") as seen:
            server.wait_until(lambda: len(seen) > 60)
            write_checkpoint(watched / "x", world.adapters[2], 2)
            before = set(which)
            new = server.wait_until(lambda: server.adapter("x")["revision"] not in before and server.adapter("x"))
            which[new["revision"]] = 2
            several = len(seen) + 60
            server.wait_until(lambda: len(seen) > several)
    for _, prompt, answer in seen:
        assert isinstance(answer, Answer), answer
        assert answer.agrees_with(world.cold_answer(which[str(answer.revision)], prompt))
    assert {answer.revision for _, _, answer in seen if isinstance(answer, Answer)} == set(which)
    logged = [json.loads(line) for line in (tmp_path / "serve.log").read_text().splitlines()]
    assert {"lorakit", "lorakit.supervisor", "engine"} <= {line["logger"] for line in logged}
    assert sum(line.get("revision") == new["revision"] and line.get("status") == 200 for line in logged) > 1


def test_metrics_are_vllms_own_and_lorakits_with_the_names_that_clients_use(world: World, client: httpx.Client) -> None:
    names = {run: put(world, run, number, 1) for number, run in enumerate(("seen-1", "seen-2", "seen-3"))}
    for _ in range(3):
        with load_on(world.server, *names, "base") as seen:
            several = len(seen) + 20
            world.server.wait_until(lambda wanted=several: len(seen) > wanted)
    found = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert found["vllm:num_requests_running"].samples
    tokens = {one.labels["alias"]: one.value for one in found["lorakit_generation_tokens"].samples}
    assert all(tokens[run] >= 6 for run in names)
    asked = {one.labels["alias"]: one.value for one in found["lorakit_requests"].samples if one.labels["code"] == "200"}
    assert all(asked[run] >= 5 for run in names)
    (info,) = found["vllm:lora_requests_info"].samples
    assert {"seen-1", "seen-1@latest", names["seen-1"]} <= set(info.labels["running_lora_adapters"].split(","))
    assert float(info.labels["max_lora"]) == SLOTS
    engine = sum(one.value for one in found["vllm:generation_tokens"].samples if one.name.endswith("_total"))
    assert engine >= sum(tokens.values()) > 0
    raw = client.get("/metrics/").text
    assert raw.count("vllm:lora_requests_info{") <= 2, "vLLM keeps no series of adapters that answered before"


def test_a_clients_request_id_reaches_vllm_and_comes_back(world: World, client: httpx.Client) -> None:
    asked = {"model": "base", "prompt": "a", "max_tokens": 1}
    answer = client.post("/v1/completions", json=asked, headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert "mine-1" in answer.json()["id"]
    world.server.wait_until(lambda: "[mine-1]" in world.server.log.read_text())


def test_a_running_server_is_told_from_the_command_line(
    world: World, client: httpx.Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_URL", world.server.url)
    first, second = put(world, "told", 0, 1), put(world, "told", 1, 2)
    assert lorakit(capsys, "alias", "told@prod", "step-1").out.strip() == first
    assert_cold(world, client, "told@prod", 0)
    assert lorakit(capsys, "rollback", "told").out.strip() == first
    assert_cold(world, client, "told", 0)
    assert lorakit(capsys, "alias", "told", "latest").out.strip() == second
    assert_cold(world, client, "told", 1)
    shown = lorakit(capsys, "ps", "--all").out
    assert all(name.partition("@")[2] in shown for name in (first, second))
    loaded = lorakit(capsys, "load", "told-too", world.watched / "told" / "checkpoint-1").out.strip()
    assert ask(client, "told-too").revision == loaded
    assert_cold(world, client, "told-too", 0)
    assert lorakit(capsys, "unload", "told-too", "--yes").code == 0
    assert client.get("/v1/adapters/told-too").status_code == 404
