"""`lorakit serve --ray` where it can't be: said before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import Refused
from lorakit.server.on_ray import running
from lorakit.server.settings import Settings
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


def test_a_ray_serve_that_is_open_to_others_needs_a_key_whatever_the_host_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORAKIT_API_KEY", raising=False)
    settings = Settings(home=str(tmp_path))
    with pytest.raises(Refused, match=r"Ray Serve listens on 0\.0\.0\.0 already.*lorakit key create --admin"):
        running._refuse_open("0.0.0.0", settings)
    running._refuse_open("127.0.0.1", settings)
    monkeypatch.setenv("LORAKIT_API_KEY", "k" * 40)
    running._refuse_open("0.0.0.0", settings)
