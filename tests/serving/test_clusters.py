"""The examples for Slurm and SkyPilot start servers, by commands that there are."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.commands import lorakit
from tests.folders import write_base
from tests.serving.programs import SERVING, run

JOB = SERVING / "slurm" / "lorakit.sbatch"
TASK = SERVING / "skypilot" / "lorakit.yaml"


def submitted(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The job run by hand, in a home of its own, with a program that says what it was given for lorakit."""
    program = folder / "program"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$LORAKIT_HOME" "$@"\n')
    program.chmod(0o755)
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "SLURM_JOB_ID": "4711", "LORAKIT": str(program), **more}
    return subprocess.run(["bash", JOB], env=environ, capture_output=True, text=True, timeout=20, check=False)


def test_a_job_says_where_it_listens_makes_a_key_and_becomes_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, runs = write_base(tmp_path / "llama"), tmp_path / "runs"
    runs.mkdir()
    given = {"LORAKIT_BASE": str(base), "LORAKIT_WATCH": str(runs)}
    ended = submitted(tmp_path, **given)
    assert ended.returncode == 0, ended.stderr
    home, *arguments = ended.stdout.splitlines()
    key = tmp_path / ".config" / "lorakit" / "key"
    assert re.fullmatch(r"[0-9a-f]{64}\n", key.read_text())
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    port = arguments[arguments.index("--port") + 1]
    assert (tmp_path / "lorakit-4711.url").read_text().strip().endswith(f":{port}")
    before = key.read_text()
    assert submitted(tmp_path, **given).stdout == ended.stdout, "a job that is queued again is where it was"
    assert key.read_text() == before
    for name, value in {**given, "LORAKIT_HOME": home}.items():
        monkeypatch.setenv(name, value)
    started = lorakit(capsys, *arguments, "--dry-run", "--json")
    assert started.code == 0, started.err
    assert json.loads(started.out)["base"] == "llama"


def test_a_job_without_a_base_ends_and_says_what_is_missing(tmp_path: Path) -> None:
    ended = submitted(tmp_path)
    assert ended.returncode != 0
    assert "LORAKIT_BASE: name the base model" in ended.stderr


def test_slurm_asks_the_server_itself_to_end_and_leaves_it_the_time() -> None:
    text = JOB.read_text(encoding="utf-8")
    assert "#SBATCH --signal=B:TERM@60\n" in text, "B: the batch shell, which exec makes the server"
    assert re.findall(r"^(?!#|\s|$).*", text, re.M)[-1].startswith("exec ")
    directives = re.findall(r"^#SBATCH .*", text, re.M)
    first_command = re.search(r"^(?!#|$)", text, re.M)
    assert first_command is not None
    assert text.rindex(directives[-1]) < first_command.start(), "Slurm reads no further than the first command"


def test_shellcheck_finds_nothing() -> None:
    run("shellcheck", JOB)


def test_the_sky_task_has_only_what_there_is_and_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task: dict[str, Any] = yaml.safe_load(TASK.read_text(encoding="utf-8"))
    assert task["secrets"] == {"HF_TOKEN": None}, "given when it is launched"
    assert "ports" not in task["resources"], "it listens on its own machine"
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    line = task["run"].removeprefix("exec ").replace("/runs", str(tmp_path))
    program, *arguments = shlex.split(line.replace("$BASE", str(write_base(tmp_path / "llama"))))
    assert Path(program).name == "lorakit"
    assert lorakit(capsys, *arguments, "--dry-run").code == 0
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, timeout=20, check=True)
    assert set(re.findall(r"\$\{?(\w+)", TASK.read_text(encoding="utf-8"))) <= task["envs"].keys()
