"""`lorakit pull`: a repository of the Hub becomes a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.moving.archives import files_below
from tests.cli.commands import lorakit
from tests.folders import write_adapter
from tests.hub import Hub

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    serving = Hub({"org/sql": write_adapter(tmp_path / "origin", base_model_name_or_path="org/llama")})
    serving.point_there(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    yield serving
    serving.close()


def test_it_is_named_as_the_repository_unless_told_otherwise(capsys: Capture, hub: Hub, tmp_path: Path) -> None:
    ended = lorakit(capsys, "pull", "org/sql@v1.0")
    assert (ended.code, ended.out) == (0, "sql\n")
    assert ended.err.startswith("fetched an adapter, written by peft, base org/llama, rank 2: 2 files, ")
    assert files_below(tmp_path / "sql") == files_below(tmp_path / "origin")
    assert lorakit(capsys, "pull", "hf://org/sql", "--out", "mine").out == "mine\n"
    assert lorakit(capsys, "pull", "org/sql").code == 5


def test_json_and_a_dry_run(capsys: Capture, hub: Hub, tmp_path: Path) -> None:
    ended = lorakit(capsys, "pull", "org/sql", "--dry-run")
    assert "adapter_model.safetensors" in ended.out
    assert not (tmp_path / "sql").exists()
    row = json.loads(lorakit(capsys, "pull", "org/sql", "--json").out)
    assert (row["kind"], row["base"], row["source"]) == ("adapter", "org/llama", "org/sql")


def test_what_is_no_repository(capsys: Capture, hub: Hub) -> None:
    assert lorakit(capsys, "pull", "https://huggingface.co/org/sql").code == 2
    assert lorakit(capsys, "pull", "org/none").code == 3


def test_a_folder_of_the_same_name_is_not_taken_for_it(capsys: Capture, hub: Hub, tmp_path: Path) -> None:
    write_adapter(tmp_path / "org" / "sql", rank=4)
    lorakit(capsys, "pull", "org/sql")
    assert files_below(tmp_path / "sql") == files_below(tmp_path / "origin")
