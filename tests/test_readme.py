"""What the README shows is run, as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lorakit.cli.main import VERBS
from tests.checkpoints.written import evaluated, finish
from tests.cli.commands import lorakit
from tests.folders import base_tensors, write_adapter, write_base
from tests.readme import README, ROOT, blocks


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders that the README speaks of; those that are verified or unmerged are there already."""
    base = write_base(tmp_path / "models" / "llama")
    write_base(tmp_path / "models" / "tuned", {name: 1.01 * value for name, value in base_tensors().items()})
    (tmp_path / "score.py").write_text(next(block for block in blocks("python") if "score.py" in block))
    for name in ("runs/sql/checkpoint-500", "runs/chat"):
        write_adapter(tmp_path / name, base_model_name_or_path=str(base))
    finish(tmp_path / "runs/sql/checkpoint-500", [evaluated(500, 1.1)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks("")
    for line in block.splitlines()
    if line.startswith("lorakit ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_does_what_it_says(
    command: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command[1:], "--dry-run"] if command[1] == "serve" else command[1:]
    if command[1] in ("verify", "unmerge"):
        assert lorakit(capsys, "merge", "runs/chat", "--out", "merged").code == 0
    if command[1] in ("show", "diff"):
        assert lorakit(capsys, "mix", "runs/sql/checkpoint-500=0.7", "runs/chat=0.3", "--out", "mixed").code == 0
        assert lorakit(capsys, "shrink", "mixed", "--rank", "1", "--out", "small").code == 0
    ended = lorakit(capsys, *arguments)
    assert ended.code == 0, ended.err
    if "--out" in command:
        assert (workplace / command[command.index("--out") + 1]).is_dir()


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
