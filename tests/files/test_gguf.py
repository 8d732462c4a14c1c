"""Heads of GGUF files that lie, and those that don't."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.gguf import read_gguf_header


def header(*parts: Any) -> bytes:
    """Numbers of 8 bytes, texts with their length, and bytes as they are."""
    made = b"GGUF" + struct.pack("<I", 3)
    for part in parts:
        if isinstance(part, int):
            made += struct.pack("<Q", part)
        elif isinstance(part, str):
            made += struct.pack("<Q", len(part)) + part.encode()
        else:
            made += part
    return made


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "another byte order"),
        (header(1 << 60, 0), "claims 1152921504606846976 entries"),
        (header(0, 1 << 60), "claims 1152921504606846976 entries"),
        (header(1 << 20, 0), "cut short"),
        (header(0, 1, 1 << 62), "cut short"),
        (header(0, 1, "a", struct.pack("<I", 77)), "unknown type 77"),
        (header(0, 1, "a", struct.pack("<IIQ", 9, 4, 1 << 62)), "cut short"),
        (header(0, 1, "a", struct.pack("<IIQ", 9, 8, 1 << 62)), "claims 4611686018427387904 entries"),
        (header(0, 1, "a", struct.pack("<IIQ", 9, 9, 1)), "array of the type 9"),
        (header(0, 2, "a", struct.pack("<IB", 0, 1), "a", struct.pack("<IB", 0, 1)), "'a' stands twice"),
        (header(0, 1, "general.alignment", struct.pack("<II", 4, 0)), "alignment is 0"),
        (header(1, 0, "t", struct.pack("<I", 1 << 31)), "has 2147483648 dimensions"),
        (header(1, 0, "t", struct.pack("<IQIQ", 1, 4, 0, 1 << 62)), "cut short: 't' would begin behind its end"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, refusal: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(Refused, match=refusal):
        read_gguf_header(tmp_path / "model.gguf")


def test_an_endless_header_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.gguf").open("wb") as stream:
        stream.write(header(0, 1, "a", struct.pack("<IIQ", 9, 4, 1 << 30)))
        stream.truncate(1 << 40)
    with pytest.raises(InvalidFile, match="header of more than 256 MB"):
        read_gguf_header(tmp_path / "model.gguf")


def test_values_lengths_and_places_are_read(tmp_path: Path) -> None:
    texts = header(2, 4, "general.architecture", u32(8), "llama", "llama.block_count", u32(4, 7), "odd", u32(7), b"\1",
                   "tokens", u32(9, 8), 2, "a", "bc")[4:]  # fmt: skip
    places = header("one", u32(2), 4, 3, u32(0), 0, "two", u32(1), 5, u32(1), 64)[8:]
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + texts + places + bytes(500))
    found = read_gguf_header(tmp_path / "model.gguf")
    assert (found.architecture, found.number("block_count"), found.number("none")) == ("llama", 7, None)
    assert (found.values["odd"], found.lengths) == (True, {"tokens": 2})
    one, two = found.tensors.values()
    assert (one.shape, one.kind, two.shape, two.kind, two.start - one.start) == ((3, 4), 0, (5,), 1, 64)
    assert one.start % 32 == 0


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGML and more")
    with pytest.raises(InvalidFile, match="is no GGUF file"):
        read_gguf_header(tmp_path / "model.gguf")
    with pytest.raises(NotFound):
        read_gguf_header(tmp_path / "none.gguf")
