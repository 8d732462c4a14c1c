"""Buckets, on a real S3 server: what is read is of one version, and what is written appears whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints.moving import under_way
from lorakit.checkpoints.moving.addresses import parse_address
from lorakit.checkpoints.moving.buckets import Bucket
from lorakit.checkpoints.moving.download import Patience
from lorakit.checkpoints.moving.exporting import export
from lorakit.checkpoints.moving.fetching import fetch, plan_fetch
from lorakit.checkpoints.moving.under_way import BEGUN
from lorakit.errors import Conflict, Incomplete, InvalidFile, LorakitError, NotFound, Refused
from tests.bucket import SECRET, SERVICES, client, environment, s3_server
from tests.checkpoints.moving.archives import files_below, tarred
from tests.checkpoints.moving.web import sha256
from tests.folders import leftovers, write_adapter


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(sys, "path", [*sys.path, str(SERVICES)])
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    with client(server) as found:
        yield found
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def put(s3: Any, folder: Path, prefix: str) -> None:
    """As a trainer's upload: the state last."""
    for file in sorted(folder.rglob("*"), key=lambda path: path.name == "trainer_state.json"):
        s3.put_object(Bucket="models", Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes())


def keys(s3: Any) -> list[str]:
    return [each["Key"] for each in s3.list_objects_v2(Bucket="models").get("Contents", [])]


def uploads(s3: Any) -> list[Any]:
    return list(s3.list_multipart_uploads(Bucket="models").get("Uploads", []))


def test_an_object_appears_whole_or_not_at_all(s3: Any) -> None:
    bucket = Bucket(parse_address("s3://models/a"))

    def broken() -> Iterator[bytes]:
        yield b"x" * (17 << 20)
        assert keys(s3) == []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bucket.write("large", broken())
    assert (keys(s3), uploads(s3)) == ([], [])
    assert bucket.write("large", (b"x" * (6 << 20) for _ in range(3))) == 18 << 20
    assert bucket.write("empty", ()) == 0
    assert sorted(one.name for one in bucket.listed()) == ["empty", "large"]
    with pytest.raises(Conflict, match="'s3://models/a/large' exists already"):
        bucket.write("large", (b"y",))
    assert bucket.read("none") is None


def test_a_folder_goes_there_and_comes_back(s3: Any, checkpoint: Path, tmp_path: Path) -> None:
    exported = export(str(checkpoint), "s3://models/sql/checkpoint-500")
    there = keys(s3)
    assert sorted(there) == sorted(
        f"sql/checkpoint-500/{name}" for name in [*files_below(checkpoint), "lorakit.sha256"]
    )
    assert exported.digests == {name: sha256(data) for name, data in files_below(checkpoint).items()}
    plan = plan_fetch("s3://models/sql/checkpoint-500", tmp_path / "out")
    assert (plan.kind, len(plan.files or ())) == ("folder", len(there))
    fetched = fetch("s3://models/sql/checkpoint-500", tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(checkpoint)
    assert (fetched.checkpoint.step, fetched.checkpoint.state) == (500, "finished")
    assert fetched.notes == ("every file is as lorakit.sha256 says",)
    with pytest.raises(Conflict, match="exists already"):
        export(str(checkpoint), "s3://models/sql/checkpoint-500")
    assert keys(s3) == there


@pytest.mark.parametrize("name", ["sql.tar.gz", "sql.zip"])
def test_an_archive_goes_there_and_comes_back(s3: Any, checkpoint: Path, tmp_path: Path, name: str) -> None:
    exported = export(str(checkpoint), f"s3://models/{name}")
    assert keys(s3) == [name]
    assert exported.sha256 == sha256(s3.get_object(Bucket="models", Key=name)["Body"].read())
    fetched = fetch(f"s3://models/{name}", tmp_path / "out", sha256=exported.sha256)
    assert files_below(tmp_path / "out") == files_below(checkpoint)
    assert fetched.sha256 == exported.sha256
    with pytest.raises(Conflict, match="exists already"):
        export(str(checkpoint), f"s3://models/{name}")


def test_a_pre_signed_url_of_a_real_server(s3: Any, checkpoint: Path, tmp_path: Path) -> None:
    data = tarred(checkpoint)
    s3.put_object(Bucket="models", Key="sql.tar.gz", Body=data)
    url = s3.generate_presigned_url("get_object", {"Bucket": "models", "Key": "sql.tar.gz"}, ExpiresIn=60)
    fetched = fetch(url, tmp_path / "out", sha256=sha256(data))
    assert files_below(tmp_path / "out") == files_below(checkpoint)
    assert "?" not in fetched.source
    s3.delete_object(Bucket="models", Key="sql.tar.gz")
    with pytest.raises(NotFound, match="there is nothing at"):
        fetch(url, tmp_path / "none", patience=Patience(tries=2, pause=0.01))


def test_what_a_trainer_has_not_finished_there_is_refused(s3: Any, checkpoint: Path, tmp_path: Path) -> None:
    put(s3, checkpoint, "sql")
    fetch("s3://models/sql", tmp_path / "whole")
    assert files_below(tmp_path / "whole") == files_below(checkpoint)
    s3.delete_object(Bucket="models", Key="sql/adapter_model.safetensors")
    with pytest.raises(Incomplete, match="'s3://models/sql' is not finished"):
        fetch("s3://models/sql", tmp_path / "out")
    fetch("s3://models/sql", tmp_path / "out", unfinished=True)
    assert "adapter_model.safetensors" not in files_below(tmp_path / "out")


KILLED = """
import os, signal, sys
from lorakit.checkpoints.moving.buckets import Bucket
from lorakit.checkpoints.moving.exporting import export
real, left = Bucket.write, [3]
def write(*given, **more):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **more)
Bucket.write = write
export(sys.argv[1], sys.argv[2])
"""


def test_a_killed_export_is_not_taken_for_a_checkpoint_and_the_next_one_completes(
    s3: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILLED, str(checkpoint), "s3://models/sql"]
    assert subprocess.run(command, env=environ).returncode == -signal.SIGKILL
    assert len(keys(s3)) == 3
    with pytest.raises(Incomplete, match="is an export that has not come to its end"):
        fetch("s3://models/sql", tmp_path / "out")
    with pytest.raises(Conflict, match="an export of another checkpoint is under way"):
        export(str(write_adapter(tmp_path / "another")), "s3://models/sql")
    monkeypatch.setattr(under_way, "KILLED", 0.2)
    export(str(checkpoint), "s3://models/sql")
    assert f"sql/{BEGUN}" not in keys(s3)
    fetch("s3://models/sql", tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(checkpoint)


def test_an_export_that_lives_is_not_taken_for_a_killed_one(
    s3: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_way, "BEAT", 0.05)
    monkeypatch.setattr(under_way, "KILLED", 5.0)
    refused: list[str] = []

    def meanwhile(done: int, total: int | None) -> None:
        if not refused:
            with pytest.raises(Conflict, match="is being exported to by another") as found:
                export(str(checkpoint), "s3://models/sql")
            refused.append(str(found.value))

    export(str(checkpoint), "s3://models/sql", progress=meanwhile)
    assert refused
    assert sorted(keys(s3)) == sorted(f"sql/{name}" for name in [*files_below(checkpoint), "lorakit.sha256"])


def test_an_export_whose_place_was_taken_removes_nothing_of_the_others(s3: Any, checkpoint: Path) -> None:
    def taken(done: int, total: int | None) -> None:
        s3.put_object(Bucket="models", Key=f"sql/{BEGUN}", Body=b'{"id": "another"}')

    with pytest.raises(Conflict, match="another export has taken the place of this one"):
        export(str(checkpoint), "s3://models/sql", progress=taken)
    assert sorted(keys(s3)) == sorted(f"sql/{name}" for name in [*files_below(checkpoint), BEGUN])


def test_a_folder_may_have_an_object_of_its_own_name(s3: Any, checkpoint: Path, tmp_path: Path) -> None:
    put(s3, checkpoint, "sql")
    s3.put_object(Bucket="models", Key="sql", Body=b"")
    fetch("s3://models/sql", tmp_path / "marked")
    assert files_below(tmp_path / "marked") == files_below(checkpoint)
    s3.put_object(Bucket="models", Key="sql", Body=b"hello")
    fetched = fetch("s3://models/sql", tmp_path / "object")
    assert fetched.notes == ("there is a folder of that name, too, which is 's3://models/sql/'",)
    assert files_below(tmp_path / "object") == {"sql": b"hello"}
    fetch("s3://models/sql/", tmp_path / "folder")
    assert files_below(tmp_path / "folder") == files_below(checkpoint)


def test_an_at_in_a_key_is_part_of_it(s3: Any, checkpoint: Path, tmp_path: Path) -> None:
    export(str(checkpoint), "s3://models/sql@best")
    assert all(key.startswith("sql@best/") for key in keys(s3))
    fetch("s3://models/sql@best", tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(checkpoint)


def test_an_export_that_fails_leaves_nothing(s3: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bucket.write

    def failing(self: Bucket, name: str, *rest: Any, **more: Any) -> int:
        if name == "optimizer.pt":
            raise LorakitError("the network is gone")
        return real(self, name, *rest, **more)

    monkeypatch.setattr(Bucket, "write", failing)
    with pytest.raises(LorakitError, match="the network is gone"):
        export(str(checkpoint), "s3://models/sql")
    assert keys(s3) == []


def test_what_was_damaged_on_the_way_is_refused(s3: Any, checkpoint: Path, tmp_path: Path) -> None:
    export(str(checkpoint), "s3://models/sql")
    s3.put_object(Bucket="models", Key="sql/optimizer.pt", Body=b"x" * 1000)
    with pytest.raises(InvalidFile, match=r"'optimizer\.pt' is not what lorakit\.sha256 says"):
        fetch("s3://models/sql", tmp_path / "out")
    s3.delete_object(Bucket="models", Key="sql/optimizer.pt")
    with pytest.raises(InvalidFile, match=r"'optimizer\.pt' is missing"):
        fetch("s3://models/sql", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["../../evil", "a//b", "C:\\evil"])
def test_keys_are_hostile_until_shown_otherwise(s3: Any, checkpoint: Path, tmp_path: Path, name: str) -> None:
    put(s3, checkpoint, "sql")
    s3.put_object(Bucket="models", Key=f"sql/{name}", Body=b"evil")
    with pytest.raises(Refused, match=r"has an empty part|leads out|names a drive"):
        fetch("s3://models/sql", tmp_path / "in" / "out", unfinished=True)
    assert not (tmp_path / "in").exists()
    assert not list(tmp_path.rglob("*evil*"))


def test_what_is_not_there_or_not_ours(s3: Any, tmp_path: Path) -> None:
    for address in ("s3://models/none", "s3://no-such-bucket/a"):
        with pytest.raises(NotFound, match=f"there is nothing at '{address}'"):
            fetch(address, tmp_path / "out")
    with pytest.raises(LorakitError, match=r"pip install 'lorakit\[gs\]'") as found:
        fetch("gs://models/a", tmp_path / "out")
    assert SECRET not in str(found.value)
