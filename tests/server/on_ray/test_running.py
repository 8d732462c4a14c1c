"""`lorakit serve --ray` where it can't be: said before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import lorakit


def test_without_ray_it_says_how_to_get_it(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("lorakit.cluster.joining.find_spec", lambda _: None)
    ended = lorakit(capsys, "serve", str(numbers), "--ray", "--port", "0")
    assert ended.code == 2
    assert "pip install 'lorakit[ray]'" in ended.err


@pytest.mark.parametrize("flags", [("--takeover",), ("--max-cpu-loras", "9")])
def test_what_can_not_be_had_with_it_is_refused(
    numbers: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = lorakit(capsys, "serve", str(numbers), "--ray", "--replicas", "2", *flags)
    assert ended.code == 2
    assert f"{flags[0]} can't be had with --ray" in ended.err
