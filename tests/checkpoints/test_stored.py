"""What the store keeps, as rows of a listing."""

from __future__ import annotations

from pathlib import Path

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.locate import find_stored
from lorakit.checkpoints.metadata import Metadata
from lorakit.checkpoints.stored import row_of, rows_in_store
from lorakit.merge.base import read_base
from lorakit.server.following.intake import take_in
from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, Kept, keep_checkpoint
from lorakit.store.store import Store
from tests.checkpoints.written import evaluated, write_checkpoint
from tests.folders import write_base


def keep(tmp_path: Path, run: str, step: int | None, loss: float | None = None, *, final: bool = False) -> Kept:
    source = write_checkpoint(tmp_path / f"{run}-{step}-{final}", seed=step or 0)
    facts = Facts(step=step, eval_loss=loss, eval_step=step, metrics={"bleu": 1.0})
    described = Described("adapter", "transformers", step, facts, "org/base", 2, final)
    return keep_checkpoint(tmp_path / "home", source, described, run=run, unchanged=lambda: True)


def test_what_was_kept_is_said_in_the_order_of_runs_and_steps(tmp_path: Path) -> None:
    kept = [keep(tmp_path, *what) for what in (("sql", 300, 1.5), ("sql", 100, 0.5), ("chat", 7, None))]
    last = keep(tmp_path, "sql", None, final=True)
    rows = rows_in_store(tmp_path / "home")
    assert [row.id for row in rows] == [kept[2].id, kept[1].id, kept[0].id, last.id]
    first = kept[1]
    assert rows[1] == Metadata(
        first.id, str(first.folder), "sql", 100, eval_loss=0.5, eval_step=100, metrics={"bleu": 1.0}, kind="adapter",
        base="org/base", rank=2, size=first.size, digest=first.digest, created=first.created, state="finished",
        aliases=("best",),
    )  # fmt: skip
    assert [row.aliases for row in rows] == [("latest",), ("best",), (), ("latest",)]


def test_a_run_can_be_picked_out(tmp_path: Path) -> None:
    keep(tmp_path, "sql", 5)
    wanted = keep(tmp_path, "chat", 5)
    assert [row.id for row in rows_in_store(tmp_path / "home", "chat")] == [wanted.id]
    assert rows_in_store(tmp_path / "home", "nothing") == []
    assert rows_in_store(tmp_path / "nowhere") == []


def test_what_a_server_took_in_is_there_too_with_what_points_at_it(tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "base"))
    folder = write_checkpoint(
        tmp_path / "sql" / "checkpoint-200", [evaluated(200, 1.0)], base_model_name_or_path="org/base"
    )
    store = Store(tmp_path / "home", "llama")
    taken = take_in(store, base, look_at(folder), run="sql", kind="step", step=200, max_rank=8).revision
    store.move_alias("sql", "", taken.id, "test")
    store.move_alias("sql", "prod", taken.id, "test")
    store.close()
    keep(tmp_path, "sql", 100)
    kept, served = rows_in_store(tmp_path / "home")
    assert (kept.step, kept.aliases) == (100, ("latest",))
    assert (served.id, served.base, served.eval_loss, served.digest) == (taken.name, "org/base", 1.0, taken.digest)
    assert served.aliases == ("sql", "latest", "best", "prod")
    assert Path(served.path) == taken.folder


def test_one_row_is_the_same_as_among_all(tmp_path: Path) -> None:
    keep(tmp_path, "sql", 5)
    keep(tmp_path, "sql", 6)
    found = find_stored("sql@latest", tmp_path / "home")
    assert found is not None
    assert row_of(found, tmp_path / "home") == rows_in_store(tmp_path / "home")[1]


def test_one_that_lost_its_content_is_a_row_with_the_reason_and_the_others_are_listed(tmp_path: Path) -> None:
    lost, other = keep(tmp_path, "sql", 5), keep(tmp_path, "sql", 6)
    lost.folder.chmod(0o755)
    for file in lost.folder.iterdir():
        file.unlink()
    damaged, fine = rows_in_store(tmp_path / "home")
    assert (damaged.id, damaged.state, "lorakit store verify" in str(damaged.reason)) == (lost.id, "refused", True)
    assert (fine.id, fine.state, fine.reason) == (other.id, "finished", None)
    assert row_of(lost, tmp_path / "home") == damaged


def test_a_kept_file_is_the_path_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    described = Described("regular", "torch", 5, Facts(step=5))
    keep_checkpoint(tmp_path / "home", tmp_path / "last.ckpt", described, run="x", unchanged=lambda: True)
    (row,) = rows_in_store(tmp_path / "home")
    assert Path(row.path).read_bytes() == b"weights"
