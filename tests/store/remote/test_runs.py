"""The runs of a bucket: what changed is found, whoever was told of it, and what is none is left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.store.remote import runs as runs_module
from lorakit.store.remote.runs import SharedRuns
from lorakit.store.remote.state import RunState, written
from tests.store.remote.faulty import Faulty
from tests.store.remote.machines import Machine, catch_up, meant, point, run_of
from tests.store.test_store import add


def test_a_write_whose_answer_was_lost_is_made_once(machine: Machine, bucket: Faulty) -> None:
    one = machine("one")
    revision = add(one)
    answers = iter([True])
    bucket.lose = lambda method, path: method == "PUT" and "/runs/" in path and next(answers, False)
    point(one, revision)
    state = one.shared.state("sql")
    assert state is not None
    assert len(state.aliases[""].moves) == 1
    assert state.version == 2


def test_a_change_that_nobody_was_told_of_is_found_by_the_list(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machine("one"), machine("other")
    catch_up(other)
    monkeypatch.setattr(SharedRuns, "_tell", lambda *_: None)
    revision = add(one)
    assert catch_up(other) == []
    monkeypatch.setattr(runs_module, "LOOK", 0.0)
    assert catch_up(other) == ["sql"]
    assert revision.name in {found.name for found in run_of(other).revisions.values()}


def test_to_ask_when_nothing_has_changed_is_one_request(machine: Machine, bucket: Faulty) -> None:
    one, other = machine("one"), machine("other")
    add(one)
    catch_up(other)
    del bucket.asked[:]
    assert catch_up(other) == []
    assert [method for method, _ in bucket.asked] == ["GET"]


def test_more_changes_than_the_head_remembers_are_all_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "CHANGES", 2)
    one, other = machine("one"), machine("other")
    catch_up(other)
    for name in "abcde":
        add(one, run=name)
    assert sorted(catch_up(other)) == list("abcde")


def test_an_older_version_that_the_bucket_tells_again_is_not_gone_back_to(machine: Machine, s3: Any) -> None:
    one, other = machine("one"), machine("other")
    a = add(one)
    key = next(each["Key"] for each in s3.list_objects_v2(Bucket="models")["Contents"] if "/runs/" in each["Key"])
    old = s3.get_object(Bucket="models", Key=key)["Body"].read()
    point(one, a, "prod")
    catch_up(other)
    s3.put_object(Bucket="models", Key=key, Body=old)
    add(one, run="else", content="2")
    other.shared.look()
    assert "sql" not in catch_up(other)
    assert meant(other, "prod") == a.name


NO_RUN = (
    b"", b"{", b"[]", b"null", b'{"format": 1}', b'{"format": 99}', written(RunState(), "another base"),
    written(RunState(passed_over={"nothing": "x"}), "llama-0123"),
)  # fmt: skip


def test_an_object_that_is_no_run_is_left_alone_and_said(machine: Machine, s3: Any) -> None:
    one, other = machine("one"), machine("other")
    add(one)
    key = next(each["Key"] for each in s3.list_objects_v2(Bucket="models")["Contents"] if "/runs/" in each["Key"])
    for number, raw in enumerate(NO_RUN):
        s3.put_object(Bucket="models", Key=key.replace("sql", f"odd-{number}"), Body=raw)
    other.shared.look()
    assert sorted(other.shared.unreadable) == [f"odd-{number}" for number in range(len(NO_RUN))]
    assert all(name in reason for name, reason in other.shared.unreadable.items())
    assert catch_up(other) == ["sql"]
    with pytest.raises(LorakitError):
        add(other, run="odd-1")


def _key_and_body(s3: Any) -> tuple[str, bytes]:
    key = next(each["Key"] for each in s3.list_objects_v2(Bucket="models")["Contents"] if "/runs/" in each["Key"])
    return key, s3.get_object(Bucket="models", Key=key)["Body"].read()


def test_what_was_no_run_and_is_put_back_as_it_was_can_be_changed_again(machine: Machine, s3: Any) -> None:
    one = machine("one")
    a = add(one)
    key, good = _key_and_body(s3)
    s3.put_object(Bucket="models", Key=key, Body=b"{")
    one.shared.look()
    assert "sql" in one.shared.unreadable
    s3.put_object(Bucket="models", Key=key, Body=good)
    one.shared.look()
    assert one.shared.unreadable == {}
    point(one, a, "prod")


def test_an_older_run_that_two_lists_name_was_put_back_and_is_taken_over(machine: Machine, s3: Any) -> None:
    one, other = machine("one"), machine("other")
    a = add(one)
    key, old = _key_and_body(s3)
    point(one, a, "prod")
    catch_up(other)
    s3.put_object(Bucket="models", Key=key, Body=old)
    assert other.shared.look() == set()
    assert other.shared.look() == {"sql"}
    assert other.shared.set_back == {"sql"}
    assert catch_up(other) == ["sql"]
    assert meant(other, "prod") is None
    point(other, run_of(other).select("step-100"), "new")  # type: ignore[arg-type]


def test_a_change_that_no_machine_could_read_is_not_written(machine: Machine, s3: Any) -> None:
    one = machine("one")
    add(one)
    _, before = _key_and_body(s3)
    with pytest.raises(LorakitError, match="not changed"):
        one.shared.change("sql", lambda state: replace(state, passed_over={"nothing": "so"}))
    assert _key_and_body(s3)[1] == before
