"""`hf lorakit …`, by the `hf` that is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli.hf_extension import extensions_folder, register
from lorakit.errors import Conflict, LorakitError

BIN = Path(sys.executable).parent
HF = BIN / "hf"
OURS = BIN / "hf-lorakit"


def run(home: Path, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=False, env=environ)


@pytest.mark.skipif(not (HF.exists() and OURS.exists()), reason="hf and hf-lorakit are not beside this Python")
def test_once_registered_hf_runs_lorakit_with_its_arguments_and_exit_codes(tmp_path: Path) -> None:
    told = run(tmp_path, OURS, "--register")
    assert told.returncode == 0, told.stderr
    assert Path(told.stdout.strip()).is_relative_to(tmp_path)
    done = run(tmp_path, HF, "lorakit", "store", "path", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"path": os.environ["LORAKIT_HOME"]})
    wrong = run(tmp_path, HF, "lorakit", "merg")
    assert (wrong.returncode, "Try 'hf lorakit --help'" in wrong.stderr) == (2, True)


def test_registering_again_takes_its_own_place_and_never_anothers(tmp_path: Path) -> None:
    register(Path("/old/hf-lorakit"), tmp_path)
    manifest = register(Path("/new/hf-lorakit"), tmp_path)
    said = json.loads(manifest.read_text())
    assert said["executable_path"] == "/new/hf-lorakit"
    manifest.write_text(json.dumps({**said, "owner": "somebody", "repo_id": "somebody/hf-lorakit"}))
    with pytest.raises(Conflict, match="from somebody/hf-lorakit: hf extensions remove lorakit"):
        register(Path("/new/hf-lorakit"), tmp_path)


def test_an_hf_without_extensions_is_to_be_upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub.cli.extensions", None)
    with pytest.raises(LorakitError, match="pip install --upgrade huggingface_hub"):
        extensions_folder()
