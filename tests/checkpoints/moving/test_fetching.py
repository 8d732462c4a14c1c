"""A checkpoint from anywhere becomes a folder that is whole, and says what it is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.moving import from_url
from lorakit.checkpoints.moving.download import Patience
from lorakit.checkpoints.moving.fetching import fetch, plan_fetch
from lorakit.checkpoints.moving.from_url import PART
from lorakit.errors import Conflict, Incomplete, InvalidFile, LorakitError, NotFound, OutOfSpace, Refused, UsageError
from lorakit.files.archives import Limits
from tests.checkpoints.moving.archives import files_below, tarred, zipped, zstandarded
from tests.checkpoints.moving.web import WORDS, Web, serving, sha256
from tests.disks import small_disk_at
from tests.folders import leftovers

QUICK = Patience(tries=4, timeout=0.5, pause=0.001)
NOISE = random.Random(1).randbytes(300_000)
PACKED: dict[str, Callable[[Path, str], bytes]] = {
    "sql.tar": lambda folder, top: tarred(folder, top, "w"),
    "sql.tar.gz": tarred,
    "sql.tgz": tarred,
    "sql.tar.zst": zstandarded,
    "sql.zip": zipped,
    "download": tarred,
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("top", ["", "checkpoint-500"])
def test_an_archive_becomes_the_checkpoint_itself(
    web: Web, checkpoint: Path, tmp_path: Path, name: str, top: str
) -> None:
    data = PACKED[name](checkpoint, top)
    web.put(name, data, cuts=[len(data) // 3] * 2)
    fetched = fetch(web.url(name), tmp_path / "sql", patience=QUICK)
    assert files_below(tmp_path / "sql") == files_below(checkpoint)
    assert sorted(fetched.files) == sorted(files_below(checkpoint))
    assert (fetched.sha256, fetched.resumed) == (sha256(data), 2)
    found = fetched.checkpoint
    assert (found.kind, found.base, found.rank, found.step, found.eval_loss) == ("adapter", "org/llama", 2, 500, 1.25)
    assert (fetched.writer, found.state) == ("transformers", "finished")
    assert leftovers(tmp_path) == []


def test_the_name_of_the_one_folder_tells_the_step_where_nothing_else_does(web: Web, checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()
    web.put("sql.tar.gz", tarred(checkpoint, "checkpoint-500"))
    out = checkpoint.parent.parent / "out"
    assert fetch(web.url("sql.tar.gz"), out, patience=QUICK).checkpoint.step == 500


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(1, 3000), max_size=10), name=st.sampled_from(["sql.tar.gz", "sql.zip", "sql.tar.zst"]))
def test_wherever_the_connection_breaks_the_files_are_the_same(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], name: str
) -> None:
    out = tmp_path_factory.mktemp("broken") / "sql"
    with serving() as web:
        web.put(name, PACKED[name](checkpoint, ""), cuts=list(cuts))
        fetch(web.url(name), out, patience=QUICK)
    assert files_below(out) == files_below(checkpoint)


def test_what_is_known_beside_the_files_names_no_secret(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    data = tarred(checkpoint)
    web.put("a/sql.tar.gz", data)
    fetched = fetch(web.url("a/sql.tar.gz"), tmp_path / "sql", patience=QUICK)
    record = json.loads((tmp_path / "sql" / "lorakit.json").read_text())
    shown = f"http://127.0.0.1:{web.port}/a/sql.tar.gz"
    assert (record["operation"], record["parents"]) == ("fetch", [{"path": shown, "sha256": sha256(data)}])
    assert fetched.source == shown
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for word in WORDS:
        assert word not in json.dumps(fetched.as_dict())
        assert word.encode() not in stored


def test_files_get_the_modes_of_new_ones(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    os.chmod(checkpoint / "adapter_model.safetensors", 0o600)
    web.put("sql.tar.gz", tarred(checkpoint))
    before = os.umask(0o027)
    try:
        fetch(web.url("sql.tar.gz"), tmp_path / "sql", patience=QUICK)
    finally:
        os.umask(before)
    assert (tmp_path / "sql" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_digest_that_was_given_has_to_be_that_of_the_archive(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    data = tarred(checkpoint)
    web.put("sql.tar.gz", data)
    with pytest.raises(InvalidFile, match=f"its sha256 is {sha256(data)}, and should be 0000"):
        fetch(web.url("sql.tar.gz"), tmp_path / "sql", sha256="0" * 64, patience=QUICK)
    assert not (tmp_path / "sql").exists()
    assert leftovers(tmp_path) == []
    fetch(web.url("sql.tar.gz"), tmp_path / "sql", sha256=sha256(data), patience=QUICK)


@pytest.mark.parametrize("name", ["sql.tar", "sql.tar.gz", "sql.zip"])
def test_what_a_server_packs_once_more_is_unpacked_once_more(
    web: Web, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    data = PACKED[name](checkpoint, "")
    web.put(name, data, encoding="gzip", cuts=[500])
    fetch(web.url(name), tmp_path / "sql", sha256=sha256(data), patience=QUICK)
    assert files_below(tmp_path / "sql") == files_below(checkpoint)


def test_a_server_that_gives_no_version_is_begun_with_again(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    web.put("sql.tar.gz", tarred(checkpoint), etag=None, modified=None, cuts=[900, 1200])
    fetched = fetch(web.url("sql.tar.gz"), tmp_path / "sql", patience=QUICK)
    assert files_below(tmp_path / "sql") == files_below(checkpoint)
    assert len(fetched.notes) == 2
    assert "it was begun again" in fetched.notes[0]


def test_a_file_that_changes_is_begun_with_again_once(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    old, new = tarred(checkpoint, "old", "w"), tarred(checkpoint, "", "w")
    page = web.put("sql.tar", old, cuts=[2000])
    page.then = type(page)(new, etag='"v2"')
    fetch(web.url("sql.tar"), tmp_path / "sql", patience=QUICK)
    assert files_below(tmp_path / "sql") == files_below(checkpoint)
    page = web.put("again.tar", old, cuts=[2000])
    for version in range(2, 6):
        page.then = type(page)(new, etag=f'"v{version}"', cuts=[2000])
        page = page.then
    with pytest.raises(LorakitError, match="was changed on the server while it was fetched, 2 times"):
        fetch(web.url("again.tar"), tmp_path / "again", patience=QUICK)
    assert not (tmp_path / "again").exists()


def test_nothing_is_asked_of_anybody_when_the_folder_exists(web: Web, tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "mine").touch()
    with pytest.raises(Conflict, match="exists already"):
        fetch(web.url("sql.tar.gz"), tmp_path / "sql")
    assert web.asked == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://host/x", "'ftp://' is no address that lorakit knows"),
        ("https://", "names no host"),
        ("https://host:port/x?5ec4e7", "is no URL"),
        ("s3://", "names no bucket"),
        ("hf://datasets/a/b", "one of the hub's datasets"),
        ("hf://only", "names nothing on the hub"),
        ("hf://org/name/../../x", "names nothing on the hub"),
        ("hf://org/name@../../x", "names nothing on the hub"),
        ("s3://models/a::b", "chains file systems"),
        ("https://host/x?X-Amz-Algorithm=AWS4-HMAC-SHA256", "has no X-Amz-Signature: a shell ends a word at '&'"),
        ("", "names nothing"),
    ],
)
def test_what_is_no_address(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as found:
        fetch(text, tmp_path / "out")
    assert "5ec4e7" not in str(found.value)


# single files


def test_a_single_file_stays_one(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    data = (checkpoint / "adapter_model.safetensors").read_bytes()
    web.put("adapter_model.safetensors", data, cuts=[100])
    fetched = fetch(web.url("adapter_model.safetensors"), tmp_path / "sql", patience=QUICK)
    assert files_below(tmp_path / "sql") == {"adapter_model.safetensors": data}
    assert (fetched.sha256, fetched.files) == (sha256(data), ("adapter_model.safetensors",))


def test_what_torch_saved_is_a_zip_file_and_stays_one(web: Web, tmp_path: Path) -> None:
    import torch

    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.ckpt")
    data = (tmp_path / "model.ckpt").read_bytes()
    for name in ("model.ckpt", "download"):
        web.put(name, data)
        fetch(web.url(name), tmp_path / f"out-{name}", patience=QUICK)
        assert files_below(tmp_path / f"out-{name}") == {name: data}


def test_the_server_may_name_the_file_but_not_its_place(web: Web, tmp_path: Path) -> None:
    for number, (said, name) in enumerate(
        [("../../evil.ckpt", "evil.ckpt"), ("a.ckpt", "a.ckpt"), ("..", "download"), (".hidden", "download")]
    ):
        web.put("x", NOISE, headers={"Content-Disposition": f'attachment; filename="{said}"'})
        fetch(web.url("x"), tmp_path / str(number), patience=QUICK)
        assert list(files_below(tmp_path / str(number))) == [name]


def test_a_file_that_is_cut_short_though_nobody_said_how_long_it_is(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    data = (checkpoint / "adapter_model.safetensors").read_bytes()
    web.put("model.safetensors", data[:-10], length=None)
    with pytest.raises(InvalidFile):
        fetch(web.url("model.safetensors"), tmp_path / "sql", patience=QUICK)
    assert not (tmp_path / "sql").exists()


def test_the_next_call_goes_on_with_what_the_last_one_had(web: Web, tmp_path: Path) -> None:
    page = web.put("a.ckpt", NOISE, cuts=[100_000], statuses=[200, 503, 503, 503, 503])
    with pytest.raises(LorakitError, match="try again later"):
        fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    assert not (tmp_path / "out").exists()
    [left] = leftovers(tmp_path)
    record = (tmp_path / left / PART).read_text()
    assert not any(word in record for word in WORDS)
    fetched = fetch(web.url("a.ckpt").replace("5ec4e7", "aNewOne"), tmp_path / "out", patience=QUICK)
    assert web.ranges()[-1] == "bytes=100000-"
    assert files_below(tmp_path / "out") == {"a.ckpt": NOISE}
    assert fetched.sha256 == sha256(NOISE)
    assert leftovers(tmp_path) == []
    assert page.statuses == []


def test_killed_behind_the_last_byte_nothing_is_fetched_again(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    web.put("a.ckpt", NOISE)
    with monkeypatch.context() as patched:
        patched.setattr("lorakit.checkpoints.moving.from_url._SYNCED_EVERY", 1)
        patched.setattr("lorakit.checkpoints.moving.download.Download.sha256", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    fetched = fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    assert web.ranges()[-1] == f"bytes={len(NOISE)}-"
    assert (fetched.notes, fetched.sha256) == ((), sha256(NOISE))
    assert files_below(tmp_path / "out") == {"a.ckpt": NOISE}


def test_what_changed_between_two_calls_is_begun_again(web: Web, tmp_path: Path) -> None:
    web.put("a.ckpt", NOISE, cuts=[100_000], statuses=[200, 503, 503, 503, 503])
    with pytest.raises(LorakitError):
        fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    web.put("a.ckpt", NOISE[::-1], etag='"v2"')
    fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    assert files_below(tmp_path / "out") == {"a.ckpt": NOISE[::-1]}


def test_a_part_of_another_file_is_not_gone_on_with(web: Web, tmp_path: Path) -> None:
    web.put("a.ckpt", NOISE, cuts=[100_000], statuses=[200, 503, 503, 503, 503])
    with pytest.raises(LorakitError):
        fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    web.put("b.ckpt", NOISE[::-1])
    fetch(web.url("b.ckpt"), tmp_path / "out", patience=QUICK)
    assert files_below(tmp_path / "out") == {"b.ckpt": NOISE[::-1]}
    assert leftovers(tmp_path) == []


def test_a_file_larger_than_allowed_is_refused(web: Web, tmp_path: Path) -> None:
    web.put("a.ckpt", NOISE, length=None)
    with pytest.raises(Refused, match="larger than the 1000 bytes that are allowed"):
        fetch(web.url("a.ckpt"), tmp_path / "out", limits=Limits(max_bytes=1000), patience=QUICK)
    assert not (tmp_path / "out").exists()


# crashes


PROGRAM = """
import sys
from pathlib import Path
from lorakit.checkpoints.moving.download import Patience
from lorakit.checkpoints.moving import from_url
from lorakit.checkpoints.moving.fetching import fetch
from_url._SYNCED_EVERY = 1 << 14
print("ready", flush=True)
fetch(sys.argv[1], Path(sys.argv[2]), patience=Patience(tries=4, timeout=5, pause=0.001))
"""


@pytest.mark.parametrize("name", ["a.ckpt", "a.tar"])
def test_killed_at_any_moment_nothing_is_there_and_the_next_call_completes(web: Web, tmp_path: Path, name: str) -> None:
    chance = random.Random(7)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights").write_bytes(chance.randbytes(2_000_000))
    data = NOISE * 5 if name == "a.ckpt" else tarred(tmp_path / "in", mode="w")
    out = tmp_path / "out"
    for _ in range(4):
        if out.exists():
            break
        web.put(name, data, stalls=[chance.randrange(1, len(data))])
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, web.url(name), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.6))
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert not out.exists()
    web.put(name, data)
    fetch(web.url(name), out, patience=QUICK)
    assert files_below(out) == ({"a.ckpt": data} if name == "a.ckpt" else files_below(tmp_path / "in"))
    assert leftovers(tmp_path) == []


def test_a_file_goes_on_after_a_kill_where_it_was_safe_on_the_disk(web: Web, tmp_path: Path) -> None:
    web.put("a.ckpt", NOISE, stalls=[200_000])
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, web.url("a.ckpt"), str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until = time.monotonic() + 20
    while not list(tmp_path.glob(f".out.tmp-*/{PART}")) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    web.put("a.ckpt", NOISE)
    fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    assert 0 < int(web.ranges()[-1].removeprefix("bytes=").rstrip("-")) <= 200_000
    assert files_below(tmp_path / "out") == {"a.ckpt": NOISE}


@pytest.mark.parametrize("name", ["a.ckpt", "a.tar"])
@pytest.mark.parametrize("length", [-1, None])
def test_a_full_disk_says_so_and_keeps_nothing(web: Web, tmp_path: Path, name: str, length: int | None) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights").write_bytes(NOISE * 3)
    data = NOISE * 3 if name == "a.ckpt" else tarred(tmp_path / "in", mode="w")
    web.put(name, data, length=length)
    with small_disk_at(tmp_path / "disk", kilobytes=400) as disk:
        (disk / "precious").write_bytes(b"1")
        with pytest.raises(OutOfSpace, match="free some space"):
            fetch(web.url(name), disk / "out", patience=QUICK)
        assert [path.name for path in disk.iterdir()] == ["precious"]


# from this machine


def test_a_folder_is_copied_and_a_run_stands_for_its_newest(checkpoint: Path, tmp_path: Path) -> None:
    for number, source in enumerate([str(checkpoint), f"file://{checkpoint}", str(checkpoint.parent)]):
        fetched = fetch(source, tmp_path / str(number))
        assert files_below(tmp_path / str(number)) == files_below(checkpoint)
        assert fetched.checkpoint.step == 500
        assert fetched.checkpoint.created == (checkpoint / "adapter_model.safetensors").stat().st_mtime


def test_an_archive_on_this_machine_is_unpacked(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "sql.zip").write_bytes(zipped(checkpoint, "sql"))
    fetch(str(tmp_path / "sql.zip"), tmp_path / "out", sha256=sha256(zipped(checkpoint, "sql")))
    assert files_below(tmp_path / "out") == files_below(checkpoint)


def test_a_checkpoint_that_is_not_finished_is_refused_unless_it_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    whole = (checkpoint / "adapter_model.safetensors").read_bytes()
    (checkpoint / "adapter_model.safetensors").write_bytes(whole[:100])
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(Incomplete, match=r"is not finished: adapter_model\.safetensors.*--unfinished"):
        fetch(str(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fetched = fetch(str(checkpoint), tmp_path / "out", unfinished=True)
    assert fetched.checkpoint.state == "incomplete"
    assert not (tmp_path / "out" / "lorakit.json").exists()


def test_one_that_nothing_vouches_for_has_to_stay_as_it_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.checkpoints.moving import trees

    (checkpoint / "trainer_state.json").unlink()
    waited: list[float] = []
    monkeypatch.setattr(trees.time, "sleep", waited.append)
    fetch(str(checkpoint), tmp_path / "out")
    assert 1 < waited[0] <= 2
    monkeypatch.setattr(trees.time, "sleep", lambda _: (checkpoint / "adapter_config.json").write_text("{}"))
    with pytest.raises(Incomplete, match="was written to while it was copied"):
        fetch(str(checkpoint), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_no_link_is_followed_out_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "last.ckpt").symlink_to("optimizer.pt")
    fetch(str(checkpoint), tmp_path / "within")
    assert (tmp_path / "within" / "last.ckpt").read_bytes() == b"o" * 1000
    assert not (tmp_path / "within" / "last.ckpt").is_symlink()
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "key").symlink_to(tmp_path / "secret")
    with pytest.raises(Refused, match="is a link out of the checkpoint"):
        fetch(str(checkpoint), tmp_path / "out")
    (checkpoint / "key").unlink()
    (checkpoint / "folder").symlink_to(tmp_path)
    with pytest.raises(Refused, match="is a link to a folder"):
        fetch(str(checkpoint), tmp_path / "out")
    (checkpoint / "folder").unlink()
    os.mkfifo(checkpoint / "pipe")
    with pytest.raises(Refused, match="neither a file nor a folder"):
        fetch(str(checkpoint), tmp_path / "out")


def test_what_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        fetch(str(tmp_path / "none"), tmp_path / "out")
    with pytest.raises(NotFound):
        fetch("file:///none/at/all", tmp_path / "out")


# what would come


def test_a_plan_asks_for_the_first_bytes_alone_and_writes_nothing(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    data = tarred(checkpoint)
    web.put("download", data)
    plan = plan_fetch(web.url("download"), tmp_path / "out")
    assert (plan.kind, plan.size, plan.resumable) == ("archive", len(data), True)
    assert web.ranges() == ["bytes=0-511"]
    web.put("a.ckpt", NOISE, ranges=False, etag=None, modified=None)
    plan = plan_fetch(web.url("a.ckpt"), tmp_path / "out")
    assert (plan.kind, plan.name, plan.size, plan.resumable) == ("file", "a.ckpt", len(NOISE), False)
    plan = plan_fetch(str(checkpoint), tmp_path / "out")
    assert (plan.kind, plan.files) == ("folder", tuple(sorted(files_below(checkpoint))))
    with pytest.raises(NotFound, match="there is nothing at"):
        plan_fetch(web.url("none"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not any(word in str(plan.as_dict()) for word in WORDS)


def test_a_plan_refuses_what_the_fetch_would(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    small = Limits(max_bytes=100)
    web.put("a.ckpt", NOISE)
    for work in (fetch, plan_fetch):
        with pytest.raises(UsageError, match="leave --sha256 out"):
            work(str(checkpoint), tmp_path / "out", sha256="0" * 64)
        for source in (str(checkpoint), web.url("a.ckpt")):
            with pytest.raises(Refused, match="is larger than the 100 bytes that are allowed"):
                work(source, tmp_path / "out", limits=small)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"cut")
    for work in (fetch, plan_fetch):
        with pytest.raises(Incomplete, match="is not finished"):
            work(str(checkpoint), tmp_path / "out")
    assert plan_fetch(str(checkpoint), tmp_path / "out", unfinished=True).kind == "folder"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


@pytest.mark.parametrize("top", ["", "checkpoint-500", "runs/sql/checkpoint-500"])
def test_a_checkpoint_that_was_packed_too_early_is_refused(
    web: Web, checkpoint: Path, tmp_path: Path, top: str
) -> None:
    (checkpoint / "trainer_state.json").write_text('{"global_step": 50')
    web.put("sql.tar", tarred(checkpoint, top, "w"))
    with pytest.raises(Incomplete, match="is not finished"):
        fetch(web.url("sql.tar"), tmp_path / "out", patience=QUICK)
    assert not (tmp_path / "out").exists()
    fetch(web.url("sql.tar"), tmp_path / "out", patience=QUICK, unfinished=True)
    assert look_at(tmp_path / "out").state == "incomplete"


def test_a_checkpoint_whose_trainer_spoke_of_another_step_is_not_vouched_for(
    web: Web, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7, "log_history": []}')
    web.put("sql.tar", tarred(checkpoint, "checkpoint-500", "w"))
    fetched = fetch(web.url("sql.tar"), tmp_path / "out", patience=QUICK)
    assert any("is of step 7" in note for note in fetched.notes)
    assert not (tmp_path / "out/lorakit.json").exists()


def test_folders_that_hold_nothing_but_one_another_are_unwrapped(web: Web, checkpoint: Path, tmp_path: Path) -> None:
    web.put("sql.tar", tarred(checkpoint, "runs/sql/checkpoint-500", "w"))
    fetched = fetch(web.url("sql.tar"), tmp_path / "out", patience=QUICK)
    assert files_below(tmp_path / "out") == files_below(checkpoint)
    assert sorted(fetched.files) == sorted(files_below(checkpoint))


def test_an_archive_is_known_by_its_bytes_where_its_name_says_nothing(
    web: Web, checkpoint: Path, tmp_path: Path
) -> None:
    web.put("sql-v1.0", tarred(checkpoint))
    (tmp_path / "sql-v1.0").write_bytes(tarred(checkpoint))
    for number, source in enumerate([web.url("sql-v1.0"), str(tmp_path / "sql-v1.0")]):
        assert plan_fetch(source, tmp_path / str(number)).kind == "archive"
        fetch(source, tmp_path / str(number), patience=QUICK)
        assert files_below(tmp_path / str(number)) == files_below(checkpoint)


def test_what_a_list_of_digests_does_not_name_is_said(checkpoint: Path, tmp_path: Path) -> None:
    config = (checkpoint / "adapter_config.json").read_bytes()
    (checkpoint / "lorakit.sha256").write_text(f"{sha256(config)}  adapter_config.json\n")
    [note] = fetch(str(checkpoint), tmp_path / "out").notes
    assert note.endswith("it does not name adapter_model.safetensors, optimizer.pt, trainer_state.json")


# parts that are not to be gone on with


@pytest.mark.parametrize("damage", ["bytes", "size"])
def test_a_download_that_was_refused_is_not_gone_on_with(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(from_url, "_SYNCED_EVERY", 1 << 14)
    digest = base64.b64encode(hashlib.sha256(NOISE).digest()).decode()
    headers = {"Repr-Digest": f"sha-256=:{digest}:"} if damage == "bytes" else {}
    limits = Limits() if damage == "bytes" else Limits(max_bytes=200_000)
    web.put("a.ckpt", b"x" + NOISE[1:], length=None, headers=headers)
    with pytest.raises(Refused):
        fetch(web.url("a.ckpt"), tmp_path / "out", limits=limits, patience=QUICK)
    assert leftovers(tmp_path) == []
    web.put("a.ckpt", NOISE, headers=headers)
    fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    assert files_below(tmp_path / "out") == {"a.ckpt": NOISE}


def test_a_url_that_expired_midway_is_gone_on_with_by_a_new_one(web: Web, tmp_path: Path) -> None:
    web.put("a.ckpt", NOISE, cuts=[100_000], statuses=[200, 403])
    with pytest.raises(Refused, match="has expired"):
        fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    assert web.ranges()[-1] == "bytes=100000-"
    assert files_below(tmp_path / "out") == {"a.ckpt": NOISE}


def begun(web: Web, folder: Path) -> Path:
    """As a killed fetch of `a.ckpt` into `out` leaves it, with one byte."""
    part = folder / ".out.tmp-evil"
    part.mkdir()
    said = {"size": None, "etag": '"v1"', "modified": None, "encoding": "", "digests": [], "name": None, "parts": True}
    record = {"address": f"http://127.0.0.1:{web.port}/a.ckpt", "name": "a.ckpt", "bytes": 1, "said": said}
    (part / PART).write_text(json.dumps(record))
    return part


def test_no_part_is_written_to_through_a_link(web: Web, tmp_path: Path) -> None:
    web.put("a.ckpt", NOISE)
    (tmp_path / "precious").write_bytes(b"precious")
    (begun(web, tmp_path) / "a.ckpt").symlink_to(tmp_path / "precious")
    fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert files_below(tmp_path / "out") == {"a.ckpt": NOISE}


def test_nobody_elses_part_is_gone_on_with(web: Web, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make what is somebody else's")
    web.put("a.ckpt", NOISE)
    part = begun(web, tmp_path)
    (part / "a.ckpt").write_bytes(b"!")
    os.chown(part, 65534, 65534)
    fetch(web.url("a.ckpt"), tmp_path / "out", patience=QUICK)
    assert files_below(tmp_path / "out") == {"a.ckpt": NOISE}
    assert web.ranges()[-1] == ""
