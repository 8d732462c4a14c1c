"""A header is either right or refused; nothing else can come of bytes, whatever they are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorakit.errors import InvalidFile, NotFound
from lorakit.files.safetensors import DTYPE_BITS, planned_header, read_header


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_header_says_where_each_tensor_stands(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.arange(4, dtype="int64")}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert header.metadata == {"format": "pt"}
    for name, stored in header.tensors.items():
        assert stored.shape == tensors[name].shape
        assert content[stored.start : stored.end] == tensors[name].tobytes()
        assert stored.nbytes == tensors[name].nbytes


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no file"):
        read_header(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cut short"),
        (b"\x00\x00\x00", "cut short"),
        (raw({}, length=1 << 60), "claims a header of"),
        (raw({}, length=100), "its header alone takes 108"),
        (raw(b"{"), "can't be parsed"),
        (raw(b"\xff\xfe"), "can't be parsed"),
        (raw(b"[" * 100_000), "can't be parsed"),
        (raw([]), "no JSON object"),
        (raw({"a": 1}), "lacks dtype, shape or data_offsets"),
        (raw({"a": {"dtype": "U8", "shape": [1]}}), "lacks dtype"),
        (raw({"a": entry(0, 1, dtype="X9")}, b"1"), "unknown dtype 'X9'"),
        (raw({"a": {**entry(0, 1), "dtype": ["U8"]}}, b"1"), "dtype"),
        (raw({"a": entry(0, 1, [1.0])}, b"1"), "no whole numbers"),
        (raw({"a": entry(0, 1, [True])}, b"1"), "no whole numbers"),
        (raw({"a": entry(0, 1, [-1])}, b"1"), "no whole numbers"),
        (raw({"a": {**entry(0, 1), "data_offsets": [0, "1"]}}, b"1"), "no whole numbers"),
        (raw({"a": {**entry(0, 1), "shape": 1}}, b"1"), "no whole numbers"),
        (raw({"a": entry(0, 4, [2])}, b"1234"), "takes 4 bytes, but U8 \\[2\\] needs 2"),
        (raw({"a": entry(0, 1, [1], "F4")}, b"1"), "takes 1 bytes"),
        (raw({"a": entry(0, 2), "b": entry(1, 3)}, b"123"), "leaves a hole or overlaps"),
        (raw({"a": entry(0, 1), "b": entry(2, 3)}, b"123"), "leaves a hole or overlaps"),
        (raw({"a": entry(1, 2)}, b"12"), "leaves a hole or overlaps"),
        (raw({"a": entry(0, 4)}, b"12"), "cut short"),
        (raw({"a": entry(0, 1)}, b"12"), "holds 1 bytes that no tensor covers"),
        (raw({"__metadata__": {"a": 1}}), "metadata"),
        (raw({"__metadata__": [1]}), "metadata"),
        (raw(b'{"a": {}, "a": {}}'), "stands twice"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InvalidFile, match=reason):
        read_header(tmp_path / "x.safetensors")


def read_or_refused(file: Path) -> bool:
    try:
        read_header(file)
    except InvalidFile:
        return False
    return True


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)).map(list) | JSON,
    },
)


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    read_or_refused(tmp_path / "x")


@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRIES | JSON, max_size=4), st.integers(0, 40))
def test_any_header_is_read_or_refused_and_never_taken_where_the_reference_refuses(
    tmp_path: Path, header: dict[str, Any], size: int
) -> None:
    (tmp_path / "x").write_bytes(raw(header, b"1" * size))
    if read_or_refused(tmp_path / "x"):
        try:
            with safe_open(tmp_path / "x", "numpy"):
                pass
        except SafetensorError as error:
            raise AssertionError(f"the reference refuses it: {error}") from None


@given(st.data())
def test_a_changed_byte_or_a_cut_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    good = raw({"a": entry(0, 4), "b": entry(4, 8, [2], "F16")}, b"12345678")
    place = data.draw(st.integers(0, len(good) - 1))
    bad = good[:place] + bytes([data.draw(st.integers(0, 255))]) + good[place + 1 :]
    (tmp_path / "x").write_bytes(bad[: data.draw(st.integers(0, len(bad)))])
    read_or_refused(tmp_path / "x")


PLANS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(["U8", "F32", "BF16", "I64"]), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
    max_size=5,
)


@given(PLANS, st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
def test_a_planned_header_is_what_is_read_back(
    tmp_path: Path, plan: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    head, planned = planned_header(tmp_path / "x", [(name, *rest) for name, rest in plan.items()], metadata)
    (tmp_path / "x").write_bytes(head + b"\0" * (planned.size - len(head)))
    assert read_header(tmp_path / "x") == planned
    assert planned.data_start % 8 == 0
    with safe_open(tmp_path / "x", "numpy") as reference:
        assert set(reference.keys()) == set(plan)
