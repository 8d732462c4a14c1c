"""What a person types: a folder, a name in the store, a hub id, or by mistake a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import InvalidFile, NotFound, Refused, UsageError
from lorakit.files.folders import copy_file
from lorakit.store.catalog import Facts
from lorakit.store.locate import open_adapter
from lorakit.store.store import Source, open_store
from tests.folders import write_adapter


def test_a_folder(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    assert open_adapter(str(folder)).sources[0].folder == folder


def stored(home: Path, base: str, folder: Path, *, step: int = 500) -> None:
    with open_store(home, base) as store, store.staging() as staged:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            copy_file(folder / name, staged / name)
        digest, _, size = store.keep(staged)
        revision, _ = store.add(
            "sql", "step", digest, Facts(step=step, eval_loss=1.0, eval_step=step), rank=2, size=size,
            path=str(folder), source=Source("", ""), repaired=None, finished=True,
        )  # fmt: skip
        store.move_alias("sql", "", revision.id, "test")


@pytest.mark.parametrize("name", ["sql", "sql@best", "sql@latest", "sql@step-500"])
def test_a_name_in_the_store(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    stored(tmp_path / "home", "/base", write_adapter(tmp_path / "a"))
    assert open_adapter(name).sources[0].folder.parent == (tmp_path / "home" / "revisions")


def test_a_name_that_the_store_has_for_two_bases_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    stored(tmp_path / "home", "/one", write_adapter(tmp_path / "a"))
    stored(tmp_path / "home", "/other", write_adapter(tmp_path / "b", rank=3))
    with pytest.raises(UsageError, match="for several bases \\('/one', '/other'\\)"):
        open_adapter("sql@best")


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
