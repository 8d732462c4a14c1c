"""What the README shows is run, as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakit.cli.main import VERBS
from tests.checkpoints.moving.archives import tarred
from tests.checkpoints.moving.web import Web, serving
from tests.checkpoints.written import evaluated, finish
from tests.cli.commands import lorakit
from tests.folders import base_tensors, write_adapter, write_base
from tests.hub import Hub
from tests.readme import README, ROOT, blocks
from tests.server.fake_vllm import FakeVllm, answering
from tests.server.running import running

# What has to have happened before a verb has something to do.
BEFORE = {
    "verify": ["merge runs/chat --out merged"],
    "unmerge": ["merge runs/chat --out merged"],
    "show": ["mix runs/sql/checkpoint-500=0.7 runs/chat=0.3 --out mixed", "shrink mixed --rank 1 --out small"],
    "diff": ["mix runs/sql/checkpoint-500=0.7 runs/chat=0.3 --out mixed", "shrink mixed --rank 1 --out small"],
    "check": ["convert runs/sql/checkpoint-500 --out servable"],
    "undelete": ["rm runs/sql/checkpoint-500 --yes"],
    "rollback": ["load sql runs/chat"],
}
ASK_A_SERVER = {"ps", "load", "unload", "rollback", "alias"}
TRAIN = """
import os, shutil
shutil.copytree("runs/sql/checkpoint-500", os.environ["LORAKIT_OUTPUT_CHECKPOINT_DIR"] + "/checkpoint-500")
"""


@pytest.fixture
def web() -> Iterator[Web]:
    """What stands for the bucket whose URL the README shows."""
    with serving() as running:
        yield running


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    running = Hub({"org/sql-lora": write_adapter(tmp_path / "on-the-hub")})
    running.point_there(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield running
    running.close()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders that the README speaks of, and an empty store."""
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "train.py").write_text(TRAIN)
    base = write_base(tmp_path / "models" / "llama", hidden_size=8, num_attention_heads=2)
    write_base(tmp_path / "models" / "tuned", {name: 1.01 * value for name, value in base_tensors().items()})
    torch.save({"state_dict": {f"model.{name}": torch.from_numpy(value) for name, value in base_tensors().items()}},
               tmp_path / "last.ckpt")  # fmt: skip
    (tmp_path / "score.py").write_text(next(block for block in blocks("python") if "score.py" in block))
    for name in ("runs/sql/checkpoint-500", "runs/chat"):
        write_adapter(tmp_path / name, base_model_name_or_path=str(base))
    finish(tmp_path / "runs/sql/checkpoint-500", [evaluated(500, 1.1)])
    write_adapter(tmp_path / "runs/sql/checkpoint-600", base_model_name_or_path=str(base))
    finish(tmp_path / "runs/sql/checkpoint-600", [evaluated(500, 1.1), evaluated(600, 1.2)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `lorakit serve models/llama --watch runs` would have started, on an engine that is none."""
    with running(workplace, workplace / "models" / "llama") as there:
        monkeypatch.setenv("LORAKIT_URL", there.url)
        yield


@pytest.fixture
def vllm(workplace: Path) -> Iterator[str]:
    """What somebody else runs."""
    with answering(FakeVllm(workplace / "models" / "llama")) as url:
        yield url


COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks("")
    for line in block.splitlines()
    if line.startswith("lorakit ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_does_what_it_says(
    command: list[str], workplace: Path, web: Web, hub: Hub, capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if command[1] in ASK_A_SERVER:
        request.getfixturevalue("server")
    for line in BEFORE.get(command[1], ()):
        assert lorakit(capsys, *shlex.split(line)).code == 0
    if command[1] == "fetch":
        web.put("sql.tar.gz", tarred(workplace / "runs" / "sql" / "checkpoint-500"))
        command = [web.url("sql.tar.gz") if part.startswith("https://") else part for part in command]
    if command[1] == "sync":
        command = [request.getfixturevalue("vllm") if part.startswith("http://") else part for part in command]
    if command[1:3] == ["key", "revoke"]:
        command = [*command[:3], json.loads(lorakit(capsys, "key", "create", "--adapters", "*", "--json").out)["id"]]
    ended = lorakit(capsys, *command[1:], *(["--dry-run"] if command[1] in ("serve", "sync") else []))
    assert ended.code == 0, ended.err
    if "--out" in command:
        assert (workplace / command[command.index("--out") + 1]).exists()


def test_every_verb_is_shown() -> None:
    assert {command[1] for command in COMMANDS} == set(VERBS)


def test_the_python_example_runs(workplace: Path) -> None:
    (example,) = [block for block in blocks("python") if "load_adapter" in block]
    exec(compile(example, "README.md", "exec"), {})
    assert (workplace / "mixed" / "adapter_model.safetensors").is_file()
    assert (workplace / "merged" / "model.safetensors").is_file()


def test_the_picture_is_there() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()
