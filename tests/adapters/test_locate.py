"""What a person types: a folder, a hub id, or by mistake a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.adapters.locate import open_adapter
from lorakit.errors import InvalidFile, NotFound, Refused
from tests.folders import write_adapter


def test_a_folder(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    assert open_adapter(str(folder)).sources[0].folder == folder


def test_a_hub_id_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = write_adapter(tmp_path / "a")

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("org/adapter", "v1")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_adapter("org/adapter@v1").sources[0].folder == folder


@pytest.mark.parametrize("name", ["/no/such", "./nothing", "org/no-such-adapter"])
def test_nothing_of_that_name(name: str) -> None:
    with pytest.raises(NotFound, match="there is no adapter"):
        open_adapter(name)


def test_a_run_names_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        write_adapter(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "checkpoint-200").mkdir()
    (tmp_path / "run" / "checkpoint-best").mkdir()
    with pytest.raises(Refused, match=r"is a run, not an adapter: .* the newest is '.*/run/checkpoint-100'"):
        open_adapter(str(tmp_path / "run"))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="is no adapter"):
        open_adapter(str(tmp_path))
