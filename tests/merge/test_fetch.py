"""A base on the hub is planned from its headers, and comes shard by shard while earlier ones are merged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lorakit.errors import Conflict, InvalidFile, NotFound, OutOfSpace
from lorakit.merge import fetch
from lorakit.merge import merge as module
from lorakit.merge.fetch import open_base
from lorakit.merge.journal import Journal
from lorakit.merge.merge import merge
from tests.folders import base_tensors, leftovers, stored, write_adapter, write_base
from tests.hub import COMMIT, Hub

NAME = "someone/model"


def shard(number: int) -> str:
    return f"model-{number:05}-of-00004.safetensors"


SHARDS = [shard(number) for number in range(1, 5)]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    folder = write_base(tmp_path / "origin", shards=4)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base_model_name_or_path=NAME)


@pytest.fixture
def hub(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    serving = Hub({NAME: origin})
    serving.point_there(monkeypatch, tmp_path / "cache")
    yield serving
    serving.close()


def expected(origin: Path, adapter: Path, tmp_path: Path) -> dict[str, bytes]:
    merge(origin, adapter, out=tmp_path / "expected", device="cpu")
    return weights(tmp_path / "expected")


def weights(folder: Path) -> dict[str, bytes]:
    apart = ("lorakit.json", "README.md")  # they name the base, by its folder or by its id
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in apart}


def test_a_plan_needs_no_weights(hub: Hub, adapter: Path) -> None:
    report = merge(NAME, adapter, dry_run=True)
    assert len(report.plan.shards) == 4
    assert not hub.downloads().keys() & set(SHARDS)
    assert {file for _, method, file, wanted in hub.log if wanted} == set(SHARDS)


def test_earlier_shards_are_merged_while_later_ones_come(
    hub: Hub, origin: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: dict[str, float] = {}
    enter = Journal.enter

    def timed(self: Journal, name: str, *arguments: object) -> None:
        enter(self, name, *arguments)  # type: ignore[arg-type]
        entered[name] = time.monotonic()

    want = expected(origin, adapter, tmp_path)
    hub.slow = {shard(2): 0.7}
    monkeypatch.setattr(Journal, "enter", timed)
    report = merge(None, adapter, out=tmp_path / "out", device="cpu")
    asked = hub.downloads()
    assert sorted(SHARDS, key=asked.__getitem__) == SHARDS
    assert entered[shard(1)] < asked[shard(3)]
    assert weights(tmp_path / "out") == want
    assert report.plan.base.folder.name == COMMIT


def test_what_is_in_the_cache_is_taken_from_there(
    hub: Hub, origin: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(NAME, adapter, out=tmp_path / "one", device="cpu")
    asked = len(hub.log)
    merge(NAME, adapter, out=tmp_path / "two", device="cpu")
    assert not [file for _, _, file, _ in hub.log[asked:] if file in SHARDS]
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    merge(NAME, adapter, out=tmp_path / "three", device="cpu")
    assert len(hub.log) == asked
    assert weights(tmp_path / "one") == weights(tmp_path / "two") == weights(tmp_path / "three")


def test_a_base_in_one_file(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.repositories[NAME] = write_base(tmp_path / "single")
    merge(NAME, adapter, out=tmp_path / "out", device="cpu")
    assert sorted(stored(tmp_path / "out")) == sorted(base_tensors())


def test_values_that_the_plan_needs_are_fetched_first(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    hub.repositories[NAME] = write_base(tmp_path / "tied", tensors, shards=4, tie_word_embeddings=True)
    merge(NAME, adapter, out=tmp_path / "out", device="cpu")
    merge(tmp_path / "tied", adapter, out=tmp_path / "expected", device="cpu")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


@pytest.mark.parametrize("resume", [False, True])
def test_a_download_that_fails_leaves_nothing_but_what_can_be_gone_on_with(
    hub: Hub, origin: Path, adapter: Path, tmp_path: Path, resume: bool
) -> None:
    want = expected(origin, adapter, tmp_path)
    hub.gone = {shard(3)}
    with pytest.raises(NotFound, match=rf"'{shard(3)}' of '{NAME}' could not be downloaded"):
        merge(NAME, adapter, out=tmp_path / "out", device="cpu", resume=resume)
    assert len(leftovers(tmp_path)) == resume
    assert not (tmp_path / "out").exists()
    hub.gone = set()
    report = merge(NAME, adapter, out=tmp_path / "out", device="cpu", resume=resume)
    assert bool(report.resumed) == resume
    assert weights(tmp_path / "out") == want


def test_what_comes_is_what_was_planned_with(
    hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = module.plan_merge

    def plan_and_change(*arguments: object, **options: object) -> object:
        planned = plan(*arguments, **options)  # type: ignore[arg-type]
        hub.repositories[NAME] = write_base(
            tmp_path / "other", {name: np.float16(value) for name, value in base_tensors().items()}, shards=4
        )
        return planned

    monkeypatch.setattr(module, "plan_merge", plan_and_change)
    with pytest.raises(Conflict, match="not what its header on the hub said"):
        merge(NAME, adapter, out=tmp_path / "out", device="cpu")
    assert leftovers(tmp_path) == []


def test_without_ranges_only_the_head_is_read(hub: Hub) -> None:
    hub.ranges = False
    assert set(open_base(NAME).tensors) == set(base_tensors())


def test_a_long_header_takes_two_requests(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_BYTES", 16)
    assert set(open_base(NAME).tensors) == set(base_tensors())
    assert sum(bool(wanted) for *_, wanted in hub.log) == 8


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (1 << 20).to_bytes(8, "little")])
def test_a_shard_that_is_none(hub: Hub, origin: Path, content: bytes) -> None:
    (origin / shard(2)).write_bytes(content)
    with pytest.raises((InvalidFile, NotFound), match="model-00002"):
        open_base(NAME)


def test_a_hub_that_has_none_of_that_name(hub: Hub, adapter: Path) -> None:
    with pytest.raises(NotFound, match="it has none of that name, or none that you may read"):
        merge("someone/other", adapter, dry_run=True)


def test_a_base_of_pickles_is_refused(hub: Hub, origin: Path, adapter: Path) -> None:
    for file in origin.glob("model*"):
        file.unlink()
    (origin / "pytorch_model.bin").touch()
    with pytest.raises(InvalidFile, match="has no weights"):
        merge(NAME, adapter, dry_run=True)


def test_room_in_the_cache_is_asked_for(
    hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "free_bytes", lambda _: 1000)
    with pytest.raises(OutOfSpace, match="not in the cache"):
        merge(NAME, adapter, out=tmp_path / "out", device="cpu")
    assert leftovers(tmp_path) == []
    assert not hub.downloads().keys() & set(SHARDS)


def test_the_login_of_huggingface_hub_is_used(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    merge(NAME, adapter, dry_run=True)
    assert hub.tokens == {"Bearer hf_of_a_test"}


@pytest.fixture
def slow_merge(hub: Hub, adapter: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command line, waiting for the second shard of four."""
    hub.slow = {shard(2): 60}
    apart = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "x"}
    out = tmp_path / "results" / "out"
    program = "import sys; from lorakit.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "merge", str(adapter), "--out", str(out), "--device", "cpu"]
    running = subprocess.Popen(command, env={**os.environ, **apart}, stderr=subprocess.PIPE, text=True)
    while shard(2) not in hub.downloads() and running.poll() is None:
        time.sleep(0.02)
    yield running
    running.kill()
    running.communicate()


def test_an_interruption_does_not_wait_for_a_download(slow_merge: subprocess.Popen[str], tmp_path: Path) -> None:
    slow_merge.send_signal(signal.SIGINT)
    _, said = slow_merge.communicate(timeout=20)
    assert slow_merge.returncode == 130, said
    assert "error: interrupted" in said
    assert not (tmp_path / "results").exists()
