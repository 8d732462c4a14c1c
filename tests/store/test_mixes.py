"""Mixes in the store: one content is one revision, whatever it was made for, and a name is an alias of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.errors import Conflict, Refused
from lorakit.store.catalog import Revision
from lorakit.store.mixes import MixStore, Named
from lorakit.store.store import Store, open_store
from lorakit.store.trash import find_stored, trash_stored

BASE = "base-1"


@pytest.fixture
def mixes(tmp_path: Path) -> Iterator[MixStore]:
    Store(tmp_path, BASE).close()
    store = MixStore(tmp_path, BASE)
    yield store
    store.close()


def keep(store: MixStore, home: Path, content: str, recipe: str, error: float = 0.0, said: str = "") -> Revision:
    with open_store(home, BASE) as beside, beside.staging() as staged:
        (staged / "adapter_model.safetensors").write_text(content)
        (staged / "lorakit.json").write_text(said or recipe)
        return store.keep(staged, recipe, text=f"mix({recipe})", rank=4, error=error)


def test_what_is_kept_is_a_read_only_revision_of_the_run_mix(mixes: MixStore, tmp_path: Path) -> None:
    kept = keep(mixes, tmp_path, "x", "a=1", 0.25)
    assert (kept.name, kept.kind, kept.rank, kept.source) == (f"mix@{kept.digest[:8]}", "mix", 4, "mix(a=1)")
    assert (kept.folder / "adapter_model.safetensors").read_text() == "x"
    assert (kept.folder / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o444
    with open_store(tmp_path, BASE) as store:
        assert store.runs()["mix"].revisions == {kept.id: kept}
        assert store.runs()["mix"].select(kept.digest[:8]) == kept
    assert [(found.recipe, found.revision, found.error) for found in mixes.recorded()] == [("a=1", kept.id, 0.25)]
    with open_store(tmp_path, "another-base") as other:
        assert not other.runs()


def test_the_same_content_by_another_recipe_is_the_same_revision(mixes: MixStore, tmp_path: Path) -> None:
    first = keep(mixes, tmp_path, "x", "a=1")
    second = keep(mixes, tmp_path, "x", "b=1", said="made otherwise")
    assert (second.id, second.digest) == (first.id, first.digest)
    assert {found.recipe: found.revision for found in mixes.recorded()} == {"a=1": first.id, "b=1": first.id}
    assert keep(mixes, tmp_path, "y", "c=1").id != first.id


def test_what_is_forgotten_is_gone_with_its_files_unless_it_was_made_again(mixes: MixStore, tmp_path: Path) -> None:
    first = keep(mixes, tmp_path, "x", "a=1")
    mixes.forget(first)
    assert not mixes.recorded()
    assert not mixes.is_there(first)
    again = keep(mixes, tmp_path, "x", "a=1")
    mixes.remove_folder(first.folder)
    assert mixes.is_there(again)
    mixes.forget(again)
    mixes.remove_folder(again.folder)
    assert not again.folder.exists()


def test_two_contents_whose_digests_begin_alike_do_not_share_a_name(
    mixes: MixStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["ab" * 32, "ab" * 4 + "cd" * 28])
    monkeypatch.setattr("lorakit.store.mixes.folder_digest", lambda *_: next(digests))
    keep(mixes, tmp_path, "x", "a=1")
    with pytest.raises(Refused, match="begin alike"):
        keep(mixes, tmp_path, "y", "b=1")
    assert len(list((tmp_path / "revisions").iterdir())) == 1


def test_a_name_is_an_alias_that_moves_and_keeps_its_mix_from_the_trash(mixes: MixStore, tmp_path: Path) -> None:
    first, second = keep(mixes, tmp_path, "x", "a=1"), keep(mixes, tmp_path, "y", "b=1")
    mixes.name(Named("assistant", "mix(a)", True), first.id, "set")
    mixes.name(Named("assistant", "mix(b)", False), second.id, "follow")
    assert mixes.names() == [Named("assistant", "mix(b)", False)]
    with open_store(tmp_path, BASE) as store:
        assert store.runs()["mix"].aliases == {"assistant": second.id}
        assert store.previous("mix", "assistant") == first.id
    mixes.forget(second)  # as another server may, which knows nothing of the name
    assert mixes.is_there(second)
    with pytest.raises(Conflict, match="assistant"):
        trash_stored(find_stored(second.name, tmp_path), tmp_path)
    mixes.unname("assistant")
    assert not mixes.names()
    trash_stored(find_stored(second.name, tmp_path), tmp_path)
    assert [found.revision for found in mixes.recorded()] == [first.id]
    assert not mixes.is_there(second)
    assert keep(mixes, tmp_path, "y", "b=1").id == second.id
    assert mixes.is_there(second)
