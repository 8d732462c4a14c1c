"""The files of a revision in a bucket: taken whole and as their digest says, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import Incomplete, InvalidFile, Refused
from tests.store.remote.faulty import Faulty
from tests.store.remote.machines import Machine, accept, catch_up, run_of, said
from tests.store.test_store import add


def test_files_that_are_not_what_their_digest_says_are_refused_and_never_placed(machine: Machine, s3: Any) -> None:
    one, other = machine("one"), machine("other")
    revision = add(one, content="right")
    s3.put_object(Bucket="models", Key=f"lorakit/revisions/{revision.digest}/adapter_model.safetensors", Body=b"wrong")
    other.look()
    with pytest.raises(InvalidFile, match="not what it is called by"):
        other.bring(revision.digest, accept)
    assert not list((other.home / "revisions").iterdir())
    assert not list((other.home / "tmp").iterdir())
    other.agree("sql")
    assert other.runs() == {}
    assert other.is_behind("sql")


@pytest.mark.parametrize("at_rest", [True, False])
def test_files_that_are_cut_off_are_refused_and_brought_when_they_are_whole(
    machine: Machine, bucket: Faulty, s3: Any, at_rest: bool
) -> None:
    one, other = machine("one"), machine("other")
    revision = add(one, content="right")
    other.look()
    key = f"lorakit/revisions/{revision.digest}/adapter_model.safetensors"
    if at_rest:
        s3.put_object(Bucket="models", Key=key, Body=b"righ")
    else:
        bucket.spoil = lambda path, body: body[:-1] if "adapter_model" in path else body
    with pytest.raises(Incomplete, match="arrived"):
        other.bring(revision.digest, accept)
    assert not list((other.home / "revisions").iterdir())
    bucket.spoil = lambda path, body: body
    s3.put_object(Bucket="models", Key=key, Body=b"right")
    catch_up(other)
    assert said(run_of(one)) == said(run_of(other))


def test_a_revision_without_its_manifest_or_a_file_is_not_whole_yet(machine: Machine, s3: Any) -> None:
    one, other = machine("one"), machine("other")
    revision = add(one)
    for name in ("adapter_config.json", "manifest.json"):
        s3.delete_object(Bucket="models", Key=f"lorakit/revisions/{revision.digest}/{name}")
        with pytest.raises(Incomplete, match=name):
            other.bring(revision.digest, accept)
    assert not list((other.home / "revisions").iterdir())


ODD = ({"../evil": 1}, {"a/b": 1}, {}, {"lorakit.json": 1}, {".hidden": 1}, ["a"], None, {"a": float("inf")})


def test_a_manifest_that_names_what_no_revision_has_is_refused(machine: Machine, s3: Any) -> None:
    one, digest = machine("one"), "0" * 64
    for files in ODD:
        manifest = json.dumps({"format": 1, "files": files, "provenance": None})
        s3.put_object(Bucket="models", Key=f"lorakit/revisions/{digest}/manifest.json", Body=manifest)
        with pytest.raises(InvalidFile, match=r"manifest\.json"):
            one.bring(digest, accept)
    assert not list((one.home / "revisions").iterdir())


def test_what_a_check_refuses_is_not_placed(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    revision = add(one)

    def refuse(staged: Path) -> None:
        raise Refused(f"not {(staged / 'adapter_model.safetensors').read_text()}")

    with pytest.raises(Refused, match="not one"):
        other.bring(revision.digest, refuse)
    assert not list((other.home / "revisions").iterdir())
