"""Published clients, and the lines that vLLM's documentation gives for LoRA, put to one running server unchanged."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.readme import blocks
from tests.server.real import PROMPTS, ask, write_checkpoint
from tests.server.test_real_serving import put
from tests.world import World

pytestmark = pytest.mark.timeout(240)

LORAX = Path(__file__).parents[2] / ".venv" / "lorax-client"


@pytest.fixture(scope="module")
def runs(world: World) -> tuple[str, str]:
    """The revisions of two runs, `first` and `second`; what each says comes from a cold server."""
    return put(world, "first", 0, 10, eval_loss=1.5), put(world, "second", 1, 20, eval_loss=2.5)


def text_of(world: World, adapter: int | None, prompt: str, **more: Any) -> str:
    """What a cold server answers."""
    asked = {"model": "base" if adapter is None else f"a{adapter}", "prompt": prompt, "temperature": 0, **more}
    answer = httpx.post(f"{world.plain}/v1/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def openai_client(world: World) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{world.server.url}/v1", api_key="none", max_retries=0)


# OpenAI's


def test_openai_sees_runs_as_jobs_and_checkpoints_as_models(world: World, runs: tuple[str, str]) -> None:
    third = put(world, "first", 2, 30, eval_loss=0.5)
    with openai_client(world) as client:
        jobs = {job.id: job for job in client.fine_tuning.jobs.list(limit=1)}  # each page has one
        assert {"first", "second"} <= jobs.keys()
        assert jobs["first"] == client.fine_tuning.jobs.retrieve("first")
        assert (jobs["first"].status, jobs["first"].model) == ("running", "base")
        found = list(client.fine_tuning.jobs.checkpoints.list("first", limit=1))
        assert [one.fine_tuned_model_checkpoint for one in found] == [third, runs[0]]
        assert [one.step_number for one in found] == [30, 10]
        assert [(one.metrics.train_loss, one.metrics.full_valid_loss) for one in found] == [(2.0, 0.5), (2.0, 1.5)]
        for one, adapter in zip(found, (2, 0), strict=True):
            asked = client.completions.create(
                model=one.fine_tuned_model_checkpoint, prompt=PROMPTS[0], max_tokens=6, temperature=0
            )
            assert asked.choices[0].text == text_of(world, adapter, PROMPTS[0], max_tokens=6)
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.retrieve("nothing")


def test_openai_sees_where_a_model_comes_from(world: World, runs: tuple[str, str]) -> None:
    with openai_client(world) as client:
        card = client.models.retrieve("second@best").model_dump()
        assert (card["parent"], card["root"]) == ("base", runs[1])
        said = card["metadata"]
        assert (said["step"], said["eval_loss"], said["base"], said["rank"]) == (20, 2.5, "base", 8)
        assert runs[1].endswith(said["digest"][:8])


def test_openais_async_client_streams_chats_of_adapters(world: World, runs: tuple[str, str]) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]

    async def chat() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{world.server.url}/v1", api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(model="second", messages=messages, max_tokens=6, temperature=0)
            stream = await client.chat.completions.create(
                model="second", messages=messages, max_tokens=6, temperature=0, stream=True
            )
            parts = [part.choices[0].delta.content or "" async for part in stream if part.choices]
            assert whole.model == runs[1]
            return whole.choices[0].message.content or "", "".join(parts)

    whole, streamed = asyncio.run(chat())
    assert whole == streamed == text_of(world, 1, "user: hello\nassistant:", max_tokens=6)


# Anthropic's


def test_anthropics_client_asks_adapters_whole_and_streaming(world: World, runs: tuple[str, str]) -> None:
    expected = text_of(world, 1, "user: hello\nassistant:", max_tokens=6)
    with anthropic.Anthropic(base_url=world.server.url, api_key="none", max_retries=0) as client:
        asked: Any = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
        greedy: Any = {"temperature": 0}
        for model in ("second", "second@best", runs[1]):
            told = client.messages.create(model=model, **asked, extra_body=greedy)
            assert (told.model, [part.text for part in told.content if part.type == "text"]) == (runs[1], [expected])
        with client.messages.stream(model="second", **asked, extra_body=greedy) as stream:
            assert "".join(stream.text_stream) == expected
            assert stream.get_final_message().model == runs[1]
        assert client.messages.count_tokens(model="second", messages=asked["messages"]).input_tokens > 0
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nothing", **asked)


# LoRAX's


def lorax(world: World, *arguments: str) -> Any:
    """What the published client, in a process of its own, was told."""
    if not LORAX.is_dir():
        pytest.skip(f"pip install --no-deps --target {LORAX} -r requirements/lorax-client.txt")
    program = Path(__file__).with_name("lorax_examples.py")
    done = subprocess.run(
        [sys.executable, program, world.server.url, *arguments], capture_output=True, text=True, timeout=180,
        env={**os.environ, "PYTHONPATH": str(LORAX)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_lorax_client_runs_its_documented_examples(world: World, runs: tuple[str, str]) -> None:
    told, prompt = lorax(world, runs[0], "second"), "Why is the sky blue?"
    expected = text_of(world, 0, prompt, max_tokens=256 - len(prompt))
    for example in ("sync", "sync_streamed", "sync_streamed_whole", "async", "async_streamed"):
        assert told[example] == expected, example
    assert told["base"] == text_of(world, None, prompt, max_tokens=6)
    assert told["full"].startswith(prompt)
    assert told["truncated_tokens"] == 3
    assert json.loads(told["json"])["age"] in (1, 2)
    assert told["seeded"][0] == told["seeded"][1]
    assert len(told["best"]["details"]["best_of_sequences"]) == 2
    details = told["detailed"]["details"]
    assert "".join(token["text"] for token in details["prefill"]) == prompt
    assert [token["logprob"] is None for token in details["prefill"]] == [True] + [False] * (len(prompt) - 1)
    for token in details["tokens"]:
        assert token["alternative_tokens"][0]["id"] == token["id"]  # greedy takes the likeliest
        assert len(token["alternative_tokens"]) == 2
    assert set(told["errors"].values()) == {"ValidationError"}
    with world.server.client() as client:
        for strategy, text in told["merged"].items():
            options = "" if strategy == "linear" else f",method={strategy},density=0.9"
            options += ",majority_sign=total" if strategy.endswith("ties") else ""
            body = {"model": f"mix({runs[0]}=0.7,second=0.3{options})", "prompt": prompt, "max_tokens": 8}
            answer = client.post("/v1/completions", json={**body, "temperature": 0})
            assert answer.json()["choices"][0]["text"] == text, strategy


def test_the_page_about_lorax_says_what_works(world: World, runs: tuple[str, str], tmp_path: Path) -> None:
    if not LORAX.is_dir():
        pytest.skip(f"pip install --no-deps --target {LORAX} -r requirements/lorax-client.txt")
    page = Path(__file__).parents[2].joinpath("docs", "lorax.md").read_text()

    def here(text: str) -> str:
        named = text.replace('"sql', '"first').replace('"chat"', '"second"')
        return named.replace("http://127.0.0.1:8080", world.server.url)

    program = tmp_path / "page.py"
    program.write_text(here(blocks("python", page)[0]))
    environ = {**os.environ, "PYTHONPATH": str(LORAX)}
    subprocess.run([sys.executable, program], env=environ, capture_output=True, timeout=120, check=True)
    (line,) = [block for block in blocks("", page) if block.startswith("curl")]
    told = subprocess.run(here(line), shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(told).keys() == {"generated_text"}


def test_lorax_tokens_have_the_logprobs_of_a_cold_server(world: World, runs: tuple[str, str]) -> None:
    cold = world.cold_answer(0, PROMPTS[0])
    body = {"inputs": PROMPTS[0], "parameters": {"adapter_id": runs[0], "max_new_tokens": 6, "details": True}}
    with world.server.client() as client:
        told = client.post("/generate", json=body).json()["details"]["tokens"]
        lines = client.post("/generate_stream", json=body).text.split("\n\n")
    streamed = [json.loads(line.removeprefix("data:"))["token"] for line in lines if line]
    for tokens in (told, streamed):
        assert [token["logprob"] for token in tokens] == pytest.approx(cold.logprobs, abs=2e-3)
    assert [token["id"] for token in told] == [token["id"] for token in streamed]


def test_a_lorax_chat_is_made_by_the_chat_template(world: World, runs: tuple[str, str]) -> None:
    expected = text_of(world, 1, "user: hello\nassistant:", max_tokens=6)
    parameters = {"adapter_id": "second", "max_new_tokens": 6, "apply_chat_template": True, "details": True}
    with world.server.client() as client:
        for inputs in ("hello", '[{"role": "user", "content": "hello"}]'):
            told = client.post("/generate", json={"inputs": inputs, "parameters": parameters}).json()
            assert told["generated_text"] == expected
            assert len(told["details"]["tokens"]) == 6
            lines = client.post("/generate_stream", json={"inputs": inputs, "parameters": parameters}).text.split(
                "\n\n"
            )
            assert json.loads(lines[-2].removeprefix("data:"))["generated_text"] == expected


def test_lorax_clients_bring_in_a_folder_of_the_servers_roots(world: World) -> None:
    folder = write_checkpoint(world.watched / "shelf", world.adapters[3], 1)
    body = {
        "inputs": "hello",
        "parameters": {"adapter_id": str(folder), "adapter_source": "local", "max_new_tokens": 6},
    }
    with world.server.client() as client:
        answer = client.post("/", json=body)
        assert answer.json() == [{"generated_text": text_of(world, 3, "hello", max_tokens=6)}]
        assert answer.headers["x-adapter-id"] == str(folder)


# vLLM's documentation of LoRA: its lines, but for the host and the names


LIST = "curl localhost:8000/v1/models | jq ."
ASK = """\
curl http://localhost:8000/v1/completions \\
    -H "Content-Type: application/json" \\
    -d '{
        "model": "sql-lora",
        "prompt": "San Francisco is a",
        "max_tokens": 7,
        "temperature": 0
    }' | jq
"""
LOAD = """\
curl -X POST http://localhost:8000/v1/load_lora_adapter \\
-H "Content-Type: application/json" \\
-d '{
    "lora_name": "sql_adapter",
    "lora_path": "/path/to/sql-lora-adapter"
}'
"""
LOAD_IN_PLACE = """\
curl -X POST http://localhost:8000/v1/load_lora_adapter \\
-H "Content-Type: application/json" \\
-d '{
    "lora_name": "sql_adapter",
    "lora_path": "/path/to/sql-lora-adapter",
    "load_inplace": true
}'
"""
UNLOAD = """\
curl -X POST http://localhost:8000/v1/unload_lora_adapter \\
-H "Content-Type: application/json" \\
-d '{
    "lora_name": "sql_adapter"
}'
"""


def run(world: World, line: str, path: Path | None = None) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = line.replace("http://localhost:8000", world.server.url).replace("localhost:8000", world.server.url)
    line = line.replace("/path/to/sql-lora-adapter", str(path)).replace("sql-lora", "sql_adapter")
    if shutil.which("jq") is None:
        line = line.partition("| jq")[0]
    return subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout


def test_the_lines_of_vllms_documentation_work(world: World) -> None:
    folders = [write_checkpoint(world.watched / "documented", world.adapters[n], n) for n in (4, 5)]
    assert run(world, LOAD, folders[0]) == "Success: LoRA adapter 'sql_adapter' added successfully."
    cards = {card["id"]: card for card in json.loads(run(world, LIST))["data"]}
    assert cards["sql_adapter"]["parent"] == "base"
    prompt = "San Francisco is a"
    assert json.loads(run(world, ASK))["choices"][0]["text"] == text_of(world, 4, prompt, max_tokens=7)
    assert run(world, LOAD_IN_PLACE, folders[1]) == "Success: LoRA adapter 'sql_adapter' added successfully."
    assert json.loads(run(world, ASK))["choices"][0]["text"] == text_of(world, 5, prompt, max_tokens=7)
    assert run(world, UNLOAD) == "Success: LoRA adapter 'sql_adapter' removed successfully."
    assert json.loads(run(world, ASK))["error"]["code"] == 404
    with world.server.client() as client:  # and whoever else is served is as before
        assert ask(client, "base").agrees_with(world.cold_answer(None, PROMPTS[0]))
