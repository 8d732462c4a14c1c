"""Hostile archives and hostile servers, through the whole command: nothing stays, nothing leaves the folder."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.test_archives import Files, gzipped_tar_of, tar_of, zip_of
from tests.checkpoints.moving.web import WORDS, Web, serving
from tests.cli.commands import Ended, lorakit

Capture = pytest.CaptureFixture[str]
PLAIN: Files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 2000}


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Something precious, and beside it a place to fetch into."""
    (tmp_path / "precious").write_text("1")
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def fetched(capsys: Capture, web: Web, place: Path, name: str, *more: str) -> Ended:
    command = ("fetch", web.url(name), "--out", str(place / "out"), "--tries", "2", "--timeout", "1", *more)
    return lorakit(capsys, *command)


def ensure_refused(ended: Ended, place: Path, code: int = 4) -> None:
    assert ended.code == code, ended
    assert list(place.iterdir()) == []
    assert sorted(path.name for path in place.parent.iterdir()) == ["place", "precious"]
    assert (place.parent / "precious").read_text() == "1"
    assert "Traceback" not in ended.err
    assert not any(word in ended.out + ended.err for word in WORDS)


def with_member(kind: bytes, name: str, target: str = "") -> bytes:
    def change(info: tarfile.TarInfo) -> None:
        if info.name == name:
            info.type, info.linkname, info.size = kind, target, 0

    return tar_of({**PLAIN, name: b""}, change)


def zipped_link(target: str) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in PLAIN.items():
            archive.writestr(name, content)
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, target)
    return written.getvalue()


ATTACKS: dict[str, bytes] = {
    "upwards.tar": tar_of({**PLAIN, "../precious": b"2"}),
    "deep-upwards.tar": tar_of({**PLAIN, "a/../../precious": b"2"}),
    "absolute.tar": tar_of({**PLAIN, "/etc/evil": b"2"}),
    "symlink.tar": with_member(tarfile.SYMTYPE, "link", "../precious"),
    "hard-link.tar": with_member(tarfile.LNKTYPE, "link", "../precious"),
    "device.tar": with_member(tarfile.CHRTYPE, "null"),
    "pipe.tar": with_member(tarfile.FIFOTYPE, "pipe"),
    "case.tar": tar_of({**PLAIN, "Adapter_Config.json": b"{}"}),
    "unseen.tar": tar_of({**PLAIN, "adapter_config.json\u202e": b"{}"}),
    "cut.tar": tar_of(PLAIN)[:2000],
    "cut.tar.gz": gzipped_tar_of(PLAIN)[:-9],
    "empty.tar": tar_of({}),
    "none.tar": b"not an archive at all" * 100,
    "behind.tar.gz": gzipped_tar_of(PLAIN) + b"more",
    "bomb.tar.gz": gzip.compress(tar_of({"weights": bytes(80 << 20)}), 9),
    "many.tar": tar_of({f"f{number}": b"" for number in range(1001)}),
    "upwards.zip": zip_of({**PLAIN, "../precious": b"2"}),
    "link.zip": zipped_link("../precious"),
    "cut.zip": zip_of(PLAIN)[:-30],
    "drive.zip": zip_of({**PLAIN, "C:/evil": b"2"}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_archive_leaves_nothing(capsys: Capture, web: Web, place: Path, name: str) -> None:
    web.put(name, ATTACKS[name])
    ensure_refused(fetched(capsys, web, place, name), place)


@pytest.mark.parametrize("name", ["upwards.tar", "link.zip"])
def test_one_on_this_machine_is_no_less_hostile(capsys: Capture, place: Path, name: str) -> None:
    (place / name).write_bytes(ATTACKS[name])
    ended = lorakit(capsys, "fetch", place / name, "--out", place / "out")
    (place / name).unlink()
    ensure_refused(ended, place)


def test_an_archive_that_claims_to_be_the_rest_of_a_file(capsys: Capture, web: Web, place: Path) -> None:
    record = {"address": f"http://127.0.0.1:{web.port}/x.tar", "name": "evil", "bytes": 4, "said": {"etag": '"v1"'}}
    data = tar_of({".lorakit-part.json": json.dumps(record).encode(), "evil": b"evil", "../out": b""})
    web.put("x.tar", data)
    ensure_refused(fetched(capsys, web, place, "x.tar"), place)


def test_an_archive_that_holds_the_names_that_lorakit_gives(capsys: Capture, web: Web, place: Path) -> None:
    manifest = b"0" * 64 + b"  ../../precious\n"
    web.put("a.tar", tar_of({**PLAIN, "lorakit.sha256": manifest}))
    ensure_refused(fetched(capsys, web, place, "a.tar"), place)
    web.put("b.tar", tar_of({**PLAIN, "lorakit.json": b"[" * 100_000}))
    assert fetched(capsys, web, place, "b.tar", "--unfinished").code == 0
    assert (place / "out" / "lorakit.json").read_bytes() == b"[" * 100_000


def test_no_pickle_runs(capsys: Capture, web: Web, place: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch " + os.fsencode(place.parent / "ran") + b"'\ntR."
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("model/data.pkl", bomb)
        archive.writestr("model/version", "3")
    files = {"adapter_config.json": b"{}", "adapter_model.bin": bomb, "training_args.bin": bomb, "optimizer.pt": bomb}
    web.put("a.tar", tar_of(files))
    web.put("model.ckpt", written.getvalue())
    for name in ("a.tar", "model.ckpt"):
        ended = lorakit(capsys, "fetch", web.url(name), "--out", place / name, "--json")
        assert ended.code == 0
    assert not (place.parent / "ran").exists()


@pytest.mark.parametrize("data", [bytes(100), gzip.compress(bytes(100 << 20), 9)], ids=["no gzip", "a bomb"])
def test_a_bomb_in_what_the_bytes_travel_in(capsys: Capture, web: Web, place: Path, data: bytes) -> None:
    web.put("model.ckpt", data, headers={"Content-Encoding": "gzip"})
    ensure_refused(fetched(capsys, web, place, "model.ckpt"), place)


def test_a_body_without_an_end_stops_where_it_is_told(capsys: Capture, web: Web, place: Path) -> None:
    web.put("model.ckpt", b"x" * 5_000_000, length=None)
    web.put("sql.tar", tar_of({"x": b"x" * 5_000_000}), length=None)
    for name in ("model.ckpt", "sql.tar"):
        ensure_refused(fetched(capsys, web, place, name, "--max-size", "1MB"), place)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Encoding": "br"}, 4),
        ({"Content-Encoding": "gzip, gzip"}, 4),
        ({"Content-Disposition": "attachment; filename*=utf-8''..%2F..%2Fprecious"}, 0),
        ({"Content-Disposition": 'attachment; filename="/etc/evil"'}, 0),
        ({"X-Long": "x" * 60_000}, 0),
    ],
)
def test_headers_that_lead_nowhere(capsys: Capture, web: Web, place: Path, headers: dict[str, str], code: int) -> None:
    web.put("x", b"weights" * 100, headers=headers)
    ended = fetched(capsys, web, place, "x")
    if code:
        ensure_refused(ended, place, code)
        return
    assert ended.code == 0
    assert sorted(path.name for path in place.iterdir()) == ["out"]
    assert (place.parent / "precious").read_text() == "1"
    assert all(path.parent == place / "out" for path in place.rglob("*") if path.is_file())


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://host/x", "//[", "http://", "x" * 10_000, "\t"])
def test_places_that_a_server_leads_to(capsys: Capture, web: Web, place: Path, location: str) -> None:
    web.put("x", b"", location=location)
    ended = fetched(capsys, web, place, "x")
    assert ended.code in (1, 3, 4)
    ensure_refused(ended, place, ended.code)
