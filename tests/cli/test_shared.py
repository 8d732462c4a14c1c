"""What several verbs take and print."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.cli.shared import progress_bar, weighted
from lorakit.errors import UsageError


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("runs/sql", ("runs/sql", 1.0)),
        ("runs/sql=0.7", ("runs/sql", 0.7)),
        ("a=b=-2", ("a=b", -2.0)),
        ("org/name@v1=1e-3", ("org/name@v1", 0.001)),
        ("x=0", ("x", 0.0)),
        ("https://host/sql?Signature=5ec4e7", ("https://host/sql?Signature=5ec4e7", 1.0)),
    ],
)
def test_a_weight_stands_behind_the_last_equals_sign(argument: str, expected: tuple[str, float]) -> None:
    assert weighted(argument) == expected


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "lr=1e-4"
    (folder / "checkpoint-5").mkdir(parents=True)
    assert weighted(str(folder)) == (str(folder), 1.0)
    assert weighted(f"{folder}/checkpoint-5") == (f"{folder}/checkpoint-5", 1.0)
    assert weighted(f"{folder}=0.5") == (str(folder), 0.5)


@pytest.mark.parametrize("argument", ["x=", "x=y", "=1", "x=nan", "x=inf"])
def test_what_is_no_weight_is_said(argument: str) -> None:
    with pytest.raises(UsageError, match="weight"):
        weighted(argument)


def test_no_bar_where_there_is_no_terminal() -> None:
    with progress_bar("merging") as progress:
        assert progress is None


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("merging") as progress:
        assert progress is not None
        progress(50, 100)
    assert capsys.readouterr().out == ""
