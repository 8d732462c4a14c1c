"""`lorakit verify`: what differs on stdout, and 0 or 4 as the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.commands import lorakit
from tests.folders import write_adapter, write_base

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def out(capsys: Capture, tmp_path: Path) -> Path:
    base = write_base(tmp_path / "base", shards=2)
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    assert lorakit(capsys, "merge", f"{adapter}=0.5", "--out", tmp_path / "out").code == 0
    return tmp_path / "out"


def spoil(out: Path) -> None:
    file = out / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][1, 2] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_merge_that_is_as_it_should_be(capsys: Capture, out: Path) -> None:
    ended = lorakit(capsys, "verify", out)
    assert (ended.code, ended.out) == (0, "equal: 10 tensors bit for bit; 24 rows compared with float64\n")
    assert "MB/s" in ended.err


def test_a_merge_that_is_not(capsys: Capture, out: Path) -> None:
    spoil(out)
    (out / "config.json").write_text("{}")
    ended = lorakit(capsys, "verify", out)
    assert ended.code == 4
    first, second, third = ended.out.splitlines()
    assert first.startswith("model.layers.0.self_attn.q_proj.weight  1 of 64 elements differ, by ")
    assert second == "config.json is different"
    assert third.startswith("different: 9 tensors bit for bit, 1 not; ")


def test_as_data(capsys: Capture, out: Path) -> None:
    whole = lorakit(capsys, "verify", out, "--json")
    assert (whole.code, whole.err, json.loads(whole.out)["ok"]) == (0, "", True)
    spoil(out)
    ended = lorakit(capsys, "verify", out, "--json")
    result = json.loads(ended.out)
    assert (ended.code, result["ok"], result["equal"]) == (4, False, 9)
    assert result["wrong"][0]["tensor"] == "model.layers.0.self_attn.q_proj.weight"
    assert list(result["adapters_as_merged"].values()) == [True]


def test_sources_can_be_named(capsys: Capture, out: Path, tmp_path: Path) -> None:
    for folder, moved, flag in (("adapter", "run", "--adapter"), ("base", "moved", "--base")):
        (tmp_path / folder).rename(tmp_path / moved)
        ended = lorakit(capsys, "verify", out)
        assert (ended.code, flag in ended.err) == (3, True)
    sources = ["--base", tmp_path / "moved", "--adapter", f"{tmp_path / 'run'}=0.5"]
    assert lorakit(capsys, "verify", out, *sources).code == 0
    assert lorakit(capsys, "verify", out, *sources[:-1], tmp_path / "run").code == 4


def test_what_is_no_merge(capsys: Capture, out: Path, tmp_path: Path) -> None:
    assert lorakit(capsys, "verify", tmp_path / "base").code == 3
    assert lorakit(capsys, "verify", tmp_path / "nowhere").code == 3
