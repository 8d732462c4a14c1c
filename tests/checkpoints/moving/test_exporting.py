"""A checkpoint becomes a folder or an archive that is whole, and that other programs can check."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.moving.exporting import export, plan_export
from lorakit.checkpoints.moving.fetching import fetch
from lorakit.errors import Conflict, Incomplete, InvalidFile, LorakitError, NotFound, OutOfSpace, Refused, UsageError
from lorakit.store.kept import Described, keep_checkpoint
from tests.checkpoints.moving.archives import files_below
from tests.checkpoints.moving.web import sha256
from tests.disks import small_disk_at
from tests.folders import leftovers


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sha256sum", "--check", "lorakit.sha256"], cwd=folder, capture_output=True, text=True)


def unpacked(archive: Path, into: Path) -> Path:
    """By programs that are not ours."""
    into.mkdir()
    match archive.suffix:
        case ".zip":
            with zipfile.ZipFile(archive) as opened:
                assert opened.testzip() is None
                opened.extractall(into)
        case ".zst":
            import zstandard

            with (
                archive.open("rb") as packed,
                zstandard.ZstdDecompressor().stream_reader(packed) as stream,
                tarfile.open(fileobj=stream, mode="r|") as opened,
            ):
                opened.extractall(into, filter="data")
        case _:
            subprocess.run(["tar", "-xf", archive, "-C", into], check=True)
    return into


def test_a_folder_is_copied_with_a_list_that_sha256sum_checks(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "deeper").mkdir()
    (checkpoint / "deeper" / "odd name é").write_bytes(b"1")
    exported = export(str(checkpoint), str(tmp_path / "out"))
    assert files_below(tmp_path / "out") == files_below(checkpoint)
    assert exported.digests == {name: sha256(data) for name, data in files_below(checkpoint).items()}
    result = checked(tmp_path / "out")
    assert (result.returncode, len(result.stdout.splitlines())) == (0, len(files_below(checkpoint)))
    assert (tmp_path / "out" / "optimizer.pt").stat().st_ino != (checkpoint / "optimizer.pt").stat().st_ino
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["sql.tar", "sql.tar.gz", "sql.tar.zst", "sql.zip"])
def test_an_archive_is_one_that_other_programs_unpack(checkpoint: Path, tmp_path: Path, name: str) -> None:
    exported = export(str(checkpoint), str(tmp_path / name))
    assert exported.sha256 == sha256((tmp_path / name).read_bytes())
    out = unpacked(tmp_path / name, tmp_path / "unpacked")
    assert files_below(out) == files_below(checkpoint)
    assert checked(out).returncode == 0
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~_umask()
    fetched = fetch(str(tmp_path / name), tmp_path / "back")
    assert files_below(tmp_path / "back") == files_below(checkpoint)
    assert fetched.checkpoint.step == 500
    assert leftovers(tmp_path) == []


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_same_checkpoint_gives_the_same_archive(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.tar.gz", "b.tar.gz", "a.zip", "b.zip"):
        export(str(checkpoint), f"file://{tmp_path / name}")
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_single_file_and_a_run_can_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    import torch

    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "model.pt")
    assert export(str(tmp_path / "model.pt"), str(tmp_path / "one"), unfinished=True).files == ("model.pt",)
    assert checked(tmp_path / "one").returncode == 0
    assert export(str(checkpoint.parent), str(tmp_path / "newest")).source == checkpoint


@pytest.mark.parametrize("name", ["out", "out.tar.gz"])
def test_nothing_that_exists_is_replaced(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out.tar.gz").write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for work in (export, plan_export):
        with pytest.raises(Conflict, match="exists already"):
            work(str(checkpoint), str(tmp_path / name))
    assert (tmp_path / "out.tar.gz").read_bytes() == b"mine"


def test_what_is_not_finished_or_written_to_meanwhile_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    whole = (checkpoint / "adapter_model.safetensors").read_bytes()
    (checkpoint / "adapter_model.safetensors").write_bytes(whole[:-1])
    for work in (export, plan_export):
        with pytest.raises(Incomplete, match="is not finished"):
            work(str(checkpoint), str(tmp_path / "out"))
    (checkpoint / "adapter_model.safetensors").write_bytes(whole)

    def write_again(*_: object) -> None:
        (checkpoint / "optimizer.pt").write_bytes(b"p" * 999)

    for name in ("out", "out.tar.gz"):
        with pytest.raises(Incomplete, match="was written to while it was copied"):
            export(str(checkpoint), str(tmp_path / name), progress=write_again)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
        (checkpoint / "optimizer.pt").write_bytes(b"o" * 1000)


def test_a_copy_that_was_damaged_since_is_not_passed_on(checkpoint: Path, tmp_path: Path) -> None:
    export(str(checkpoint), str(tmp_path / "out"))
    export(str(tmp_path / "out"), str(tmp_path / "again"))
    (tmp_path / "out" / "optimizer.pt").write_bytes(b"x")
    for name in ("third", "third.zip"):
        with pytest.raises(InvalidFile, match=r"optimizer\.pt' is not what lorakit\.sha256 beside it says"):
            export(str(tmp_path / "out"), str(tmp_path / name))
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["out", "out.tar", "out.zip"])
def test_what_was_damaged_in_the_store_is_not_passed_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    kept = keep_checkpoint(
        tmp_path / "home", checkpoint, Described("adapter", "transformers", 500), run="sql", unchanged=lambda: True
    )
    export(kept.id, str(tmp_path / f"whole-{name}"))
    fetch(kept.id, tmp_path / "fetched")
    weights = kept.folder / "optimizer.pt"
    weights.chmod(0o644)
    weights.write_bytes(b"p" * 1000)
    for work in (lambda: export(kept.id, str(tmp_path / name)), lambda: fetch(kept.id, tmp_path / name)):
        with pytest.raises(InvalidFile, match="was damaged in the store"):
            work()
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["out.tar", "out.tar.gz", "out.zip"])
def test_what_came_last_came_last_in_the_copy_too(checkpoint: Path, tmp_path: Path, name: str) -> None:
    for number, file in enumerate(sorted(checkpoint.iterdir(), reverse=True)):
        os.utime(file, (1_700_000_000 + 10 * number, 1_700_000_000 + 10 * number))
    os.utime(checkpoint / "trainer_state.json", (7.3e9, 7.3e9))  # beyond what a zip can name
    export(str(checkpoint), str(tmp_path / name))
    fetch(str(tmp_path / name), tmp_path / "back")
    for file in set(checkpoint.iterdir()) - {checkpoint / "trainer_state.json"}:
        assert (tmp_path / "back" / file.name).stat().st_mtime == file.stat().st_mtime
    assert (tmp_path / "back" / "trainer_state.json").stat().st_mtime <= time.time()
    assert look_at(tmp_path / "back").state == "finished"


def test_a_folder_that_may_not_be_read_is_not_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "shards").mkdir()
    real = os.scandir

    def scandir(path: Any = ".") -> Any:  # root may read everything
        if str(path).endswith("shards"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(Refused, match=r"shards' can't be read \(permission denied\)"):
        export(str(checkpoint), str(tmp_path / "out"), unfinished=True)


def test_places_that_can_not_be_written_to(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can only be fetched from"):
        export(str(checkpoint), "https://host/x?5ec4e7")
    with pytest.raises(UsageError, match="lorakit push"):
        export(str(checkpoint), "hf://org/name")
    with pytest.raises(NotFound):
        export(str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(LorakitError, match="can't write"):
        export(str(checkpoint), str(checkpoint / "optimizer.pt" / "out"))


PROGRAM = """
import sys
from lorakit.checkpoints.moving.exporting import export
print("ready", flush=True)
export(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("name", ["out", "out.tar.gz"])
def test_killed_at_any_moment_nothing_is_there_and_the_next_call_completes(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    chance = random.Random(3)
    (checkpoint / "optimizer.pt").write_bytes(chance.randbytes(8_000_000))
    out = tmp_path / "to" / name
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(checkpoint), str(out)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        if out.exists():  # it was quicker
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    export(str(checkpoint), str(out))
    assert [path.name for path in out.parent.iterdir()] == [name]
    fetch(str(out), tmp_path / "back")
    assert files_below(tmp_path / "back") == files_below(checkpoint)


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_a_full_disk_says_so_and_keeps_nothing(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"o" * 900_000)
    with small_disk_at(tmp_path / "disk", kilobytes=400) as disk:
        (disk / "precious").write_bytes(b"1")
        with pytest.raises(OutOfSpace, match="free some space"):
            export(str(checkpoint), str(disk / name))
        assert [path.name for path in disk.iterdir()] == ["precious"]
