"""What a pickle may give: plain containers, numbers, text, and stubs of everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from lorakit.errors import Refused

MAX_ELEMENTS = 20_000_000  # what stands at several places is counted at each
MAX_NESTING = 200
MAX_KEY = 100  # values in one key of a dict
MAX_LOOKED_AT = 5_000_000  # values in all keys of a pickle
MAX_ALIKE = 10_000  # keys that hash as another one: beside -1 and -2, which do, only made ones are that many

Call = Callable[..., Any]


class Damaged(ValueError):
    """What a pickle does can't be done: a function among `calls` may raise it, too. Comes out as InvalidFile."""


@dataclass(slots=True, eq=False)
class Stub:
    """Something that a pickle names, and that is not made here.

    `args` is None for the global itself, and what it would have been called with where it would have been called.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    elements: list[Any] = field(default_factory=list)
    entries: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes that it would have had, as far as its state names them."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        named = [part for part in parts if isinstance(part, dict)]
        return {key: value for part in named for key, value in part.items() if isinstance(key, str)}

    def __repr__(self) -> str:
        return f"Stub({self.name!r})"


class Keys:
    """What hashing the keys of one pickle has cost: a set of tuples of tuples is small to write and endless to hash."""

    def __init__(self) -> None:
        self._looked_at = 0
        self._alike = 0
        self._first: dict[int, Any] = {}

    def checked(self, value: Any) -> Any:
        """Itself, when hashing it is cheap.

        Raises:
            Damaged: it is no key, or a large one; or one too many.
        """
        waiting, seen = [value], 0
        while waiting:
            seen += 1
            one = waiting.pop()
            if isinstance(one, tuple | frozenset) and seen + len(waiting) + len(one) <= MAX_KEY:
                waiting.extend(one)
            elif not isinstance(one, str | bytes | int | float | complex | Stub | None):
                raise Damaged(f"a key is a {type(one).__name__}, or too large")
        self._looked_at += seen
        if not isinstance(value, str | bytes | Stub | None):  # those hash by chance
            self._alike += self._first.setdefault(hash(value), value) != value
        if self._looked_at > MAX_LOOKED_AT or self._alike > MAX_ALIKE:
            raise Damaged("its keys would take too long to hash")
        return value


def ensure_walkable(root: Any, name: str) -> None:
    """Raises Refused where plain containers are nested too deep, hold themselves, or are endless to walk through."""
    sizes: dict[int, tuple[int, int]] = {}  # of containers that are done: elements below, and how deep they nest
    roots: list[Any] = [(root,)]
    stubs: set[int] = set()
    total = 0
    for one in roots:  # grows by what the stubs hold
        path = [_Walk(one)]
        while path:
            walk = path[-1]
            entered = _step(walk, sizes, stubs, roots)
            if entered is not None:
                path.append(entered)
            else:
                path.pop()
                sizes[id(walk.container)] = walk.elements, walk.nesting
                if path:
                    path[-1].take(walk.elements, walk.nesting)
            if len(path) + walk.nesting > MAX_NESTING:
                raise Refused(f"'{name}' holds containers nested deeper than {MAX_NESTING}, or in a circle: refused")
            if total + walk.elements > MAX_ELEMENTS:
                raise Refused(
                    f"'{name}' holds more than {MAX_ELEMENTS:,} values, most of them again and again: refused"
                )
        total += walk.elements


class _Walk:
    """A container, and how far a walk through it has come."""

    __slots__ = ("container", "elements", "nesting", "rest")

    def __init__(self, container: Any) -> None:
        self.container = container
        self.rest = chain(container, container.values()) if isinstance(container, dict) else iter(container)
        self.elements = 1
        self.nesting = 0

    def take(self, elements: int, nesting: int) -> None:
        self.elements += elements
        self.nesting = max(self.nesting, nesting + 1)


def _step(walk: _Walk, sizes: Mapping[int, tuple[int, int]], stubs: set[int], roots: list[Any]) -> _Walk | None:
    """Go on to the next container that was not walked through; None at the end."""
    for element in walk.rest:
        walk.elements += 1
        if isinstance(element, Stub):
            if id(element) not in stubs:
                stubs.add(id(element))
                roots.append((element.args, element.state, element.elements, element.entries))
        elif isinstance(element, list | tuple | dict | set | frozenset):
            if id(element) not in sizes:
                return _Walk(element)
            walk.take(*sizes[id(element)])
    return None


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise TypeError("it is no text in latin-1")
    return text.encode("latin-1")


def _bytes(content: Any = b"", encoding: Any = None) -> bytes:
    if isinstance(content, bytes) and encoding is None:
        return content
    return _encoded(content, encoding)


def _dict(keys: Keys, pairs: Any = ()) -> dict[Any, Any]:
    if isinstance(pairs, dict):
        return dict(pairs)
    if not isinstance(pairs, list | tuple):
        raise TypeError("these are no pairs")
    return {keys.checked(key): value for key, value in pairs}


def _set(keys: Keys, elements: Any = ()) -> set[Any]:
    if not isinstance(elements, list | tuple):
        raise TypeError("these are no elements")
    return set(map(keys.checked, elements))


def _complex(real: Any, imaginary: Any) -> complex:
    if not (isinstance(real, float | int) and isinstance(imaginary, float | int)):
        raise TypeError("these are no numbers")
    return complex(real, imaginary)


def _instance(made: Any, base: Any, state: Any) -> Stub:
    if not isinstance(made, Stub):
        raise TypeError("it is no class")
    return Stub(made.name, () if state is None else (state,))


def plain_calls(keys: Keys) -> dict[str, Call]:
    """What plain values are pickled as: calls by name."""
    return {
        "collections.OrderedDict": partial(_dict, keys),
        "collections.defaultdict": lambda factory=None: {},
        "collections.Counter": partial(_dict, keys),
        "builtins.set": partial(_set, keys),
        "builtins.frozenset": lambda elements=(): frozenset(_set(keys, elements)),
        "builtins.bytes": _bytes,
        "builtins.bytearray": lambda content=b"", encoding=None: bytearray(_bytes(content, encoding)),
        "builtins.complex": _complex,
        "_codecs.encode": _encoded,
        "copyreg._reconstructor": _instance,
        "torch.Size": lambda sizes=(): tuple(sizes),
    }
