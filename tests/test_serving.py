"""What lies in `serving/` starts what it says."""

from __future__ import annotations

import json
import shlex
from configparser import ConfigParser
from pathlib import Path
from string import Template

import pytest

from tests.cli.commands import lorakit
from tests.folders import write_base
from tests.readme import ROOT


def test_the_systemd_unit_starts_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "serving" / "lorakit.service")
    service = unit["Service"]
    base = write_base(tmp_path / "llama")
    (tmp_path / "runs").mkdir()
    line = Template(service["ExecStart"]).substitute(LORAKIT_BASE=base, LORAKIT_RUNS=tmp_path / "runs")
    program, *arguments = shlex.split(line)
    assert Path(program).name == "lorakit"
    ended = lorakit(capsys, *arguments, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["base"] == "llama"
    assert service["KillMode"] == "mixed", "the engine is the supervisor's to end"
