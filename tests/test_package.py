"""Importing lorakit is cheap, and gives the names that it promises."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import lorakit

PROMISED = [
    "Adapter", "CompareReport", "Delta", "DiffReport", "ExtractReport", "LorakitError", "MergeReport", "MixReport",
    "SearchReport", "TensorsReport", "UnmergeReport", "VerifyReport", "compare", "diff", "diff_tensors", "extract",
    "load_adapter", "merge", "mix", "search", "shrink", "unmerge", "verify",
]  # fmt: skip


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_importing_lorakit_imports_nothing_heavy() -> None:
    ended = python("import sys, lorakit; sys.exit(', '.join({'torch', 'numpy', 'click'} & sys.modules.keys()) or 0)")
    assert ended.returncode == 0, ended.stderr


def test_help_runs_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; from lorakit.cli import main; main(['--help'])"
    ended = python(program)
    assert ended.returncode == 0, ended.stderr
    assert "merge" in ended.stdout


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names_are_there(name: str) -> None:
    assert name in lorakit.__all__
    assert name in dir(lorakit)
    assert not isinstance(getattr(lorakit, name), ModuleType)


def test_no_other_name_is() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lorakit.nonsense


def test_merge_stays_the_function_when_its_folder_is_imported() -> None:
    ended = python(
        "import lorakit.merge.merge, lorakit.mix.mix, lorakit; print(callable(lorakit.merge), callable(lorakit.mix))"
    )
    assert ended.stdout == "True True\n", ended.stderr


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert version("lorakit") == lorakit.__version__
