"""Pickles are hostile until shown otherwise: each attack is one test. Nothing runs, and nothing is imported."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InvalidFile, Refused
from lorakit.files import pickle_values, pickles, torch_zip
from lorakit.files.pickle_values import Stub
from lorakit.files.torch_file import is_cut_short, is_torch_file, read_pickle_with_stubs, read_torch_file

NEVER_IMPORTED = "antigravity"  # opens a browser when it is
PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that exists once an attack has run."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists()
    assert NEVER_IMPORTED not in sys.modules


class Reduced:
    """Pickles as a call of whatever is given."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.call


def torch_file(folder: Path, program: bytes, **storages: bytes) -> Path:
    """A file with that program in the place of the one that torch.save would have written."""
    file = folder / "it.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("it/data.pkl", program)
        archive.writestr("it/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"it/data/{key.removeprefix('_')}", content)
        archive.writestr("it/version", "3\n")
    return file


def read(folder: Path, program: bytes, **storages: bytes) -> Any:
    return read_torch_file(torch_file(folder, program, **storages))


def called(module: str, name: str, *args: Any) -> bytes:
    """A program that calls any global, whether there is one or not."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(args, 2)[2:-1] + b"R."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


@PROTOCOLS
def test_a_call_of_the_shell_is_a_stub(tmp_path: Path, canary: Path, protocol: int) -> None:
    program = pickle.dumps({"state_dict": Reduced(os.system, (f"touch {canary}",))}, protocol)
    found = read(tmp_path, program)["state_dict"]
    assert (found.name, found.args) == ("posix.system", (f"touch {canary}",))
    assert not canary.exists()
    pickle.loads(program)  # the same program does run where Python reads it
    canary.unlink()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("builtins", "eval"), ("builtins", "exec"), ("__builtin__", "eval"), ("builtins", "getattr"),
        ("builtins", "__import__"), ("builtins", "open"), ("subprocess", "Popen"), ("functools", "partial"),
        ("operator", "attrgetter"), ("importlib", "import_module"), ("runpy", "run_path"), ("pickle", "loads"),
        ("torch", "load"), ("torch.hub", "load"), ("torch", "hub.load"), ("torch", "ops.load_library"),
        ("torch.jit", "load"), ("torch.storage", "_load_from_bytes"), ("torch._utils", "_import_dotted_name"),
        ("torch.utils.cpp_extension", "load_inline"), ("numpy.f2py", "compile"), ("webbrowser", "open"),
        ("numpy.core.multiarray", "_reconstruct"), ("sys", "exit"), ("os", "_exit"), ("ctypes", "CDLL"),
        (NEVER_IMPORTED, "geohash"),
        ("lorakit.files.torch_file", "_rebuild_tensor_v2"), ("../../evil", "run"), ("", ""), ("os.path", "../system"),
        ("collections", "OrderedDict.fromkeys"), ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.Tensor", "__class__"), ("ö", "\u202e"), ("builtins", "bytes.fromhex"),
    ],
)  # fmt: skip
def test_a_name_is_a_name_however_dangerous(tmp_path: Path, canary: Path, module: str, name: str) -> None:
    command = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    found = read(tmp_path, called(module, name, command))
    assert isinstance(found, Stub)
    assert found.args == (command,)
    spelled = b"\x80\x04" + text(module) + text(name) + b"\x93" + text(command) + b"\x85R."
    assert read(tmp_path, spelled).name == found.name


def test_a_stub_that_is_called_built_and_filled_does_nothing(tmp_path: Path, canary: Path) -> None:
    program = (
        b"\x80\x02cos\nsystem\n)\x81" + text(f"touch {canary}") + b"b"  # __setstate__
        + text("key") + text("value") + b"s" + text("element") + b"a."  # __setitem__, append
    )  # fmt: skip
    found = read(tmp_path, program)
    assert (found.state, found.entries, found.elements) == (f"touch {canary}", [("key", "value")], ["element"])
    with pytest.raises(InvalidFile, match="which is no name"):  # what one call gave can't be called again
        read(tmp_path, b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R" + text(f"touch {canary}") + b"\x85R.")


@pytest.mark.parametrize(
    "name", ["_reconstruct", "_reconstructor", "__newobj__", "__newobj_ex__", "_rebuild_from_type_v2", "setattr"]
)
def test_a_call_through_what_python_pickles_with_is_none(tmp_path: Path, canary: Path, name: str) -> None:
    for module in ("copyreg", "copy_reg", "numpy.core.multiarray", "torch._tensor", "builtins"):
        inner = b"cos\nsystem\n" + text(f"touch {canary}") + b"\x85"
        read(tmp_path, b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + inner + b"NtR.")


def test_the_state_of_a_known_call_is_not_called_either(tmp_path: Path, canary: Path) -> None:
    evil = Reduced(os.system, (f"touch {canary}",))
    for call in (torch.Size, set, complex, bytearray):
        with pytest.raises(InvalidFile, match="does not fit"):
            read(tmp_path, pickle.dumps(Reduced(call, (evil,)), 2))


def test_a_tensor_that_rebuilds_by_another_function_is_a_stub(tmp_path: Path, canary: Path) -> None:
    program = (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n"
        + text(f"touch {canary}") + b"\x85NtR."
    )  # fmt: skip
    assert isinstance(read(tmp_path, program), Stub)


def test_rebuilding_in_a_row_ends(tmp_path: Path) -> None:
    """_rebuild_from_type_v2 of itself, of itself, and so on."""
    name = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    args = (b"(" + name + b"ctorch\nTensor\n") * 20_000 + b")" + b"Nt" * 20_000
    with pytest.raises(Refused, match="nested deeper"):
        read(tmp_path, b"\x80\x02" + name + args + b"R.")


@pytest.mark.parametrize(
    "code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"P/etc/passwd\n", b"ios\nsystem\n"]
)
def test_opcodes_that_reach_outside_are_refused(tmp_path: Path, canary: Path, code: bytes) -> None:
    with pytest.raises(Refused, match="opcode"):
        read(tmp_path, b"\x80\x02(" + text(f"touch {canary}") + code + b".")


@pytest.mark.parametrize(
    "key", ["../../../../etc/passwd", "/etc/passwd", "..\\..\\it", "data/0", "", "0\0", "../version"]
)
def test_a_persistent_id_that_is_a_path_is_a_storage_that_is_missing(tmp_path: Path, key: str) -> None:
    program = b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K\x01tQ."
    with pytest.raises(InvalidFile, match="lacks 'data/"):
        read(tmp_path, program, _0=b"\0\0\0\0")


@pytest.mark.parametrize(
    "identity",
    [
        "/etc/passwd", ("storage",), ("module", "x", "/etc/passwd", "source"), ("storage", "Float", "0", "cpu", 1),
        ("storage", Reduced(os.getcwd, ()), "0", "cpu", -1), ("storage", Reduced(os.getcwd, ()), 0.0, "cpu", 1), 7,
        None,
    ],
)  # fmt: skip
def test_a_persistent_id_of_another_kind_is_refused(tmp_path: Path, identity: Any) -> None:
    with pytest.raises(InvalidFile, match="persistent id is none"):
        read(tmp_path, pickle.dumps(identity, 2)[:-1] + b"Q.", _0=b"\0\0\0\0")


def test_a_plain_pickle_has_no_persistent_ids(tmp_path: Path) -> None:
    file = tmp_path / ".metadata"
    file.write_bytes(b"\x80\x02N.")
    assert read_pickle_with_stubs(file) is None
    file.write_bytes(b"\x80\x02NQ.")
    with pytest.raises(Refused, match="outside of its pickle"):
        read_pickle_with_stubs(file)


@pytest.mark.parametrize(
    "start",
    [
        b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x8e\x00\x00\x00\x00\xff\x00\x00\x00", b"X\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x96" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff",
        b"T\xff\xff\xff\xff", b"\x95" + b"\xff" * 8,
    ],
)  # fmt: skip
def test_a_length_that_is_not_there_takes_no_memory(tmp_path: Path, start: bytes) -> None:
    file = torch_file(tmp_path, b"\x80\x04" + start + b"abc.")
    tracemalloc.start()
    with pytest.raises(InvalidFile):
        read_torch_file(file)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_memo_far_away_takes_no_memory(tmp_path: Path) -> None:
    file = torch_file(tmp_path, b"\x80\x02]r\xff\xff\xff\xffj\xff\xff\xff\xff0.")
    tracemalloc.start()
    assert read_torch_file(file) == []
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["lists", "marks", "tuples", "dicts"])
def test_deep_nesting_ends_in_an_error(tmp_path: Path, kind: str) -> None:
    depth = 100_000
    program = {
        "lists": b"]" * depth + b"a" * (depth - 1),
        "marks": b"(" * depth + b"t" * depth,
        "tuples": b")" + b"\x85" * depth,
        "dicts": b"}" + b"K\x00}" * depth + b"s" * depth,
    }[kind]
    with pytest.raises(Refused, match="nested deeper"):
        read(tmp_path, b"\x80\x02" + program + b".")


def test_a_tuple_that_is_endless_to_hash_is_no_key(tmp_path: Path) -> None:
    doubled = b")" + b"q\x000h\x00h\x00\x86" * 100
    for program in (b"}" + doubled + b"K\x01s", b"\x8f(" + doubled + b"\x90", b"(" + doubled + b"\x91"):
        with pytest.raises(InvalidFile, match="a key is"):
            read(tmp_path, b"\x80\x04" + program + b".")
    pairs = b"ccollections\nOrderedDict\n](" + b"(" + doubled + b"K\x01te\x85R"
    with pytest.raises(InvalidFile, match="a key is"):
        read(tmp_path, b"\x80\x04" + pairs + b".")


def test_keys_that_take_long_to_hash_are_counted_over_the_whole_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of a thousand times the same tuple, again and again."""
    monkeypatch.setattr(pickle_values, "MAX_LOOKED_AT", 150_000)
    names = b"(" + b"(" + b"N" * 90 + b"tq\x00" + b"h\x00" * 999 + b"lq\x01"
    for call in (b"cbuiltins\nset\nh\x01\x85R0", b"cbuiltins\nfrozenset\nh\x01\x85R0"):
        assert len(read(tmp_path, b"\x80\x02" + names + call + b".")) == 1000
        with pytest.raises(InvalidFile, match="too long to hash"):
            read(tmp_path, b"\x80\x02" + names + call * 2 + b".")
    put = b"}(" + b"h\x00N" * 1000 + b"u0"
    assert len(read(tmp_path, b"\x80\x02" + names + put + b".")) == 1000
    with pytest.raises(InvalidFile, match="too long to hash"):
        read(tmp_path, b"\x80\x02" + names + put * 2 + b".")


def test_keys_that_were_made_to_hash_alike_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compared with all before it, so a dict of them takes the square of their number."""
    monkeypatch.setattr(pickle_values, "MAX_ALIKE", 50)
    alike = {i * sys.hash_info.modulus: None for i in range(60)}
    with pytest.raises(InvalidFile, match="too long to hash"):
        read(tmp_path, pickle.dumps(alike, 2))
    usual = {(i, j): None for i in range(-6, 6) for j in range(-1, 2)}
    assert read(tmp_path, pickle.dumps([usual] * 20, 2))[0] == usual


def test_what_many_stubs_share_is_counted_at_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_values, "MAX_ELEMENTS", 5000)
    shared = b"}(" + b"".join(b"K" + bytes([i]) + b"N" for i in range(100)) + b"uq\x000"
    stub = b"cmine\nIt\n)Rh\x00b"
    assert len(read(tmp_path, b"\x80\x02" + shared + b"(" + stub * 10 + b"t.")) == 10
    with pytest.raises(Refused, match="more than 5,000 values"):
        read(tmp_path, b"\x80\x02" + shared + b"(" + stub * 50 + b"t.")


@pytest.mark.parametrize("name", ["it.pt", ".metadata"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    pipe = tmp_path / name
    os.mkfifo(pipe)
    assert not is_torch_file(pipe)
    for read_it in (read_torch_file, read_pickle_with_stubs, is_cut_short):
        with pytest.raises(InvalidFile, match="a pipe or a device"):
            read_it(pipe)


def test_a_list_of_the_same_lists_is_no_billion(tmp_path: Path) -> None:
    """Ten of ten of ten …: 10^40 elements in 1 kB."""
    program = b"]" + b"q\x000](" + b"h\x00" * 10 + b"e"
    for _ in range(39):
        program += b"q\x000](" + b"h\x00" * 10 + b"e"
    with pytest.raises(Refused, match="again and again"):
        read(tmp_path, b"\x80\x02" + program + b".")


@pytest.mark.parametrize("limit", ["MAX_STEPS", "MAX_BYTES"])
def test_what_a_pickle_may_do_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    program = pickle.dumps([{"a": [float(i)] * 3} for i in range(100)], 2)
    assert len(read(tmp_path, program)) == 100
    monkeypatch.setattr(pickles, limit, 500)
    with pytest.raises(Refused, match=r"is not read|more than 500"):
        read(tmp_path, program)


def test_copies_of_copies_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_once = b"\x80\x02" + text("x" * 1000) + b"q\x000(" + b"c_codecs\nencode\nh\x00\x85R" * 100 + b"t."
    assert len(read(tmp_path, text_once)) == 100
    monkeypatch.setattr(pickles, "MAX_BYTES", 50_000)
    with pytest.raises(Refused, match="copies more than"):
        read(tmp_path, text_once)


def test_what_is_walked_through_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_values, "MAX_ELEMENTS", 50)
    with pytest.raises(Refused, match="more than 50 values"):
        read(tmp_path, pickle.dumps(list(range(60)), 2))


def test_a_number_of_a_million_digits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="a number has"):
        read(tmp_path, pickle.dumps(1 << 4_000_000, 2))


def tensor(shape: str, stride: str, offset: int = 0, count: int = 4) -> bytes:
    """A program for a tensor of float32 in storage 0; shape and stride as Python writes them."""
    storage = (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + pickle.dumps(count, 2)[2:-1]
        + b"tQ"
    )
    numbers = b"".join(pickle.dumps(one, 2)[2:-1] for one in (offset, eval(shape), eval(stride)))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89}tR."


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ("(5,)", "(1,)", 0), ("(4,)", "(1,)", 1), ("(2,)", "(4,)", 0), ("(4,)", "(-1,)", 3), ("(-4,)", "(1,)", 0),
        ("(4,)", "(1,)", -1), ("(1 << 62,)", "(1,)", 0), ("(4,)", "(1 << 70,)", 0), ("(4,)", "(1, 1)", 0),
        ("'ab'", "(1, 1)", 0), ("(2.0,)", "(1,)", 0), ("(True,)", "(1,)", 0), ("4", "1", 0),
        ("(1,) * 100", "(1,) * 100", 0), ("(1 << 62, 4)", "(0, 0)", 0), ("(0, 1 << 62)", "(1, 1)", 0),
    ],
)  # fmt: skip
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(
    tmp_path: Path, shape: str, stride: str, offset: int
) -> None:
    assert read(tmp_path, tensor("(4,)", "(1,)"), _0=bytes(16)).shape == (4,)
    with pytest.raises(InvalidFile, match="does not fit"):
        read(tmp_path, tensor(shape, stride, offset), _0=bytes(16))


@pytest.mark.parametrize("size", [0, 15, 17, 4000])
def test_a_storage_of_another_size_than_its_tensors_say_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidFile, match=f"storage '0' has {size} bytes"):
        read(tmp_path, tensor("(4,)", "(1,)"), _0=bytes(size))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["it/data.pkl", "it/data/0"])
def test_a_name_that_stands_twice_is_refused(tmp_path: Path, name: str) -> None:
    file = torch_file(tmp_path, tensor("(4,)", "(1,)"), _0=bytes(16))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, b"x" * 16)
    with pytest.raises(Refused, match="twice"):
        read_torch_file(file)


@pytest.mark.parametrize("name", ["../data.pkl", "/etc/cron.d/evil", "other/data/0", "it\\data\\0", ".."])
def test_members_elsewhere_are_refused_and_written_nowhere(tmp_path: Path, name: str) -> None:
    file = torch_file(tmp_path, tensor("(4,)", "(1,)"), _0=bytes(16))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(InvalidFile, match="not one that torch"):
        read_torch_file(file)
    assert [path.name for path in tmp_path.iterdir()] == ["it.pt"]


def test_a_name_with_dots_inside_of_the_folder_means_nothing(tmp_path: Path) -> None:
    file = torch_file(tmp_path, tensor("(4,)", "(1,)"), _0=bytes(16))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("it/../../canary", b"x")
    assert read_torch_file(file).shape == (4,)
    assert [path.name for path in tmp_path.iterdir()] == ["it.pt"]


def patched(folder: Path, change: Callable[[bytearray, int], None]) -> Path:
    """A file whose directory lies about the member `it/data/0`; `change` gets all bytes, and where its entry begins."""
    file = torch_file(folder, tensor("(4,)", "(1,)"), _0=bytes(16))
    content = bytearray(file.read_bytes())
    change(content, content.rindex(b"it/data/0") - 46)
    file.write_bytes(content)
    return file


def put(layout: str, at: int, *values: int) -> Callable[[bytearray, int], None]:
    return lambda content, entry: struct.pack_into(layout, content, entry + at, *values)


@pytest.mark.parametrize(
    "change",
    [
        put("<II", 20, 1 << 30, 1 << 30), put("<I", 24, 17), put("<I", 42, 0xFFFF_FFF0), put("<I", 42, 3),
        put("<H", 10, 8), put("<H", 8, 1), put("<H", 28, 0xFFFF), put("<H", 30, 0xFFFF),
        put("<II", 20, 0xFFFF_FFFF, 0xFFFF_FFFF), put("<I", 0, 0),
    ],
    ids=[
        "huge", "packed to less", "beyond the end", "elsewhere", "deflated", "encrypted", "endless name",
        "endless extra", "zip64 without its field", "no signature",
    ],
)  # fmt: skip
def test_a_directory_that_lies_is_refused(tmp_path: Path, change: Callable[[bytearray, int], None]) -> None:
    with pytest.raises(Refused):
        read_torch_file(patched(tmp_path, change))


def test_a_packed_file_is_refused_with_its_cure(tmp_path: Path) -> None:
    """Small on disk, and as large as you like in memory."""
    file = tmp_path / "bomb.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("it/data.pkl", b"\x80\x02" + b"]0" * 5_000_000 + b"N.")
    with pytest.raises(Refused, match=r"packed or encrypted.*save it again"):
        read_torch_file(file)


def test_a_directory_larger_than_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "MAX_DIRECTORY", 100)
    with pytest.raises(Refused, match="directory of"):
        read_torch_file(torch_file(tmp_path, b"\x80\x02N."))


@given(data=st.data())
def test_any_change_to_a_file_gives_a_value_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    file = folder / "it.pt"
    new = data.draw(st.booleans())
    torch.save({"w": torch.ones(3), "o": [1, "a"]}, file, _use_new_zipfile_serialization=new)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(Refused):
        read_torch_file(file)
    assert is_torch_file(file) in (True, False)
    assert is_cut_short(file) in (True, False)


def row(*pickled: Any, rest: bytes = b"") -> bytes:
    """A file as of before torch 1.6."""
    written = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, *pickled):
        written.write(value if isinstance(value, bytes) else pickle.dumps(value, 2))
    return written.getvalue() + rest


def test_the_old_format_runs_nothing_either(tmp_path: Path, canary: Path) -> None:
    evil = Reduced(os.system, (f"touch {canary}",))
    file = tmp_path / "old.pt"
    file.write_bytes(row({"w": evil}, []))
    assert read_torch_file(file)["w"].name == "posix.system"
    module = pickle.dumps(("module", evil, str(canary), "import os"), 2)[:-1] + b"Q."
    file.write_bytes(row(module, []))
    assert isinstance(read_torch_file(file), Stub)


def test_the_old_format_lies_in_vain(tmp_path: Path) -> None:
    file = tmp_path / "old.pt"
    program = tensor("(4,)", "(1,)")
    for keys, rest, error in (
        (["0"], struct.pack("<q", 4) + bytes(16), None),
        (["0"], struct.pack("<q", 4) + bytes(15), "cut short"),
        (["0"], struct.pack("<q", 1 << 60) + bytes(16), "another size"),
        (["0"], b"", "cut short"),
        ([], struct.pack("<q", 4) + bytes(16), "not those"),
        (["0", "1"], struct.pack("<q", 4) + bytes(16), "not those"),
        ([["0"]], b"", "not those"),
        ("0", b"", "not those"),
    ):
        file.write_bytes(row(program, keys, rest=rest))
        if error is None:
            assert read_torch_file(file).shape == (4,)
            continue
        with pytest.raises(InvalidFile, match=error):
            read_torch_file(file)
