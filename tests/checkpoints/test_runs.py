"""Where runs and adapters are in a watched folder, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.checkpoints.runs import Candidate, candidates_of, find_candidates


def put(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def adapter(folder: Path) -> Path:
    put(folder)
    (folder / "adapter_config.json").touch()
    return folder


def found(root: Path) -> list[tuple[str, str, int | None]]:
    return [(one.run, one.kind, one.step) for one in find_candidates(root)]


def test_each_folder_that_holds_checkpoints_is_a_run_of_its_name_in_the_order_of_steps(tmp_path: Path) -> None:
    put(tmp_path / "sql" / "checkpoint-1000", tmp_path / "sql" / "checkpoint-90", tmp_path / "chat" / "checkpoint-5")
    assert found(tmp_path) == [("chat", "step", 5), ("sql", "step", 90), ("sql", "step", 1000)]


def test_a_folder_that_is_an_adapter_is_an_adapter_of_that_name(tmp_path: Path) -> None:
    adapter(tmp_path / "chat")
    put(tmp_path / "nothing")
    assert found(tmp_path) == [("chat", "plain", None)]


def test_a_runs_own_root_is_final_and_comes_last(tmp_path: Path) -> None:
    put(adapter(tmp_path / "sql") / "checkpoint-5")
    assert found(tmp_path) == [("sql", "step", 5), ("sql", "final", None)]


def test_a_watched_folder_with_checkpoints_is_the_run_itself(tmp_path: Path) -> None:
    run = tmp_path / "sql"
    put(run / "checkpoint-5", run / "logs")
    assert found(run) == [("sql", "step", 5)]
    assert find_candidates(run)[0].folder == run / "checkpoint-5"


@pytest.mark.parametrize(
    "name",
    ["checkpoint-", "checkpoint-x", "checkpoint-5-tmp", "tmp-checkpoint-5", ".checkpoint-5", "checkpoint-5.partial",
     "checkpoint--5", "Checkpoint-5", "checkpoint-5 "],
)  # fmt: skip
def test_what_only_looks_like_a_checkpoint_is_none(tmp_path: Path, name: str) -> None:
    put(tmp_path / "sql" / name, tmp_path / "sql" / "checkpoint-1")
    assert found(tmp_path) == [("sql", "step", 1)]


def test_a_file_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    put(tmp_path / "sql")
    (tmp_path / "sql" / "checkpoint-5").touch()
    assert found(tmp_path) == []


def test_a_checkpoint_that_is_a_link_counts(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", tmp_path / "runs" / "sql")
    (tmp_path / "runs" / "sql" / "checkpoint-5").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "runs") == [("sql", "step", 5)]


def test_unfinished_writers_folders_are_not_seen(tmp_path: Path) -> None:
    adapter(tmp_path / ".chat.tmp-123")
    adapter(tmp_path / "tmp-checkpoint-5")
    assert found(tmp_path) == []


def test_a_run_may_be_called_anything_that_is_a_name(tmp_path: Path) -> None:
    put(tmp_path / "tmp-idea" / "checkpoint-5")
    assert found(tmp_path) == [("tmp-idea", "step", 5)]


def test_a_watched_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        find_candidates(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere"):
        candidates_of(tmp_path / "nowhere", "sql")


def test_a_folder_that_cant_be_listed_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a" / "checkpoint-1", tmp_path / "b" / "checkpoint-1")
    import os

    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: real(tmp_path / "gone" if Path(path).name == "a" else path))
    assert found(tmp_path) == [("b", "step", 1)]


def test_a_folder_that_was_named_is_a_run_an_adapter_or_one_checkpoint(tmp_path: Path) -> None:
    put(tmp_path / "run" / "checkpoint-5")
    assert candidates_of(tmp_path / "run", "x") == [Candidate(tmp_path / "run" / "checkpoint-5", "x", "step", 5)]
    one = tmp_path / "run" / "checkpoint-5"
    assert candidates_of(one, "x") == [Candidate(one, "x", "step", 5)]
    plain = adapter(tmp_path / "plain")
    assert candidates_of(plain, "x") == [Candidate(plain, "x", "plain")]
