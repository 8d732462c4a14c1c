"""Several processes on one store: no change of one is lost to another, and nothing is left half done.

Each process has runs, removals and aliases of its own, and remembers what it did; the contents are the same for all, so
what one lets go of another may just be putting in its place.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lorakit.errors import Incomplete
from lorakit.store import contents as folders
from lorakit.store import garbage
from lorakit.store.catalog import Revision
from lorakit.store.kept import find_kept, kept_in
from lorakit.store.store import Store
from lorakit.store.trash import find_stored, find_trashed, purge, trash_path, trash_stored, trashed_in, undelete
from lorakit.store.verify import verify_store
from tests.store.kept import contents, kept, measured, write_checkpoint
from tests.store.test_store import add

OPERATIONS = 1_000
CONTENTS = 5


@dataclass
class Known:
    """What one process did, for comparison with what the store says in the end."""

    kept: dict[str, int] = field(default_factory=dict)  # uid, content
    trashed: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)  # uid, path in the trash
    done: int = 0


def work(folder: Path, number: int, operations: int, seed: int) -> Known:
    """One process's mixed operations; anything that is raised ends it."""
    folders.YOUNG = 0.0  # so that content which nobody needs is cleared while others put the same there
    home, run, chance, known = folder / "home", f"run{number}", random.Random(seed), Known()
    store = Store(home, f"base{number}")
    revisions = [revision_of(store, run, step) for step in (100, 200)]
    step = 0
    while known.done < operations:
        known.done += 1
        match chance.choice(
            ("keep", "keep", "find", "move", "list", "rm", "undelete", "purge", "gc", "path", "verify")
        ):
            case "keep":
                step, content = step + 1, chance.randrange(CONTENTS)
                source = folder / f"content-{content}"
                one = kept(home, source, run=run, what=measured(step, step / 7))
                assert contents(one.folder) == contents(source)
                known.kept[one.uid] = content
            case "find" if known.kept:
                uid = chance.choice(list(known.kept))
                found = find_kept(uid, home)
                assert found is not None
                assert find_kept(found.id, home) == found
                assert contents(found.folder) == contents(folder / f"content-{known.kept[uid]}")
            case "move":
                alias, revision = chance.choice(("", "prod", "beta")), chance.choice(revisions)
                store.move_alias(run, alias, revision.id, "set")
                known.aliases[alias] = revision.id
            case "list":
                mine = {one.uid for one in kept_in(home) if one.run == run}
                assert mine == known.kept.keys()
                assert store.runs()[run].aliases == known.aliases
            case "rm" if known.kept:
                uid = chance.choice(list(known.kept))
                trash_stored(find_stored(uid, home), home)
                known.trashed[uid] = known.kept.pop(uid)
            case "undelete" if known.trashed:
                uid = chance.choice(list(known.trashed))
                undelete(find_trashed(uid, home), home)
                known.kept[uid] = known.trashed.pop(uid)
            case "purge" if known.trashed:
                uid = chance.choice(list(known.trashed))
                purge([find_trashed(uid, home)], home)
                del known.trashed[uid]
            case "gc":
                garbage.clear(garbage.find_garbage(home, older_than=1e9))
            case "path":
                place = write_checkpoint(folder / "runs" / f"{run}-checkpoint-{known.done}")
                trashed = trash_path(place, home)
                if chance.random() < 0.5:
                    undelete(find_trashed(trashed.uid[:12], home), home)
                    assert contents(place)
                else:
                    known.paths[trashed.uid] = str(place)
            case "verify":
                assert verify_store(home).wrong == ()
    store.close()
    return known


def revision_of(store: Store, run: str, step: int) -> Revision:
    """As a server does it: what was cleared away between its two steps is tried again."""
    while True:
        with suppress(Incomplete):
            return add(store, run, step, content=f"{run} {step}")


def processes(folder: Path, count: int, operations: int) -> list[subprocess.Popen[str]]:
    for content in range(CONTENTS):
        write_checkpoint(folder / f"content-{content}", str(content))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.store.test_together", str(folder), str(number), str(operations)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [2, 4])
def test_a_thousand_mixed_operations_lose_nothing(tmp_path: Path, count: int) -> None:
    started = processes(tmp_path, count, OPERATIONS // count)
    said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0] * count, said
    known = [Known(**json.loads(out)) for out, _ in said]
    home = tmp_path / "home"
    assert sum(one.done for one in known) == OPERATIONS
    there = {one.uid: contents(one.folder) for one in kept_in(home)}
    wanted = {uid: content for one in known for uid, content in one.kept.items()}
    assert there == {uid: contents(tmp_path / f"content-{content}") for uid, content in wanted.items()}
    lying = {one.uid: one for one in trashed_in(home)}
    assert lying.keys() == {uid for one in known for uid in (*one.trashed, *one.paths)}
    assert {uid: lying[uid].name for one in known for uid in one.paths} == {
        uid: path for one in known for uid, path in one.paths.items()
    }
    for number, one in enumerate(known):
        store = Store(home, f"base{number}")
        assert store.runs()[f"run{number}"].aliases == one.aliases
        store.close()
    verified = verify_store(home)
    assert (verified.wrong, verified.unneeded) == ((), ())
    assert not list((home / "tmp").iterdir())


@pytest.mark.parametrize("seed", range(4))
def test_one_that_is_killed_at_any_moment_harms_no_other(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    started = processes(tmp_path, 2, 60)
    time.sleep(0.3 + chance.random())
    started[0].send_signal(signal.SIGKILL)
    started[0].communicate(timeout=60)
    _, err = started[1].communicate(timeout=120)
    assert started[1].returncode == 0, err
    home = tmp_path / "home"
    assert verify_store(home).wrong == ()
    for one in kept_in(home):
        assert contents(one.folder) in [contents(tmp_path / f"content-{content}") for content in range(CONTENTS)]
    work(tmp_path, 7, 20, seed)
    assert verify_store(home).wrong == ()
    assert not list((home / "tmp").iterdir())


if __name__ == "__main__":
    ended = work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), seed=int(sys.argv[2]))
    print(json.dumps(vars(ended)))
