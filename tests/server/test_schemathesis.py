"""The OpenAPI description of lorakit's own routes, put to the test: whatever is asked, no answer is a 500, or one that
the description does not know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.fake_engine import put_checkpoint
from tests.server.running import running
from tests.server.speaking_engine import SpeakingEngine

pytestmark = pytest.mark.timeout(600)

PROGRAM = Path(__file__).parents[2] / ".venv" / "schemathesis"
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


def ask_all(folder: Path, base: Path, *flags: str) -> None:
    if not PROGRAM.is_dir():
        pytest.skip(f"pip install --no-deps --target {PROGRAM} -r requirements/schemathesis.txt")
    for name in ("sql", "chat"):
        put_checkpoint(folder / "runs" / name, 500, seed=len(name))
    with running(folder, base, engine=SpeakingEngine(base, slots=8), max_mix_error=1.0) as there:
        asking = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{there.url}/openapi.json", "--checks", ",".join(CHECKS),
             "--exclude-path", "/v1/events",  # it never ends
             "--seed", "1", "--no-color", "--suppress-health-check", "all", "--request-timeout", "60", *flags],
            env={**os.environ, "PYTHONPATH": str(PROGRAM)}, cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert asking.returncode == 0, asking.stdout[-8000:] + asking.stderr[-2000:]


def test_what_is_asked_at_random_has_an_answer_that_is_described(tmp_path: Path, numbers: Path) -> None:
    ask_all(tmp_path, numbers, "--phases", "fuzzing", "--max-examples", "1")


@pytest.mark.slow
def test_all_that_may_be_asked_and_more_has_an_answer_that_is_described(tmp_path: Path, numbers: Path) -> None:
    ask_all(tmp_path, numbers, "--phases", "examples,coverage,fuzzing", "--max-examples", "50")
