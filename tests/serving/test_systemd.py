"""The unit starts a server, and what systemd itself says of it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.cli.commands import lorakit
from tests.folders import write_base
from tests.serving.programs import SERVING, run

FILE = SERVING / "lorakit.service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """As it is, but with the program where it is here: systemd looks whether it can be run."""
    file = tmp_path / FILE.name
    file.write_text(FILE.read_text(encoding="utf-8").replace("/opt/lorakit/bin/lorakit", sys.executable))
    return file


def test_the_systemd_unit_starts_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(FILE)
    service = unit["Service"]
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "key").chmod(0o400)
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("LORAKIT_BASE", str(write_base(tmp_path / "llama")))
    monkeypatch.setenv("LORAKIT_WATCH", str(tmp_path / "runs"))
    assert service["EnvironmentFile"] == "/etc/lorakit/environment"
    assert set(re.findall(r"(LORAKIT_[A-Z]+)=/", FILE.read_text())) == {"LORAKIT_BASE", "LORAKIT_WATCH"}
    assert service["LoadCredential"].partition(":")[0] == "key"
    program, *arguments = shlex.split(service["ExecStart"].replace("%d", str(tmp_path)))
    assert Path(program).name == "lorakit"
    ended = lorakit(capsys, *arguments, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["base"] == "llama"
    assert service["KillMode"] == "mixed", "the engine is the supervisor's to end"


def test_systemd_finds_nothing_wrong_with_it(unit: Path) -> None:
    said = run("systemd-analyze", "verify", "--man=no", unit)
    assert FILE.name not in said, "a key that it does not know is no error for it"


def test_systemd_calls_it_well_protected(unit: Path) -> None:
    run("systemd-analyze", "security", "--offline=true", "--threshold=25", unit)
