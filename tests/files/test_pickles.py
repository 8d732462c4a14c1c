"""Pickles as plain values: the same ones that Python gives, and stubs where Python would import."""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
from collections import Counter, OrderedDict, defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.pickle_values import Stub
from lorakit.files.pickles import read_pickle, read_pickle_with_stubs

PROTOCOLS = st.integers(2, 5)
KEYS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
VALUES = st.recursive(
    KEYS | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False) | st.binary().map(bytearray),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.sets(KEYS) | st.dictionaries(KEYS, inner),
    max_leaves=30,
)


class Settings:
    """As a training script has one: what a pickle calls by its name."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Names(list[str]):
    pass


def read(content: bytes) -> Any:
    return read_pickle(io.BytesIO(content), len(content), "it")


@settings(max_examples=200)
@given(value=VALUES, protocol=PROTOCOLS)
def test_plain_values_are_those_that_python_reads(value: Any, protocol: int) -> None:
    found = read(pickle.dumps(value, protocol))
    assert found == value
    assert type(found) is type(value)


@given(value=st.binary(max_size=60))
def test_any_bytes_are_a_value_or_an_error_of_ours(value: bytes) -> None:
    with contextlib.suppress(Refused):
        read(value)


@settings(max_examples=200)
@given(value=VALUES, protocol=PROTOCOLS, data=st.data())
def test_a_damaged_pickle_is_a_value_or_an_error_of_ours(value: Any, protocol: int, data: st.DataObject) -> None:
    content = bytearray(pickle.dumps(value, protocol))
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Refused):
        read(bytes(content))


@given(value=VALUES, protocol=PROTOCOLS)
def test_a_pickle_cut_anywhere_is_an_invalid_file(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    for size in range(len(content)):
        with pytest.raises(InvalidFile):
            read(content[:size])


@pytest.mark.parametrize("protocol", [2, 4])
def test_dicts_of_every_kind_are_dicts(protocol: int) -> None:
    counted = defaultdict(list, {"a": [1]})
    ordered = OrderedDict([("b", 1), ("a", 2)])
    found = read(pickle.dumps([counted, ordered, Counter("aab")], protocol))
    assert found == [counted, ordered, {"a": 2, "b": 1}]
    assert list(found[1]) == ["b", "a"]
    assert {type(one) for one in found} == {dict}


def test_an_attribute_of_a_dict_is_left_out() -> None:
    state = OrderedDict(a=1)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert read(pickle.dumps(state, 2)) == {"a": 1}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_everything_else_is_a_stub_that_remembers(protocol: int) -> None:
    names = Names(["q_proj"])
    names.source = "config"  # type: ignore[attr-defined]
    written = {"settings": Settings(lr=1e-4, names=names), "day": date(2024, 5, 6), "kind": Settings}
    found = read(pickle.dumps(written, protocol))
    assert isinstance(found["settings"], Stub)
    assert found["settings"].name == f"{__name__}.Settings"
    assert (found["kind"].name, found["kind"].args, found["kind"].fields) == (f"{__name__}.Settings", None, {})
    assert (found["day"].name, found["day"].args) == ("datetime.date", (date(2024, 5, 6).__reduce__()[1][0],))
    fields = found["settings"].fields
    assert (fields["lr"], fields["names"].elements) == (1e-4, ["q_proj"])
    assert fields["names"].fields == {"source": "config"}
    assert repr(found["settings"]) == f"Stub('{__name__}.Settings')"


def test_a_stub_may_hold_itself_and_a_plain_container_may_not() -> None:
    settings_ = Settings()
    settings_.me = [settings_]
    found = read(pickle.dumps(settings_))
    assert found.fields["me"] == [found]
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(Refused, match="in a circle"):
        read(pickle.dumps(circle))


def test_what_stands_at_two_places_is_one_value() -> None:
    shared = ["x"]
    first, second = read(pickle.dumps([shared, shared]))
    assert first is second


def test_a_text_of_python_2_is_text() -> None:
    assert read(b"\x80\x02U\x03abc.") == "abc"
    assert read(b"\x80\x02U\x02\xc3\xa4.") == b"\xc3\xa4"


def test_protocols_that_torch_never_wrote_are_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"opcode b'I'.*save it again"):
        read(pickle.dumps(3, 0))
    with pytest.raises(Refused, match="protocol 6"):
        read(b"\x80\x06.")


def test_every_opcode_of_protocols_2_to_5_is_known_or_refused(tmp_path: Path) -> None:
    for opcode in pickletools.opcodes:
        content = b"\x80\x04" + opcode.code.encode("latin-1")
        with pytest.raises(Refused) as raised:
            read(content)
        assert str(raised.value).startswith("'it' ")


def test_files_are_named_in_errors(tmp_path: Path) -> None:
    file = tmp_path / ".metadata"
    with pytest.raises(NotFound, match="no file"):
        read_pickle_with_stubs(file)
    file.write_bytes(pickle.dumps([1, 2])[:-1])
    with pytest.raises(InvalidFile, match=r"\.metadata' is cut short"):
        read_pickle_with_stubs(file)
    file.write_bytes(pickle.dumps([1, 2]))
    assert read_pickle_with_stubs(file) == [1, 2]
    with pytest.raises(InvalidFile, match="is a folder"):
        read_pickle_with_stubs(tmp_path)
