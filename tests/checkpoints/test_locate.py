"""What a person types: a folder or file, a run, a name in the store, a hub id."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lorakit.checkpoints.locate import checkpoint_folder, open_adapter
from lorakit.errors import InvalidFile, NotFound, UsageError
from lorakit.files.folders import copy_file
from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, Kept, keep_checkpoint
from lorakit.store.store import Source, open_store
from tests.checkpoints.written import write_checkpoint, write_model_checkpoint
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
    with pytest.raises(NotFound, match="there is no "):
        open_adapter(name)


def test_a_run_stands_for_its_newest_finished_checkpoint_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for step in (5, 100, 20):
        write_checkpoint(run / f"checkpoint-{step}")
    (run / "checkpoint-200").mkdir()
    (run / "checkpoint-best").mkdir()
    with caplog.at_level(logging.INFO, "lorakit"):
        assert open_adapter(str(run)).sources[0].folder == run / "checkpoint-100"
    newer, chosen = caplog.messages
    assert newer.startswith(f"'{run / 'checkpoint-200'}' is newer than checkpoint-100, but is incomplete: ")
    assert chosen == f"'{run}' is a run: its newest finished checkpoint is checkpoint-100"


def test_a_checkpoint_that_is_named_is_that_one_and_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path / "run" / "checkpoint-9")
    named = write_checkpoint(tmp_path / "run" / "checkpoint-5")
    with caplog.at_level(logging.INFO, "lorakit"):
        assert checkpoint_folder(str(named)) == named
    assert caplog.messages == []


def test_a_run_whose_own_folder_is_an_adapter_stands_for_that_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_adapter(tmp_path / "run")
    with caplog.at_level(logging.INFO, "lorakit"):
        assert checkpoint_folder(str(run)) == run
        assert caplog.messages == []
        for step in (5, 50):
            write_checkpoint(run / f"checkpoint-{step}")
        assert checkpoint_folder(str(run)) == run
    assert caplog.messages == [f"'{run}' stands for what its trainer saved last, not for checkpoint-50 in it"]


def test_one_whose_own_folder_is_only_begun_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    newest = write_checkpoint(tmp_path / "run" / "checkpoint-5")
    (tmp_path / "run" / "adapter_config.json").write_bytes((newest / "adapter_config.json").read_bytes())
    assert checkpoint_folder(str(tmp_path / "run")) == newest


def test_a_run_of_whole_models_stands_for_the_newest(tmp_path: Path) -> None:
    newest = write_model_checkpoint(tmp_path / "run" / "checkpoint-5")
    assert checkpoint_folder(str(tmp_path / "run")) == newest


def test_a_run_without_a_finished_checkpoint_says_why(tmp_path: Path) -> None:
    write_adapter(tmp_path / "run" / "checkpoint-5")
    with pytest.raises(NotFound, match=r"none of the 1 checkpoints in .* is finished: the newest is incomplete: "):
        open_adapter(str(tmp_path / "run"))


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    for run in ("sql", "chat"):
        write_checkpoint(tmp_path / run / "checkpoint-5")
    with pytest.raises(NotFound, match="is no run but holds some: name one of chat, sql"):
        open_adapter(str(tmp_path))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="is no adapter"):
        open_adapter(str(tmp_path))


def test_a_file_is_a_checkpoint_but_no_adapter(tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a") / "adapter_model.safetensors"
    assert checkpoint_folder(str(file)) == file
    with pytest.raises(InvalidFile, match=r"is a file, and an adapter is a folder: name its folder, '.*/a'"):
        open_adapter(str(file))


def test_a_mistyped_name_is_answered_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    write_checkpoint(tmp_path / "runs" / "customers" / "checkpoint-500")
    with pytest.raises(NotFound, match=r"did you mean '.*runs/customers'\?"):
        checkpoint_folder(str(tmp_path / "runs" / "custmers"))
    kept(tmp_path, "customers", 500)
    with pytest.raises(NotFound, match=r"did you mean 'customers'\?"):
        checkpoint_folder("custmers@latest")
    with pytest.raises(NotFound, match="of 'customers' it has customers@step-500-"):
        checkpoint_folder("customers@step-9")


def kept(tmp_path: Path, run: str, step: int, *, seed: int = 1, loss: float = 1.0) -> Kept:
    source = tmp_path / f"{run}-{step}-{seed}"
    write_checkpoint(source, seed=seed)
    facts = Facts(step=step, eval_loss=loss, eval_step=step)
    described = Described("adapter", "transformers", step, facts)
    return keep_checkpoint(tmp_path / "home", source, described, run=run, unchanged=lambda: True)


def test_what_was_kept_is_found_by_every_name_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    first = kept(tmp_path, "sql", 500, loss=0.5)
    last = kept(tmp_path, "sql", 1000, seed=2)
    for name in ("sql@step-500", "sql@best", first.id, first.uid):
        assert open_adapter(name).sources[0].folder == first.folder
    for name in ("sql", "sql@latest", last.id):
        assert checkpoint_folder(name) == last.folder


def test_a_file_that_was_kept_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    described = Described("regular", "torch", 5, Facts(step=5))
    keep_checkpoint(tmp_path / "home", tmp_path / "last.ckpt", described, run="x", unchanged=lambda: True)
    assert checkpoint_folder("x@step-5").name == "last.ckpt"


def test_a_name_that_was_kept_and_is_served_means_what_was_kept_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    stored(tmp_path / "home", "/base", write_adapter(tmp_path / "a", rank=3))
    mine = kept(tmp_path, "sql", 500)
    with caplog.at_level(logging.INFO, "lorakit"):
        assert checkpoint_folder("sql@step-500") == mine.folder
        assert f"twice in the store: {mine.id}, which is meant here, and sql@step-500-" in caplog.text
        caplog.clear()
        stored(tmp_path / "home", "/base", mine.folder, step=700)
        mine = kept(tmp_path, "sql", 700)
        assert checkpoint_folder("sql@step-700") == mine.folder
        assert caplog.text == ""


def test_a_folder_in_the_store_that_lost_its_content_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    folder = kept(tmp_path, "sql", 500).folder
    empty(folder)
    with pytest.raises(InvalidFile, match="is empty: `lorakit store verify`"):
        checkpoint_folder("sql@step-500")


def empty(folder: Path) -> None:
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.unlink()
