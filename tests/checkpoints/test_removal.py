"""What a person names is removed when it is a checkpoint that nothing holds."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from lorakit.checkpoints.removal import IN_WORK, Removal, execute_removal, plan_removal
from lorakit.errors import Conflict, Incomplete, NotFound, Refused
from lorakit.store.garbage import clear, find_garbage
from lorakit.store.kept import kept_in
from lorakit.store.serving import serving
from lorakit.store.trash import trashed_in
from lorakit.store.trash_folders import Taken
from tests.checkpoints.test_pruning import aliased, put
from tests.store.kept import contents, kept


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    put(tmp_path / "sql", 100, 0.5)
    return tmp_path / "sql" / "checkpoint-100"


def test_a_checkpoint_of_a_run_goes_into_the_trash_of_the_run(home: Path, checkpoint: Path) -> None:
    before = contents(checkpoint)
    plan = plan_removal(str(checkpoint), home)
    assert plan == Removal(str(checkpoint), sum(len(data) for data in before.values()), checkpoint)
    assert checkpoint.is_dir()
    trashed = execute_removal(plan, home)
    assert trashed_in(home) == [trashed]
    assert not checkpoint.exists()


def test_at_once_nothing_is_left_to_take_back(home: Path, checkpoint: Path, tmp_path: Path) -> None:
    one = kept(home, tmp_path / "one")
    for reference in (str(checkpoint), one.id):
        assert execute_removal(plan_removal(reference, home), home, at_once=True) is None
    assert trashed_in(home) == []
    assert not checkpoint.exists()
    assert not one.folder.exists()


def test_an_id_of_the_store_goes_by_its_record(home: Path, tmp_path: Path) -> None:
    one = kept(home, tmp_path / "one")
    execute_removal(plan_removal(one.id, home), home)
    assert kept_in(home) == []


@pytest.mark.parametrize("name", ["run", "link", "store", "notes", "note.txt"])
def test_what_is_no_checkpoint_is_refused(home: Path, checkpoint: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    if name == "run":
        place = checkpoint.parent
    elif name == "link":
        place.symlink_to(checkpoint)
    elif name == "store":
        place = kept(home, tmp_path / "one").folder
    elif name == "notes":
        place.mkdir()
        (place / "readme").write_text("mine")
    else:
        place.write_text("mine")
    for force in (False, True):
        with pytest.raises(Refused):
            plan_removal(str(place), home, force=force)


def test_a_single_file_of_a_trainer_is_a_checkpoint(home: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"model": {"weight": torch.zeros(2)}, "step": 5}, tmp_path / "last.pt")
    assert plan_removal(str(tmp_path / "last.pt"), home).what == tmp_path / "last.pt"


def test_what_is_in_work_is_refused_until_nothing_of_it_changed_for_an_hour(home: Path, checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").unlink()
    now = time.time()
    with pytest.raises(Incomplete, match=r"not finished.*--force"):
        plan_removal(str(checkpoint), home, now=now)
    plan_removal(str(checkpoint), home, now=now, force=True)
    plan_removal(str(checkpoint), home, now=now + IN_WORK + 1)


def test_what_a_link_in_the_run_leads_to_is_refused_by_its_name(home: Path, checkpoint: Path) -> None:
    (checkpoint.parent / "best").symlink_to("checkpoint-100")
    with pytest.raises(Conflict, match="the link 'best' leads to"):
        plan_removal(str(checkpoint), home)
    plan_removal(str(checkpoint), home, force=True)


def test_what_an_alias_of_the_store_points_at_or_a_server_serves_is_refused(home: Path, checkpoint: Path) -> None:
    aliased(home, checkpoint)
    with pytest.raises(Conflict, match=r"the store's 'sql(@prod)?' points at"):
        plan_removal(str(checkpoint), home)
    from lorakit.store.store import bases_in

    (base,) = bases_in(home)
    with serving(home, base), pytest.raises(Conflict, match="in use: the server"):
        plan_removal(str(checkpoint), home)
    plan_removal(str(checkpoint), home, force=True)


def test_what_is_in_the_trash_is_not_removed_once_more(home: Path, checkpoint: Path) -> None:
    trashed = execute_removal(plan_removal(str(checkpoint), home), home)
    assert trashed is not None
    assert isinstance(trashed.held, Taken)
    before = contents(trashed.held.content)
    for force in (False, True):
        with pytest.raises(Refused, match=r"lorakit undelete.*lorakit store gc"):
            plan_removal(str(trashed.held.content), home, force=force, at_once=force)
    clear(find_garbage(home))
    assert contents(trashed.held.content) == before


def test_a_path_through_a_link_means_what_the_system_says(home: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(checkpoint.parent)
    put(tmp_path / "elsewhere" / "sql", 100)
    for said in ("link/../sql/checkpoint-100", "link/checkpoint-100", "link/checkpoint-100/."):
        assert plan_removal(str(tmp_path / "elsewhere" / said), home).what == checkpoint


def test_nothing_is_no_path(home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    with pytest.raises(NotFound):
        plan_removal("", home)
    assert plan_removal(".", home).what == checkpoint


def test_a_path_that_can_not_be_written_down_is_refused(home: Path, tmp_path: Path) -> None:
    put(tmp_path / "s\nl", 100)
    with pytest.raises(Refused, match="rename it"):
        plan_removal(str(tmp_path / "s\nl" / "checkpoint-100"), home)


def test_what_a_kill_left_of_a_removal_at_once_is_cleared_by_gc(
    home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_removal(str(checkpoint), home)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(shutil, "rmtree", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        execute_removal(plan, home, at_once=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not checkpoint.exists()
    assert os.listdir(checkpoint.parent)
    assert clear(find_garbage(home))[1] == []
    assert not os.listdir(checkpoint.parent)


def test_what_is_nowhere_is_not_found(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such path"):
        plan_removal(str(tmp_path / "nowhere"), home)
    assert not home.exists()
