"""`lorakit serve --store`: said wrong, it ends at once, whatever else was said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.store.remote import objects
from tests.cli.commands import lorakit
from tests.folders import write_base


@pytest.mark.parametrize("address", ["gs://models/x", "models", "s3://", "s3://models/a b"])
def test_what_is_no_address_is_a_usage_error(capsys: pytest.CaptureFixture[str], address: str) -> None:
    ended = lorakit(capsys, "serve", "no-such-base", "--store", address)
    assert ended.code == 2
    assert "--store" in ended.err


def test_credentials_in_the_address_are_refused_and_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_STORE", "s3://AKIA:hush@models/x")
    for words in (["serve", "no-such-base"], ["config", "show"]):
        ended = lorakit(capsys, *words)
        assert ended.code == 2
        assert "environment" in ended.err
        assert "hush" not in ended.out + ended.err


def test_without_s3fs_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(objects, "find_spec", lambda name: None)
    base = write_base(tmp_path / "base")
    ended = lorakit(capsys, "serve", str(base), "--store", "s3://models/x", "--dry-run")
    assert ended.code == 1
    assert "pip install 'lorakit[s3]'" in ended.err
