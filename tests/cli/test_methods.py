"""`lorakit methods`: what there is, and what it is good for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lorakit.mix.methods.registry import METHODS
from tests.cli.commands import lorakit

Capture = pytest.CaptureFixture[str]


def test_every_method_is_listed_with_its_paper_and_options(capsys: Capture) -> None:
    ended = lorakit(capsys, "methods")
    assert (ended.code, ended.err) == (0, "")
    assert all(name in ended.out for name in METHODS)
    assert "arXiv:2306.01708" in ended.out
    assert "density=0.5" in ended.out


def test_the_first_is_the_default_and_says_what_the_study_found(capsys: Capture) -> None:
    listed = json.loads(lorakit(capsys, "methods", "--json").out)
    assert listed[0]["name"] == "linear"
    assert [method["name"] for method in listed if method["default"]] == ["linear"]
    assert "2511.21437" in listed[0]["summary"]


def test_listing_imports_no_torch() -> None:
    program = (
        "import sys; from lorakit.cli.main import cli; cli(['methods'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode == 0
