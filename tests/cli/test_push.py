"""`lorakit push`: what went onto the Hub, and what stayed here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.written import write_checkpoint
from tests.cli.commands import lorakit
from tests.folders import write_adapter
from tests.hub import COMMIT, Hub

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    serving = Hub({"org/sql": write_adapter(tmp_path / "origin")})
    serving.point_there(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "hf_5ec4e7")
    yield serving
    serving.close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "sql" / "checkpoint-500", base_model_name_or_path="/models/llama")
    (folder / "optimizer.pt").write_bytes(b"o")
    return folder


def test_the_address_of_the_commit_is_printed_and_the_rest_said_beside_it(
    capsys: Capture, hub: Hub, checkpoint: Path
) -> None:
    ended = lorakit(capsys, "push", checkpoint, "org/sql")
    assert (ended.code, ended.out) == (0, f"{hub.url}/org/sql/commit/{COMMIT}\n")
    assert "left out: optimizer.pt (only its trainer needs it)\n" in ended.err
    assert "note: its base is '/models/llama', a path that nobody else has" in ended.err
    assert ended.err.endswith("pushed to org/sql, with a model card\n")
    assert "5ec4e7" not in ended.out + ended.err


def test_a_dry_run_pushes_nothing(capsys: Capture, hub: Hub, checkpoint: Path) -> None:
    ended = lorakit(capsys, "push", checkpoint.parent, "org/sql", "--dry-run")
    assert "adapter_model.safetensors" in ended.out.split()
    result = json.loads(lorakit(capsys, "push", checkpoint, "org/sql", "--dry-run", "--json").out)
    assert (result["url"], result["left_out"]) == (None, {"optimizer.pt": "only its trainer needs it"})
    assert hub.pushed == {}


def test_export_to_the_hub_is_a_push(capsys: Capture, hub: Hub, checkpoint: Path) -> None:
    assert lorakit(capsys, "export", checkpoint, "hf://org/sql").out == f"{hub.url}/org/sql/commit/{COMMIT}\n"
    assert "adapter_model.safetensors" in hub.pushed


def test_usage(capsys: Capture, hub: Hub, checkpoint: Path) -> None:
    assert lorakit(capsys, "push", checkpoint, "org/sql", "--private").code == 2
    assert lorakit(capsys, "push", checkpoint, "org/none").code == 3
    assert lorakit(capsys, "push", checkpoint / "none", "org/sql").code == 3
    assert hub.pushed == {}
