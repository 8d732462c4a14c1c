"""A pickle as plain containers, numbers and text, without running it.

A pickle is a program for a stack machine (opcodes: Python's Lib/pickletools.py), and what makes it dangerous is that it
imports by name and calls. The machine here does neither: a global is a `Stub`, which remembers its name; to call one
gives another `Stub`, which remembers what with. A few calls have a meaning that is known beforehand (`plain_calls`, and
what the caller adds): these are functions of lorakit's, found in a table, never in a module.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.errors import InvalidFile, Refused
from lorakit.files.pickle_values import Call, Damaged, Keys, Stub, ensure_walkable, plain_calls
from lorakit.files.regular import opened

MAX_BYTES = 1 << 28  # of one pickle; and of what its calls copy
ENTRY = 64  # bytes, as which an element of a container counts that is copied
MAX_STEPS = 10_000_000  # opcodes
MAX_NAME = 1000  # letters
MAX_NUMBER = 64  # bytes

Persistent = Callable[[Any], Any]


def read_pickle_with_stubs(file: Path) -> Any:
    """The structure of a plain pickle, such as torch.distributed.checkpoint's `.metadata`.

    Raises:
        NotFound: there is no such file.
        InvalidFile: it is cut short, or no pickle.
        Refused: it is larger or deeper than what is read, or of an unsupported kind.
    """
    with opened(file) as stream:
        return read_pickle(stream, os.fstat(stream.fileno()).st_size, str(file))


def read_pickle(
    stream: BinaryIO,
    size: int,
    name: str,
    calls: Mapping[str, Call] | None = None,
    persistent: Persistent | None = None,
) -> Any:
    """The structure of the pickle that begins where `stream` stands and has `size` bytes at most.

    Plain containers hold no circles, and may be walked through recursively; a `Stub` may hold itself. What else a dict
    carries, as the `_metadata` of a state dict, is left out.

    Args:
        name: what errors call the file.
        calls: what calling a global gives, by its name; beside `plain_calls`.
        persistent: what a persistent id stands for.

    Raises:
        InvalidFile, Refused: as `read_pickle_with_stubs`.
    """
    machine = _Machine(stream, size, name, calls or {}, persistent)
    try:
        found = machine.run()
    except Damaged as error:
        raise InvalidFile(f"'{name}' holds a pickle that is damaged: {error}") from None
    except MemoryError:
        raise Refused(f"'{name}' needs more memory than there is") from None
    ensure_walkable(found, name)
    return found


class _Machine:
    def __init__(
        self, stream: BinaryIO, size: int, name: str, calls: Mapping[str, Call], persistent: Persistent | None
    ) -> None:
        self._stream = stream
        self._left = min(size, MAX_BYTES)
        self._limited = size > MAX_BYTES
        self._name = name
        self._keys = Keys()
        self._calls = {**plain_calls(self._keys), **calls}
        self._persistent = persistent
        self._copied = 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        steps = 0
        while (code := self.take(1)) != b".":
            steps += 1
            step = _STEPS.get(code)
            if step is None:
                raise Refused(
                    f"'{self._name}' holds the pickle opcode {code!r}, which torch.save writes nowhere: it is not read "
                    f"further; load it where you trust it, and save it again with torch.save or as safetensors"
                )
            if steps > MAX_STEPS:
                raise Refused(f"'{self._name}' holds a pickle of more than {MAX_STEPS:,} steps: it is not read further")
            step(self)
        if len(self._stack) != 1 or self._marked:
            raise Damaged("it ends in the middle")
        return self._stack.pop()

    def take(self, count: int) -> bytes:
        if count > self._left:
            if self._limited:
                raise Refused(f"'{self._name}' holds a pickle of more than {MAX_BYTES >> 20} MB: it is not read")
            raise InvalidFile(f"'{self._name}' is cut short, or no pickle: it ends where {count} bytes have to follow")
        self._left -= count
        found = self._stream.read(count)
        if len(found) != count:
            raise InvalidFile(f"'{self._name}' became shorter while it was read")
        return found

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def counted(self, layout: str) -> bytes:
        count: int = self.number(layout)
        if count < 0:
            raise Damaged("a length is negative")
        return self.take(count)

    def line(self) -> str:
        line = self._stream.readline(min(self._left, MAX_NAME))
        if not line.endswith(b"\n"):
            if len(line) == self._left:
                self.take(len(line) + 1)
            raise Damaged(f"a name is longer than {MAX_NAME} bytes")
        self._left -= len(line)
        return _text(line[:-1])

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack:
            raise Damaged("its stack is empty where a value is needed")
        return self._stack.pop()

    def top(self) -> Any:
        if not self._stack:
            raise Damaged("its stack is empty where a value is needed")
        return self._stack[-1]

    def since_mark(self) -> list[Any]:
        if not self._marked:
            raise Damaged("a mark is missing")
        found, self._stack = self._stack, self._marked.pop()
        return found

    # From here on a method is what the opcode of that name in pickletools does.

    def proto(self) -> None:
        version = self.take(1)[0]
        if version > 5:
            raise Refused(f"'{self._name}' is a pickle of protocol {version}: only those up to 5 are read")

    def frame(self) -> None:
        self.take(8)

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def discard(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.since_mark()

    def discard_to_mark(self) -> None:
        self.since_mark()

    def string(self, layout: str) -> None:
        """What Python 2 called `str`."""
        raw = self.counted(layout)
        self.push(raw.decode("ascii") if raw.isascii() else raw)

    def long(self, layout: str) -> None:
        raw = self.counted(layout)
        if len(raw) > MAX_NUMBER:
            raise Damaged(f"a number has {len(raw)} bytes")
        self.push(int.from_bytes(raw, "little", signed=True))

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise Damaged("its stack is empty where a value is needed")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def dict_of(self) -> None:
        pairs = self.since_mark()
        self.push({})
        self._put_entries(pairs)

    def frozenset_of(self) -> None:
        self.push(frozenset(map(self._keys.checked, self.since_mark())))

    def setitem(self) -> None:
        value, key = self.pop(), self.pop()
        self._put_entries([key, value])

    def setitems(self) -> None:
        self._put_entries(self.since_mark())

    def _put_entries(self, pairs: Sequence[Any]) -> None:
        target = self.top()
        if len(pairs) % 2:
            raise Damaged("a key has no value")
        entries = zip(pairs[::2], pairs[1::2], strict=True)
        if isinstance(target, Stub):
            target.entries.extend(entries)
        elif isinstance(target, dict):
            target.update((self._keys.checked(key), value) for key, value in entries)
        else:
            raise Damaged(f"entries are put into a {type(target).__name__}")

    def append(self) -> None:
        self._put_elements([self.pop()])

    def appends(self) -> None:
        self._put_elements(self.since_mark())

    def _put_elements(self, elements: Sequence[Any]) -> None:
        target = self.top()
        if isinstance(target, Stub):
            target.elements.extend(elements)
        elif isinstance(target, list):
            target.extend(elements)
        elif isinstance(target, set):
            target.update(map(self._keys.checked, elements))
        else:
            raise Damaged(f"elements are put into a {type(target).__name__}")

    def get(self, layout: str) -> None:
        place = self.number(layout)
        if place not in self._memo:
            raise Damaged(f"it refers to value {place}, which it did not keep")
        self.push(self._memo[place])

    def put(self, layout: str) -> None:
        self._memo[self.number(layout)] = self.top()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self.top()

    def named(self) -> None:
        module, name = self.line(), self.line()
        self.push(_global(module, name))

    def stack_named(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(_global(module, name))

    def call(self) -> None:
        args, called = self.pop(), self.pop()
        self.push(self._called(called, args))

    def call_with_names(self) -> None:
        named, args, called = self.pop(), self.pop(), self.pop()
        made = self._called(called, args)
        if not (isinstance(named, dict) and isinstance(made, Stub)):
            raise Damaged("something that takes no named arguments is called with them")
        made.entries.extend(named.items())
        self.push(made)

    def _called(self, called: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise Damaged("arguments are no tuple")
        if not isinstance(called, Stub) or called.args is not None:
            raise Damaged(f"it calls a {type(called).__name__}, which is no name")
        known = self._calls.get(called.name)
        if known is None:
            return Stub(called.name, args)
        self._copied += sum(map(_length, args))
        if self._copied > MAX_BYTES:
            raise Refused(f"'{self._name}' holds a pickle that copies more than {MAX_BYTES >> 20} MB: it is not read")
        try:
            return known(*args)
        except (TypeError, ValueError) as error:
            raise Damaged(f"what it calls {called.name} with does not fit ({error})") from None

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Stub) and target.args is not None:
            target.state = state
        elif not isinstance(target, dict):
            raise Damaged(f"a {type(target).__name__} is given a state")

    def persistent(self) -> None:
        identity = self.pop()
        if self._persistent is None:
            raise Refused(f"'{self._name}' refers to values outside of its pickle, which nothing here can look up")
        self.push(self._persistent(identity))


def _length(arg: Any) -> int:
    """In bytes, about."""
    if isinstance(arg, str | bytes | bytearray):
        return len(arg)
    return ENTRY * len(arg) if isinstance(arg, list | tuple | dict | set | frozenset) else 0


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise Damaged("a text is not UTF-8") from None


def _global(module: Any, name: Any) -> Stub:
    """By its full name, as Python 3 has it."""
    if not (isinstance(module, str) and isinstance(name, str)) or len(module) + len(name) > MAX_NAME:
        raise Damaged("the name of a global is no text, or too long")
    return Stub(f"{_MODULES.get(module, module)}.{name}")


_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.proto,
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    b"0": _Machine.discard,
    b"1": _Machine.discard_to_mark,
    b"2": lambda machine: machine.push(machine.top()),
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"K": lambda machine: machine.push(machine.number("<B")),
    b"M": lambda machine: machine.push(machine.number("<H")),
    b"J": lambda machine: machine.push(machine.number("<i")),
    b"G": lambda machine: machine.push(machine.number(">d")),
    b"\x8a": lambda machine: machine.long("<B"),
    b"\x8b": lambda machine: machine.long("<i"),
    b"X": lambda machine: machine.push(_text(machine.counted("<I"))),
    b"\x8c": lambda machine: machine.push(_text(machine.counted("<B"))),
    b"\x8d": lambda machine: machine.push(_text(machine.counted("<Q"))),
    b"U": lambda machine: machine.string("<B"),
    b"T": lambda machine: machine.string("<i"),
    b"C": lambda machine: machine.push(machine.counted("<B")),
    b"B": lambda machine: machine.push(machine.counted("<I")),
    b"\x8e": lambda machine: machine.push(machine.counted("<Q")),
    b"\x96": lambda machine: machine.push(bytearray(machine.counted("<Q"))),
    b")": lambda machine: machine.push(()),
    b"t": lambda machine: machine.push(tuple(machine.since_mark())),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"]": lambda machine: machine.push([]),
    b"l": lambda machine: machine.push(machine.since_mark()),
    b"}": lambda machine: machine.push({}),
    b"d": _Machine.dict_of,
    b"\x8f": lambda machine: machine.push(set()),
    b"\x91": _Machine.frozenset_of,
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"\x90": _Machine.appends,
    b"s": _Machine.setitem,
    b"u": _Machine.setitems,
    b"h": lambda machine: machine.get("<B"),
    b"j": lambda machine: machine.get("<I"),
    b"q": lambda machine: machine.put("<B"),
    b"r": lambda machine: machine.put("<I"),
    b"\x94": _Machine.memoize,
    b"c": _Machine.named,
    b"\x93": _Machine.stack_named,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"\x92": _Machine.call_with_names,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
