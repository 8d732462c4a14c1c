"""The same judgement wherever the files are: here, and in an object store."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lorakit.checkpoints.finished import look_at, look_at_url
from lorakit.checkpoints.places import LocalPlace, RemotePlace, entry_of, remote_entry, within
from tests.checkpoints.writings import WRITINGS, Disk, pieces

NANOSECONDS = 10**9


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """An object store: what is put there appears at once, whole."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


@pytest.mark.parametrize("name", sorted(name for name in WRITINGS if WRITINGS[name].first != ("",)))
def test_objects_that_appear_one_by_one_are_finished_with_the_last(
    name: str, memory: fsspec.AbstractFileSystem
) -> None:
    writing = WRITINGS[name]
    folder = f"/bucket/run/{writing.place}"
    names = [*(other for rank in writing.others for other in rank), *writing.first]
    if name == "accelerate":  # what a program registered itself comes after
        names = names[:-1]
    for each in names:
        assert look_at_url(f"memory:/{folder}").state != "finished"
        path = f"/bucket/run/{each[3:]}" if each.startswith("../") else f"{folder}/{each}"
        memory.pipe(path, writing.bytes_of(each, 0))
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)  # as coarse as a store's
        memory.store[path].created = now
    assert look_at_url(f"memory:/{folder}").state == writing.ends, look_at_url(f"memory:/{folder}")


def test_a_single_object_is_judged_as_a_file(memory: fsspec.AbstractFileSystem) -> None:
    whole = WRITINGS["a torch file"].bytes_of("", 0)
    for content, state in ((whole[:-1], "incomplete"), (whole, "finished")):
        memory.pipe("/bucket/model.pt", content)
        assert look_at_url("memory://bucket/model.pt").state == state


def test_what_is_not_in_the_store_is_incomplete(memory: fsspec.AbstractFileSystem) -> None:
    assert look_at_url("memory://bucket/nowhere").state == "incomplete"


@pytest.mark.parametrize("name", ["adapter", "model in shards", "sharded by FSDP"])
def test_file_addresses_give_the_same_as_paths(name: str, tmp_path: Path) -> None:
    writing = WRITINGS[name]
    disk = Disk(tmp_path / "run" / writing.place)
    for each in (*(other for rank in writing.others for other in rank), *writing.first):
        for _ in pieces(disk, each, writing.bytes_of(each, 0), "in place", []):
            here, there = look_at(disk.folder), look_at_url(disk.folder.as_uri())
            assert (here.state, here.reason, here.kind) == (there.state, there.reason, there.kind)


def test_names_lead_into_folders_and_above(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "latest").write_text("x")
    (tmp_path / "a" / "b" / "c").write_text("hello")
    place = LocalPlace(tmp_path / "a")
    assert within(place, "b/c")[0].read("c", 1, 3) == b"ell"
    assert entry_of(place, "b/c") is not None
    assert entry_of(place, "../latest") is not None
    for missing in ("x", "b/x", "x/y", "../x"):
        assert entry_of(place, missing) is None


def test_a_link_to_nowhere_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    assert LocalPlace(tmp_path).entries == {}


def test_times_and_identities_of_stores_are_understood() -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    expected = int(moment.timestamp()) * NANOSECONDS
    for said in ({"LastModified": moment}, {"updated": moment.isoformat()}, {"mtime": moment.timestamp()}):
        assert remote_entry({"name": "a", "size": 5, **said}).written == expected
    assert remote_entry({"name": "a", "size": 5, "ETag": '"1"'}).stamp != remote_entry({"name": "a", "size": 5}).stamp
    assert remote_entry({"name": "a", "size": None, "type": "directory", "updated": "?"}).is_folder


def test_an_object_in_a_folders_own_name_is_no_file_of_it(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/bucket/run/a", b"1")
    place = RemotePlace(memory, "/bucket/run")
    listed = memory.ls

    def with_placeholder(path: str, **more: object) -> list[dict[str, object]]:
        return [*listed(path, **more), {"name": "/bucket/run/", "size": 0, "type": "file"}]

    memory.ls = with_placeholder
    try:
        assert list(place.entries) == ["a"]
    finally:
        del memory.ls


def test_a_pipe_is_no_file_of_a_folder(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", ".metadata", "it.pt"):
        os.mkfifo(tmp_path / name)
    assert LocalPlace(tmp_path).entries == {}
    assert look_at(tmp_path).state == "incomplete"
