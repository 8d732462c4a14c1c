"""Archives are hostile until shown otherwise: each attack is one test, each of them on every format that it fits."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import InvalidFile, LorakitError, OutOfSpace, Refused
from lorakit.files import archive_members
from lorakit.files.archives import Extracted, Kind, Limits, extract_stream

Files = dict[str, bytes]
Change = Callable[[tarfile.TarInfo], None]

NOISE = random.Random(1).randbytes(3000)
PLAIN: Files = {
    "adapter_config.json": b"{}",
    "checkpoint-1/adapter_model.safetensors": NOISE,
    "checkpoint-1/empty": b"",
}


class Body:
    """What an HTTP client gives: read(n) and nothing else, and seldom all that was asked for."""

    def __init__(self, content: bytes, most: int = 700) -> None:
        self._content = io.BytesIO(content)
        self._most = most

    def read(self, size: int, /) -> bytes:
        return self._content.read(min(size, self._most))


class Unseekable(io.RawIOBase):
    """A pipe: archives written into it have no sizes in front of their files."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, block: bytes) -> int:  # type: ignore[override]
        self.written += block
        return len(block)


def tar_of(files: Files, change: Change = lambda info: None, *, form: int = tarfile.PAX_FORMAT) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return written.getvalue()


def gzipped_tar_of(files: Files) -> bytes:
    return gzip.compress(tar_of(files), mtime=0)


def zip_of(files: Files, *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return written.getvalue()


def stored_zip_of(files: Files) -> bytes:
    return zip_of(files, method=zipfile.ZIP_STORED)


def streamed_zip_of(files: Files) -> bytes:
    pipe = Unseekable()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            with archive.open(name, "w") as file:
                file.write(content)
    return bytes(pipe.written)


def stored_streamed_zip_of(files: Files, *, wide: bool = False) -> bytes:
    pipe = Unseekable()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            with archive.open(name, "w", force_zip64=wide) as file:
                file.write(content)
    return bytes(pipe.written)


FORMS: dict[str, Callable[[Files], bytes]] = {
    "tar": tar_of,
    "gnu tar": lambda files: tar_of(files, form=tarfile.GNU_FORMAT),
    "tar.gz": gzipped_tar_of,
    "zip": zip_of,
    "stored zip": stored_zip_of,
    "streamed zip": streamed_zip_of,
    "stored and streamed zip": stored_streamed_zip_of,
}
every_form = pytest.mark.parametrize("form", FORMS)


def extracted(archive: bytes, into: Path, **limits: float) -> Extracted:
    into.mkdir(exist_ok=True)
    return extract_stream(Body(archive), into, limits=Limits(**limits))  # type: ignore[arg-type]


def files_below(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def a_place() -> Iterator[tuple[Path, Path]]:
    """A folder with something precious in it, and the folder in it to extract into."""
    with tempfile.TemporaryDirectory() as name:
        world = Path(name)
        (world / "precious").write_text("1")
        (world / "into").mkdir()
        yield world, world / "into"


def nothing_but(into: Path) -> bool:
    return sorted(os.listdir(into.parent)) == ["into", "precious"] and (into.parent / "precious").read_text() == "1"


def refused(archive: bytes, match: str, error: type[LorakitError] = Refused, **limits: float) -> None:
    with a_place() as (_, into):
        with pytest.raises(error, match=match):
            extracted(archive, into, **limits)
        assert nothing_but(into)
        assert not any(path.is_symlink() for path in into.rglob("*"))


# what is plain comes out


@every_form
def test_a_plain_archive_comes_out_as_it_went_in(tmp_path: Path, form: str) -> None:
    archive = FORMS[form](PLAIN)
    found = extracted(archive, tmp_path / "into")
    assert files_below(tmp_path / "into") == PLAIN
    assert found.kind == form.split()[-1]
    assert found.files == tuple(PLAIN)
    assert found.bytes == sum(map(len, PLAIN.values()))
    assert found.sha256 == hashlib.sha256(archive).hexdigest()


@pytest.mark.parametrize(
    "options", [["-c"], ["-cz"], ["-c", "--format=v7"], ["-c", "--format=ustar"], ["-c", "-H", "pax"]]
)
@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_what_tar_writes_of_a_folder_comes_out(tmp_path: Path, options: list[str]) -> None:
    source = tmp_path / "source"
    for name, content in PLAIN.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    packed = subprocess.run(["tar", *options, "-f", "-", "-C", source, "."], capture_output=True, check=True).stdout
    extracted(packed, tmp_path / "into")
    assert files_below(tmp_path / "into") == PLAIN


@pytest.mark.parametrize(
    ("options", "piped"),
    [(["-r"], False), (["-r0"], False), (["-rD"], False), (["-r", "-fz"], False), (["-r"], True), (["-r0"], True)],
)
@pytest.mark.skipif(shutil.which("zip") is None, reason="needs zip")
def test_what_zip_writes_of_a_folder_comes_out(tmp_path: Path, options: list[str], piped: bool) -> None:
    source = tmp_path / "source"
    for name, content in PLAIN.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    target = "-" if piped else str(tmp_path / "a.zip")
    packed = subprocess.run(["zip", "-q", *options, target, "."], cwd=source, capture_output=True, check=True).stdout
    extracted(packed if piped else (tmp_path / "a.zip").read_bytes(), tmp_path / "into")
    assert files_below(tmp_path / "into") == PLAIN


@pytest.mark.parametrize("form", ["tar", "gnu tar", "zip"])
def test_long_names_and_names_beyond_ascii_come_out(tmp_path: Path, form: str) -> None:
    files = {f"{'d' * 120}/{'e' * 120}/größe-模型": b"1", "f" * 255: b"2"}
    extracted(FORMS[form](files), tmp_path / "into")
    assert files_below(tmp_path / "into") == files


def test_a_zip_with_long_size_fields_comes_out(tmp_path: Path) -> None:
    for pipe in (io.BytesIO(), Unseekable()):
        with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("a", "w", force_zip64=True) as file:
                file.write(NOISE)
            archive.comment = b"made by a test"
        written = pipe.getvalue() if isinstance(pipe, io.BytesIO) else bytes(pipe.written)
        into = tmp_path / type(pipe).__name__
        extracted(written, into)
        assert files_below(into) == {"a": NOISE}


def test_a_zip_that_ends_in_a_long_record_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    archive = zip_of(PLAIN)
    assert b"PK\x06\x06" in archive
    extracted(archive, tmp_path / "into")
    assert files_below(tmp_path / "into") == PLAIN


def test_one_tar_in_several_gzip_members_is_one(tmp_path: Path) -> None:
    whole = tar_of(PLAIN)
    extracted(gzip.compress(whole[:1000]) + gzip.compress(b"") + gzip.compress(whole[1000:]), tmp_path / "into")
    assert files_below(tmp_path / "into") == PLAIN


def test_a_zstd_tar_comes_out_and_is_refused_when_cut_or_followed(tmp_path: Path) -> None:
    import zstandard

    packed = zstandard.ZstdCompressor(write_checksum=True).compress(tar_of(PLAIN))
    assert extracted(packed, tmp_path / "into").kind == "tar.zst"
    assert files_below(tmp_path / "into") == PLAIN
    for length in range(4, len(packed), 7):
        refused(packed[:length], "truncated", InvalidFile)
    refused(packed[:-1], "truncated", InvalidFile)
    refused(packed + b"more", "decompressed", InvalidFile)
    bomb = zstandard.ZstdCompressor().compress(tar_of({"a": bytes(4 << 20)}))
    refused(bomb, "decompression bomb", unrated_bytes=1 << 20)


def test_a_zstd_tar_without_a_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(LorakitError, match=r"lorakit\[zstd\]"):
        extract_stream(Body(b"\x28\xb5\x2f\xfd" + bytes(100)), tmp_path)


def test_an_archive_in_the_archive_stays_one(tmp_path: Path) -> None:
    extracted(stored_zip_of({"inner.zip": zip_of({"../a": b"1"}), "inner.tar": tar_of(PLAIN)}), tmp_path / "into")
    assert sorted(os.listdir(tmp_path / "into")) == ["inner.tar", "inner.zip"]


def test_modes_are_those_of_new_files_whatever_the_archive_says(tmp_path: Path) -> None:
    def everything_set(info: tarfile.TarInfo) -> None:
        info.mode, info.uid, info.gid, info.uname = 0o7777, 0, 0, "root"

    before = os.umask(0o022)
    try:
        extracted(tar_of(PLAIN, everything_set), tmp_path / "into")
    finally:
        os.umask(before)
    for path in (tmp_path / "into").rglob("*"):
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == (0o755 if path.is_dir() else 0o644)
        assert status.st_uid == os.getuid()


def test_progress_counts_the_archive_s_own_bytes(tmp_path: Path) -> None:
    archive = gzipped_tar_of(PLAIN)
    seen: list[int] = []
    extract_stream(Body(archive, 100), tmp_path, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(archive)


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_memory_does_not_grow_with_the_archive(tmp_path: Path, kind: str) -> None:
    content = NOISE * 10_000  # 30 MB
    archive = tar_of({"a": content})
    stream = Body(archive if kind == "tar" else gzip.compress(archive, 1), 1 << 20)
    tracemalloc.start()
    try:
        extract_stream(stream, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a").read_bytes() == content


# names

HOSTILE = {
    "/etc/passwd": "absolute",
    "//a": "absolute",
    "../precious": "leads out",
    "a/../../precious": "leads out",
    "./../precious": "leads out",
    "a/..": "leads out",
    "．．/precious": "leads out",
    "..／precious": "leads out",
    "C:/windows": "drive",
    "c:a": "drive",
    "..\\precious": "backslash",
    "a\nb": "can't be seen",
    "a\x1b[2Jb": "can't be seen",
    "a\u202etxt.exe": "can't be seen",
    "a\u2028b": "can't be seen",
    "a//b": "empty part",
    "a/./b": "empty part",
    "a" * 256: "too long",
    "/".join(["a" * 200] * 6): "too long",
    "/".join(["a"] * 17): "deeper than 16",
}


@pytest.mark.parametrize("form", ["tar", "gnu tar", "tar.gz", "zip", "streamed zip"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused(form: str, name: str) -> None:
    refused(FORMS[form]({"fine": b"1", name: b"2"}), HOSTILE[name])


def test_a_name_with_a_nul_is_refused() -> None:
    refused(tar_of({"a": b"1"}, lambda info: setattr(info, "pax_headers", {"path": "a\0b"})), "can't be seen")
    refused(patched(zip_of({"a!b": b"1"}), b"a!b", b"a\0b"), "can't be seen")


def test_a_folder_with_a_hostile_name_is_refused() -> None:
    def folder(info: tarfile.TarInfo) -> None:
        info.type = tarfile.DIRTYPE

    refused(tar_of({"../a": b""}, folder), "leads out")
    refused(zip_of({"../a/": b""}), "leads out")


@pytest.mark.parametrize("form", ["tar", "zip"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "./a"),
        ("Adapter.json", "adapter.JSON"),
        ("gr\u00f6\u00dfe", "gro\u0308\u00dfe"),
        ("strasse", "straße"),
        ("ﬁle", "file"),
        ("a/b", "A/c"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("A/b", "a"),
        ("a", "A/b"),
    ],
)
def test_two_names_that_some_disk_takes_for_one_are_refused(form: str, first: str, second: str) -> None:
    refused(FORMS[form]({first: b"1", second: b"2"}), "can't stand beside")


def test_a_member_twice_is_refused() -> None:
    double = tar_of({"a": b"1", "b": b"2"}, lambda info: setattr(info, "name", "a"))
    refused(double, "can't stand beside")
    refused(patched(zip_of({"a1": b"1", "a2": b"2"}), b"a2", b"a1"), "can't stand beside")


def test_a_folder_twice_is_one(tmp_path: Path) -> None:
    def folders(info: tarfile.TarInfo) -> None:
        if info.name.startswith("d"):
            info.type, info.name = tarfile.DIRTYPE, "d"

    extracted(tar_of({"d1": b"", "d2": b"", "a": b"1"}, folders), tmp_path / "into")
    assert sorted(os.listdir(tmp_path / "into")) == ["a", "d"]


@pytest.mark.filterwarnings("ignore:Duplicate name")  # which different names are that end at a NUL
@settings(max_examples=150, deadline=None)
@given(
    names=st.lists(
        st.lists(
            st.sampled_from(["..", ".", "", "a", "A", "/", "\\", "c:", "~", "precious", "into", "\0", "‥", "．．", "é"])
            | st.text(st.characters(codec="utf-8"), max_size=3),
            min_size=1,
            max_size=4,
        ).map("/".join),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    form=st.sampled_from(["tar", "gnu tar", "zip", "streamed zip"]),
)
def test_whatever_the_names_nothing_is_written_elsewhere(names: list[str], form: str) -> None:
    try:
        archive = FORMS[form](dict.fromkeys(names, b"1"))
    except ValueError:  # the writer refuses the name
        return
    with a_place() as (_, into):
        try:
            found = extracted(archive, into)
        except Refused:
            pass
        else:
            assert sorted(found.files) == sorted(files_below(into))
        assert nothing_but(into)


@pytest.mark.parametrize("place", ["a", "d"])
def test_a_link_that_stands_in_the_folder_already_is_not_followed(place: str) -> None:
    with a_place() as (world, into):
        (into / place).symlink_to(world if place == "d" else world / "precious")
        with pytest.raises(LorakitError):
            extracted(tar_of({"a": b"2"} if place == "a" else {"d/precious": b"2"}), into)
        assert nothing_but(into)


# kinds of members


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "fifo"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"Z", "unknown type"),
    ],
)
def test_what_is_neither_file_nor_folder_is_refused(kind: bytes, match: str) -> None:
    def become(info: tarfile.TarInfo) -> None:
        if info.name == "b":
            info.type, info.size, info.linkname = kind, 0, "../precious"

    refused(tar_of({"a": b"1", "b": b""}, become), match)
    refused(tar_of({"a": b"1", "b": b""}, become, form=tarfile.USTAR_FORMAT), match)


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR])
def test_a_zip_with_a_link_or_a_device_is_refused(mode: int) -> None:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        info = zipfile.ZipInfo("a")
        info.create_system, info.external_attr = 3, (mode | 0o777) << 16
        archive.writestr(info, "../precious")
    refused(written.getvalue(), "link" if mode == stat.S_IFLNK else "of the kind")


def test_a_link_to_go_through_later_is_refused_before_it_is_made() -> None:
    def link(info: tarfile.TarInfo) -> None:
        if info.name == "way":
            info.type, info.linkname = tarfile.SYMTYPE, ".."

    refused(tar_of({"way": b"", "way/precious": b"2"}, link), "symbolic link")


@pytest.mark.parametrize("key", ["GNU.sparse.major", "GNU.sparse.size", "SCHILY.realsize"])
def test_sparse_pax_headers_are_refused(key: str) -> None:
    refused(tar_of({"a": b"1"}, lambda info: setattr(info, "pax_headers", {key: "1"})), "sparse")


# too much


@pytest.mark.parametrize("form", ["tar.gz", "zip", "streamed zip"])
def test_a_decompression_bomb_is_refused(form: str) -> None:
    bomb = FORMS[form]({"a": bytes(4 << 20)})
    refused(bomb, "decompression bomb", unrated_bytes=1 << 20)
    with a_place() as (_, into):
        assert extracted(bomb, into).bytes == 4 << 20  # small enough to do no harm


def test_a_bomb_of_many_small_files_is_refused() -> None:
    refused(zip_of({str(number): bytes(100_000) for number in range(50)}), "bomb", unrated_bytes=1 << 20)


def test_zeros_behind_the_end_are_a_bomb_too() -> None:
    refused(gzip.compress(tar_of(PLAIN) + bytes(4 << 20)), "decompression bomb", unrated_bytes=1 << 20)


@every_form
def test_files_larger_than_allowed_are_refused_before_they_are_written(form: str) -> None:
    refused(FORMS[form]({"a": bytes(9000), "b": bytes(9000)}), "larger than the 1[70]000", max_bytes=17_000)


def test_an_archive_larger_than_allowed_is_refused() -> None:
    refused(tar_of({"a": NOISE}) + bytes(100_000), "larger than", max_bytes=50_000)


@every_form
def test_too_many_files_are_refused(form: str) -> None:
    refused(FORMS[form]({str(number): b"" for number in range(11)}), "more than the 10 files", max_files=10)


def test_folders_in_names_and_headers_without_members_count_as_well() -> None:
    refused(tar_of({f"{number}/a/b/c": b"" for number in range(3)}), "more than the 10 files", max_files=10)
    header = tarfile.TarInfo.create_pax_global_header({"comment": "1"})
    refused(header * 11 + tar_of({"a": b"1"}), "more than the 10 files", max_files=10)


def test_a_header_that_fills_the_memory_is_refused() -> None:
    long_comment = tar_of({"a": b"1"}, lambda info: setattr(info, "pax_headers", {"comment": "1" * (2 << 20)}))
    refused(long_comment, "header of")
    refused(raw_header(b"L", 1 << 40), "header of")


# headers that lie


def raw_header(kind: bytes, size: int, name: bytes = b"a") -> bytes:
    info = tarfile.TarInfo(name.decode())
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(records: Iterable[tuple[str, str]]) -> bytes:
    """A pax header, whatever it says."""
    content = b""
    for key, value in records:
        body = f" {key}={value}\n".encode()
        length = len(body) + len(str(len(body)))
        length += len(str(length + 1)) - len(str(len(body)))
        content += str(length).encode() + body
    return raw_header(b"x", len(content)) + content + bytes(-len(content) % 512)


def member(name: bytes = b"a", content: bytes = b"1") -> bytes:
    return raw_header(b"0", len(content), name) + content + bytes(-len(content) % 512)


END = bytes(1024)


@pytest.mark.parametrize(
    ("headers", "match"),
    [
        (pax([("size", "512")]), "two sizes"),
        (pax([("size", "0")]), "two sizes"),
        (pax([("size", "-1")]), "no size"),
        (pax([("size", "1e3")]), "no size"),
        (pax([("size", "9" * 30)]), "no size"),
        (pax([("size", str(1 << 50))]), "larger than"),
        (pax([("path", "../precious")]), "leads out"),
        (pax([("path", "")]), "no name"),
        (pax([("path", "b"), ("path", "c")]), "can't be read"),
        (pax([("linkpath", "../precious")]), "target of a link"),
        (pax([("path", "b")]) + pax([("comment", "c")]), "several pax headers"),
        (pax([("path", "b")]) + raw_header(b"L", 2) + b"c\0" + bytes(510), "several long names"),
        ((raw_header(b"L", 2) + b"c\0" + bytes(510)) * 2, "several long names"),
        (raw_header(b"L", 13) + b"../precious\0\0" + bytes(499), "can't be seen|leads out"),
        (raw_header(b"L", 2) + b"\xff\0" + bytes(510), "not UTF-8"),
        (raw_header(b"x", 5) + b"9 a=b" + bytes(507), "can't be read"),
        (raw_header(b"x", 5) + b"5 a=b" + bytes(507), "can't be read"),
        (raw_header(b"x", 5) + b"0 a=\n" + bytes(507), "can't be read"),
        (raw_header(b"x", 5) + b"-5 a\n" + bytes(507), "can't be read"),
        (tarfile.TarInfo.create_pax_global_header({"path": "b"}), "all its members"),
        (tarfile.TarInfo.create_pax_global_header({"size": "0"}), "all its members"),
    ],
)
def test_extended_headers_that_say_something_odd_are_refused(headers: bytes, match: str) -> None:
    refused(headers + member() + END, match)


def test_a_pax_size_that_the_header_agrees_with_counts(tmp_path: Path) -> None:
    extracted(pax([("size", "1"), ("path", "b")]) + member() + END, tmp_path / "into")
    assert files_below(tmp_path / "into") == {"b": b"1"}


@pytest.mark.parametrize("size", [b"\xff" * 11 + b"\xfe", b"-0000000010\0", b"0000000009\0\0"])
def test_a_size_below_zero_or_not_in_octal_is_refused(size: bytes) -> None:
    record = bytearray(raw_header(b"0", 1))
    record[124:136] = size
    record[148:156] = b"%06o\0 " % (sum(record[:148]) + sum(record[156:]) + 256)
    refused(bytes(record) + bytes(512) + END, "no size that can be read", InvalidFile)


def test_a_folder_with_bytes_of_its_own_is_refused() -> None:
    refused(raw_header(b"5", 512) + member() + END, "folder of 512 bytes", InvalidFile)
    refused(zip_of({"a/": b"1"}), "folder with bytes", InvalidFile)


def test_an_archive_that_goes_on_behind_its_end_is_refused() -> None:
    refused(tar_of(PLAIN) + tar_of({"b": b"2"}), "behind the end", InvalidFile)
    refused(gzipped_tar_of(PLAIN) + gzipped_tar_of({"b": b"2"}), "behind the end", InvalidFile)
    refused(gzipped_tar_of(PLAIN) + b"more", "behind the end", InvalidFile)
    refused(zip_of(PLAIN) + b"more", "behind the end", InvalidFile)
    refused(zip_of(PLAIN) + zip_of({"b": b"2"}), "behind the end", InvalidFile)
    refused(member() + bytes(512) + member(b"b") + END, "goes on", InvalidFile)


@every_form
def test_what_is_cut_short_anywhere_is_refused(form: str) -> None:
    archive = FORMS[form](PLAIN)
    if form.endswith("tar"):  # what fills the last 10 KiB may be missing
        archive = archive[: len(archive.rstrip(b"\0")) // 512 * 512 + 3 * 512]
    with a_place() as (_, into):
        for length in {*range(0, len(archive), 97), *range(max(0, len(archive) - 60), len(archive))}:
            with pytest.raises(InvalidFile):
                extracted(archive[:length], into)
            shutil.rmtree(into)
        assert extracted(archive, into).files == tuple(PLAIN)


@settings(max_examples=150, deadline=None)
@given(form=st.sampled_from(list(FORMS)), place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_one_wrong_byte_is_refused_or_changes_no_file(form: str, place: float, value: int) -> None:
    archive = bytearray(FORMS[form](PLAIN))
    archive[int(place * len(archive))] ^= value
    with a_place() as (_, into):
        try:
            extracted(bytes(archive), into)
        except Refused:
            pass
        else:  # a plain tar has no checksum over its files
            if not form.endswith("tar"):
                assert files_below(into) == PLAIN
        assert nothing_but(into)


@settings(max_examples=100, deadline=None)
@given(beginning=st.sampled_from([b"", b"\x1f\x8b\x08\0", b"PK\x03\x04", b"PK\x05\x06", member()]), rest=st.binary())
def test_noise_is_refused_in_words(beginning: bytes, rest: bytes) -> None:
    refused(beginning + rest, ".", InvalidFile if beginning == b"" else Refused)


# zips whose two lists differ


def patched(archive: bytes, old: bytes, new: bytes, *, last: bool = False) -> bytes:
    """Every occurrence replaced, or the last one alone: that in the directory."""
    assert old in archive
    if not last:
        return archive.replace(old, new)
    head, _, tail = archive.rpartition(old)
    return head + new + tail


def test_a_name_that_the_directory_spells_otherwise_is_refused() -> None:
    refused(patched(zip_of({"name": b"1"}), b"name", b"eman", last=True), "says other things", InvalidFile)


def test_sizes_and_checksums_that_differ_are_refused() -> None:
    for archive in (stored_zip_of({"a": NOISE}), zip_of({"a": NOISE}), streamed_zip_of({"a": NOISE})):
        for number in (zlib.crc32(NOISE), len(NOISE)):
            field = struct.pack("<I", number)
            refused(patched(archive, field, struct.pack("<I", number ^ 1), last=True), "says other things", InvalidFile)
            refused(archive.replace(field, struct.pack("<I", number ^ 1), 1), ".", InvalidFile)
    refused(patched(zip_of({"a": NOISE}), NOISE[:9], NOISE[1:10]), "not what its header says|damaged", InvalidFile)


def test_members_that_overlap_are_refused() -> None:
    """One file named many times over by the directory: the bomb without recursion of Fifield (2019)."""
    archive = zip_of({"a": b"1" * 5000, "b": b"2" * 5000})
    start = struct.pack("<I", archive.index(b"PK\x03\x04", 4)) + b"b"
    refused(patched(archive, start, struct.pack("<I", 0) + b"b", last=True), "says other|no member begins", InvalidFile)


def test_a_member_that_the_directory_does_not_name_is_refused() -> None:
    both, one = zip_of({"a": b"1", "b": b"2"}), zip_of({"a": b"1"})
    directory, end = both.index(b"PK\x01\x02"), both.index(b"PK\x05\x06")
    second = both.index(b"PK\x01\x02", directory + 4)
    ending = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, second - directory, directory, 0)
    refused(both[:second] + ending, "not in its directory", InvalidFile)
    refused(both[: directory + 0] + both[directory:second] * 2 + both[end:], "twice", InvalidFile)
    hidden = one[: one.index(b"PK\x01\x02")] + b"hidden between" + one[one.index(b"PK\x01\x02") :]
    refused(hidden, ".", InvalidFile)
    refused(b"#!/bin/sh\n" + one, "no archive", InvalidFile)


def test_a_zip_that_names_another_place_for_its_directory_is_refused() -> None:
    archive = zip_of({"a": b"1"})
    end = archive.index(b"PK\x05\x06")
    for place in range(end + 4, end + 20, 2):
        wrong = bytearray(archive)
        wrong[place] ^= 1
        refused(bytes(wrong), "says other things", InvalidFile)


def test_encrypted_and_oddly_packed_zips_are_refused() -> None:
    archive = bytearray(zip_of({"a": b"1"}))
    archive[6] |= 1
    refused(bytes(archive), "encrypted")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(zip_of({"a": b"1"}, method=method), "packed by method|encrypted or of an unknown kind")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("most", [1, 23, 700, 1 << 20])
def test_a_stored_file_whose_size_comes_later_comes_out(tmp_path: Path, wide: bool, most: int) -> None:
    inner = stored_streamed_zip_of({"a": NOISE, "b": b""})
    files = {"empty": b"", "inner.zip": inner, "signatures": b"PK\x07\x08" * 50 + b"PK\x07"}
    archive = stored_streamed_zip_of(files, wide=wide)
    extract_stream(Body(archive, most), tmp_path)
    assert files_below(tmp_path) == files


def test_a_stored_file_that_holds_its_own_end_is_refused() -> None:
    for layout, wide in (("<4sIII", False), ("<4sIQQ", True)):
        ending = struct.pack(layout, b"PK\x07\x08", zlib.crc32(b"1"), 1, 1)
        refused(stored_streamed_zip_of({"a": b"1" + ending}, wide=wide), "something else", InvalidFile)
        hidden = b"1" + ending + zip_of({"hidden": b"2"})
        refused(stored_streamed_zip_of({"a": hidden}, wide=wide), "directory", InvalidFile)


def test_a_second_name_in_an_extra_field_is_refused() -> None:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        info = zipfile.ZipInfo("a")
        info.extra = struct.pack("<HHBI", 0x7075, 16, 1, zlib.crc32(b"a")) + b"../precious"
        archive.writestr(info, b"1")
    refused(written.getvalue(), "second name")


# what is no archive


@pytest.mark.parametrize(
    "content", [b"", b"<?xml version='1.0'?><Error><Code>AccessDenied", b"BZh91AY", END, b"\xfd7zXZ\0"]
)
def test_what_is_no_archive_says_how_it_begins(content: bytes) -> None:
    refused(content, "no archive that can be read", InvalidFile)


def test_a_gzip_of_no_tar_is_refused() -> None:
    refused(gzip.compress(b"weights" * 1000), "no tar header", InvalidFile)


def test_an_archive_without_files_is_refused() -> None:
    refused(zip_of({"a/": b""}), "no files", InvalidFile)


def test_an_archive_of_another_kind_than_it_was_called_is_refused(tmp_path: Path) -> None:
    kinds: dict[Kind, bytes] = {"tar": tar_of(PLAIN), "tar.gz": gzipped_tar_of(PLAIN), "zip": zip_of(PLAIN)}
    for kind, archive in kinds.items():
        for said in kinds:
            into = tmp_path / f"{kind}-{said}"
            into.mkdir()
            if said == kind:
                assert extract_stream(Body(archive), into, kind=said).kind == kind
            else:
                with pytest.raises(InvalidFile, match=f"should be {said}, and is {kind}"):
                    extract_stream(Body(archive), into, kind=said)


def test_an_error_of_the_stream_comes_through_and_a_full_folder_keeps_its_files(tmp_path: Path) -> None:
    class Broken:
        def read(self, size: int, /) -> bytes:
            raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        extract_stream(Broken(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("mine")
    with pytest.raises(LorakitError, match=r"adapter_config\.json"):
        extract_stream(Body(tar_of(PLAIN)), tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer: int, block: bytes | memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(archive_members, "write_all", full)
    with pytest.raises(OutOfSpace, match="no space left"):
        extract_stream(Body(gzipped_tar_of(PLAIN)), tmp_path)
