"""`lorakit serve` up to the point where it would start vLLM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.folders import write_adapter, write_base


def serve(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorakit", "serve", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ},
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "models" / "llama")


def test_a_dry_run_prints_the_command_and_starts_nothing(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "runs" / "big", rank=40)
    done = serve(
        base, "--watch", tmp_path / "runs", "--home", tmp_path / "home", "--dry-run", "--json", "--", "--seed", 7
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["base"] == "llama"
    assert plan["max_lora_rank"] == 64, "the largest rank found, rounded up to one that vLLM takes"
    assert plan["command"][-2:] == ["--seed", "7"]
    assert plan["command"][plan["command"].index("--served-model-name") + 1] == "llama"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["BASE/nowhere"], 3, "nowhere"),
        (["BASE", "--watch", "nowhere"], 3, "no folder 'nowhere'"),
        (["BASE", "--adapter", "sql=nowhere"], 3, "nowhere"),
        (["BASE", "--adapter", "sql"], 2, "NAME=PATH"),
        (["BASE", "--adapter", "latest=BASE"], 4, "reserved"),
        (["BASE", "--adapter", "llama=BASE"], 4, "reserved"),
        (["BASE", "--adapter", "a=BASE", "--adapter", "a=BASE"], 2, "twice"),
        (["BASE", "--max-lora-rank", "1000"], 2, "512"),
        (["BASE", "--max-loras", "0"], 2, "max-loras"),
        (["BASE", "--", "--port", "1"], 2, "use --port"),
        (["BASE", "--follow", "newest"], 2, "newest"),
        (["BASE", "--host", "no.such.host.invalid"], 2, "--host"),
        (["BASE", "--probe", "nowhere"], 3, "no file"),
        (["BASE", "--probe", "BASE/config.json"], 2, "line 1"),
        (["BASE", "--retention", "nowhere"], 3, "no file"),
        (["BASE", "--follow", "best", "--metric", "accuracy"], 2, "less"),
        (["BASE", "--min-delta", "-1"], 2, "min-delta"),
        (["BASE", "--max-loras", "2", "--pin", "a", "--pin", "b"], 2, "no place for another"),
        ([], 2, "name the BASE"),
        (["BASE", "--takeover"], 3, "without --takeover"),
        (["--engine", "127.0.0.1:8000"], 2, "http://HOST:PORT"),
        (["--engine", "http://127.0.0.1:9", "--takeover"], 2, "nothing to do for --takeover"),
        (["BASE", "--engine", "http://127.0.0.1:9", "--", "--seed", "7"], 2, "nothing to do for arguments"),
    ],
)
def test_what_cant_be_served_says_so_and_leaves_nothing(
    tmp_path: Path, base: Path, arguments: list[str], code: int, said: str
) -> None:
    done = serve(*(word.replace("BASE", str(base)) for word in arguments), LORAKIT_HOME=str(tmp_path / "home"))
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "home").exists()


def test_a_port_that_is_taken_says_so(tmp_path: Path, base: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = serve(base, "--port", taken.getsockname()[1], LORAKIT_HOME=str(tmp_path / "home"))
    assert done.returncode == 5, done.stderr
    assert "is taken" in done.stderr


def test_the_base_is_called_by_what_was_typed(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.cli.serve import base_name

    (tmp_path / "current").symlink_to(base)
    monkeypatch.chdir(base)
    assert [base_name(str(tmp_path / "current")), base_name(f"{base}/"), base_name(".")] == [
        "current",
        "llama",
        "llama",
    ]
    assert [base_name("org/Model-7B"), base_name("org/Model-7B@v1")] == ["Model-7B", "Model-7B"]


def test_what_guards_a_name_and_what_is_kept_reaches_the_engine(tmp_path: Path, base: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "expect": "2"}')
    done = serve(
        base, "--follow", "best", "--metric", "accuracy", "--mode", "max", "--min-delta", 0.01, "--min-steps", 200,
        "--probe", tmp_path / "prompts.jsonl", "--keep-revisions", 3, "--max-cpu-loras", 32, "--pin", "sql",
        "--dry-run", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = json.loads(done.stdout)["command"]
    assert command[command.index("--max-cpu-loras") + 1] == "33"
