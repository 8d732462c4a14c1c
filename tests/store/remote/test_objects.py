"""Objects of a bucket, on a real S3 server: read if changed, written if not, and what becomes of requests that fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import NotFound, Refused
from lorakit.store.remote import objects as module
from lorakit.store.remote.address import parse_store
from lorakit.store.remote.objects import Lost, Objects, Stored, Unreachable
from tests.bucket import SECRET
from tests.store.remote.faulty import Faulty


def test_what_is_not_there_is_none_and_what_has_not_changed_is_not_sent_again(objects: Objects) -> None:
    assert objects.read("a") is None
    first = objects.write("a", b"1", over=None)
    assert objects.read("a") == first
    assert objects.read("a", first) is first
    second = objects.write("a", b"2", over=first)
    assert objects.read("a", first) == second


def test_a_write_over_what_is_another_by_now_is_lost(objects: Objects) -> None:
    first = objects.write("a", b"1", over=None)
    objects.write("a", b"2", over=first)
    for name, over in (("a", None), ("a", first), ("nothing", first)):
        with pytest.raises(Lost):
            objects.write(name, b"3", over=over)
    found = objects.read("a")
    assert found is not None
    assert found.body == b"2"


def test_a_list_names_all_below_a_folder_with_their_etags(objects: Objects) -> None:
    made = {f"{number:04}": objects.write(f"runs/{number:04}", b"x", over=None).etag for number in range(3)}
    objects.write("other/1", b"x", over=None)
    assert objects.listed("runs") == made
    assert objects.listed("none") == {}


def test_a_list_of_more_than_one_page_is_whole(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE", 2)
    made = {str(number): objects.write(f"many/{number}", b"", over=None).etag for number in range(5)}
    assert objects.listed("many") == made


def test_a_large_file_arrives_as_it_is(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom((12 << 20) + 7))
    objects.send(tmp_path / "large", "large")
    assert objects.fetch("large", tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "large").read_bytes()
    assert not objects.fetch("nothing", tmp_path / "other")


def test_what_fails_for_a_moment_is_asked_again(objects: Objects, bucket: Faulty) -> None:
    failing = iter([500, 503])
    bucket.refuse = lambda method, path: next(failing, None)
    assert objects.write("a", b"1", over=None).body == b"1"
    assert len(bucket.asked) == 3


def test_what_fails_for_longer_is_unreachable_after_a_few_attempts(
    bucket: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL", (1, 1, 2))
    objects = Objects(parse_store("s3://models/x"))
    bucket.refuse = lambda method, path: 503
    with pytest.raises(Unreachable, match="does not answer"):
        objects.read("a")
    assert len(bucket.asked) == 2
    bucket.heal()
    bucket.away = True
    with pytest.raises(Unreachable, match="does not answer"):
        objects.write("a", b"", over=None)
    bucket.heal()
    assert objects.read("a") is None


def test_a_write_whose_answer_is_lost_says_so_for_who_wrote_to_look(objects: Objects, bucket: Faulty) -> None:
    first = objects.write("a", b"1", over=None)
    answers = iter([True])
    bucket.lose = lambda method, path: method == "PUT" and next(answers, False)
    with pytest.raises(Lost):
        objects.write("a", b"2", over=first)
    found = objects.read("a")
    assert found is not None
    assert found.body == b"2"


def test_a_file_that_was_cut_off_is_asked_for_again(objects: Objects, bucket: Faulty, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    objects.send(tmp_path / "file", "file")
    cuts = iter([None, None])
    bucket.spoil = lambda path, body: next(cuts, body)
    try:
        whole = objects.fetch("file", tmp_path / "there")
    except Unreachable:
        return  # and told
    assert whole
    assert (tmp_path / "there").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_store_with_conditional_writes_is_taken(objects: Objects, s3: Any) -> None:
    objects.ensure_conditions()
    assert "Contents" not in s3.list_objects_v2(Bucket="models")


@pytest.mark.parametrize("way", ["ignored", "unknown"])
def test_a_store_without_conditional_writes_is_refused_in_words(
    objects: Objects, bucket: Faulty, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "unknown":
        bucket.refuse = lambda method, path: 501 if method == "PUT" else None
    else:
        real = Objects.write
        monkeypatch.setattr(Objects, "write", lambda self, name, body, over: _overwritten(real, self, name, body))
    with pytest.raises(Refused, match="no conditional writes"):
        objects.ensure_conditions()


def _overwritten(real: Any, objects: Objects, name: str, body: bytes) -> Stored:
    return real(objects, name, body, over=objects.read(name))  # type: ignore[no-any-return]


def test_a_bucket_that_is_not_there_and_a_door_that_is_closed_are_said(bucket: Faulty, objects: Objects) -> None:
    nowhere = Objects(parse_store("s3://no-such-bucket/x"))
    with pytest.raises(NotFound, match="no bucket 'no-such-bucket'"):
        nowhere.read("a")
    bucket.refuse = lambda method, path: 403
    with pytest.raises(Refused, match="does not let this server in") as refused:
        objects.read("a")
    assert SECRET not in str(refused.value)


def test_without_its_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(module.LorakitError, match=r"pip install 'lorakit\[s3\]'"):
        Objects(parse_store("s3://models"))


def test_a_probe_whose_answer_was_lost_is_tried_again(objects: Objects, bucket: Faulty) -> None:
    lost = iter([True])
    bucket.lose = lambda method, path: method == "PUT" and next(lost, False)
    objects.ensure_conditions()
