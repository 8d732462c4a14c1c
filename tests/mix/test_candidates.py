"""A candidate is made when it is asked for, and gone when its trial is over, however that ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lorakit
import lorakit.errors
from lorakit.mix.candidates import Candidate
from tests.folders import factors, linear_modules, write_adapter
from tests.loopback import running

if TYPE_CHECKING:
    from tests.world import World


@dataclass
class Vllm:
    """A server that keeps names as vLLM does, and a log of what it was asked."""

    url: str = ""
    served: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    refusal: tuple[int, dict[str, Any]] | None = None

    def answer(self, path: str, body: dict[str, str], key: str | None) -> tuple[int, dict[str, Any]]:
        name = body["lora_name"]
        self.log.append((path.removeprefix("/v1/").removesuffix("_lora_adapter"), name))
        self.keys.add(key)
        if self.refusal is not None and "unload" not in path:
            return self.refusal
        if path == "/v1/load_lora_adapter":
            if name in self.served or not (Path(body["lora_path"]) / "adapter_config.json").is_file():
                return 400, {"error": {"message": "no"}}
            self.served[name] = body["lora_path"]
            return 200, {}
        if path == "/v1/unload_lora_adapter" and name in self.served:
            assert Path(self.served.pop(name)).is_dir(), "it is unloaded before its folder goes"
            return 200, {}
        return 404, {"error": {"message": f"The lora adapter '{name}' cannot be found."}}


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    found = Vllm()

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, said = found.answer(self.path, body, self.headers["Authorization"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    found.url = f"http://127.0.0.1:{server.server_port}"
    with running(server):
        yield found


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"{seed}", factors(linear_modules(), seed=seed)) for seed in range(2)]


@pytest.fixture
def share(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    folder.mkdir()
    return folder


def test_nothing_is_written_unless_it_is_asked_for(pair: list[Path], share: Path) -> None:
    def score(candidate: Candidate) -> float:
        assert candidate.adapter.rank == 4
        assert not list(share.iterdir())
        return candidate.weights[0]

    assert not [trial.error for trial in lorakit.search(pair, score, share=share).trials if trial.error]


def test_a_folder_lasts_as_long_as_its_trial(pair: list[Path], share: Path) -> None:
    seen: list[Path] = []

    def score(candidate: Candidate) -> float:
        assert candidate.folder is candidate.folder
        assert [path.name for path in share.iterdir()] == [candidate.folder.parent.name]
        assert lorakit.load_adapter(candidate.folder).rank == 4
        seen.append(candidate.folder)
        if len(seen) % 2:
            raise RuntimeError("no")
        return 1.0

    report = lorakit.search(pair, score, evaluations=6, share=share)
    assert {trial.error and trial.error[:16] for trial in report.trials} == {None, "RuntimeError: no"}
    assert len(set(seen)) == 6
    assert not list(share.iterdir())


def test_an_interrupt_ends_the_search_and_leaves_nothing(pair: list[Path], share: Path, vllm: Vllm) -> None:
    def score(candidate: Candidate) -> float:
        assert candidate.model in vllm.served
        if candidate.weights == (0.0, 1.0):
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        lorakit.search(pair, score, share=share, url=vllm.url)
    assert not list(share.iterdir())
    assert not vllm.served


def test_a_merged_candidate_is_the_base_with_what_peft_would_add(tmp_path: Path, share: Path) -> None:
    import torch

    from tests.models import LINEARS, load, make_adapter, make_base, merged_by_peft

    base = make_base(tmp_path / "base")
    pair = [make_adapter(tmp_path / f"{seed}", base, seed=seed, target_modules=LINEARS["llama"]) for seed in (1, 2)]
    wanted = load(base)
    wanted.load_state_dict(merged_by_peft(base, [(pair[0], 0.6), (pair[1], 0.3)]))
    tokens = torch.arange(10)[None]

    @torch.inference_mode()
    def score(candidate: Candidate) -> float:
        return -float((load(candidate.merged)(tokens).logits - wanted(tokens).logits).square().mean())

    report = lorakit.search(pair, score, base=base, share=share, start=(0.6, 0.3), evaluations=5)
    assert report.weights == (0.6, 0.3)
    assert report.score == pytest.approx(0.0, abs=1e-6)
    assert all(trial.score is not None and trial.score < -1e-3 for trial in report.trials[1:])
    assert not list(share.iterdir())


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_each_candidate_is_served_under_a_new_name_while_it_is_scored(
    pair: list[Path], share: Path, vllm: Vllm, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("LORAKIT_API_KEY", "secret")

    def score(candidate: Candidate) -> float:
        assert candidate.url == vllm.url
        assert vllm.served == {candidate.model: str(candidate.folder)}
        if candidate.weights == (1.0, 0.0):
            raise RuntimeError("no")
        return 1.0

    report = lorakit.search(pair, score, evaluations=5, share=share, url=vllm.url + end)
    assert [trial.score for trial in report.trials] == [1.0, None, 1.0, 1.0, 1.0]
    assert [verb for verb, _ in vllm.log] == ["load", "unload"] * 5
    names = [name for verb, name in vllm.log if verb == "load"]
    assert [name for verb, name in vllm.log if verb == "unload"] == names
    assert len(set(names)) == 5
    assert all(name.startswith("lorakit-search-") for name in names)
    assert vllm.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, {"error": {"message": "rank 4 is above 2"}}, "answered 400 to load_lora_adapter: rank 4 is above 2$"),
        (401, {"error": "Unauthorized"}, "answered 401.*set LORAKIT_API_KEY"),
        (404, {"detail": "Not Found"}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        (404, {"error": {"message": "No adapter found for x"}}, "No adapter found for x$"),
        (500, {"oops": 1}, "answered 500.*oops"),
    ],
)
def test_what_a_server_says_no_to_is_said_in_its_words(
    pair: list[Path], share: Path, vllm: Vllm, status: int, body: dict[str, Any], said: str
) -> None:
    vllm.refusal = (status, body)
    with pytest.raises(lorakit.errors.LorakitError, match=said):
        lorakit.search(pair, lambda candidate: len(candidate.model), share=share, url=vllm.url)
    assert not list(share.iterdir())


def test_a_server_that_does_not_answer_is_named(pair: list[Path], share: Path) -> None:
    for url in ("http://127.0.0.1:9", "127.0.0.1"):
        with pytest.raises(lorakit.errors.LorakitError, match=f"no server answers at '{url}'"):
            lorakit.search(pair, lambda candidate: len(candidate.model), share=share, url=url)


def test_what_the_search_was_not_given_is_named(pair: list[Path]) -> None:
    with pytest.raises(lorakit.errors.LorakitError, match="needs a base"):
        lorakit.search(pair, lambda candidate: len(str(candidate.merged)))
    with pytest.raises(lorakit.errors.LorakitError, match="needs a server"):
        lorakit.search(pair, lambda candidate: len(candidate.model))


@pytest.mark.slow
def test_lorakit_serve_answers_as_each_candidate_and_keeps_none(world: World) -> None:
    from tests.server.real import ask

    alone = {(1.0, 0.0): 0, (0.0, 1.0): 1}
    with world.server.client() as client:

        def score(candidate: Candidate) -> float:
            found = ask(client, candidate.model)
            assert found.revision is not None
            assert found.revision.startswith(candidate.model)
            number = alone.get(candidate.weights)
            return float(number is None or found.agrees_with(world.cold_answer(number, "hello")))

        report = lorakit.search(
            world.adapters[:2], score, evaluations=6, rank=8, url=world.server.url, share=world.watched
        )
        assert [trial.score for trial in report.trials] == [1.0] * 6
        served = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert not [name for name in served if "search" in name]
    assert not list(world.watched.glob(".lorakit-search-*"))
