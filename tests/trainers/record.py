"""In which order each trainer opens, writes, renames and closes its files, as strace sees it: orders.json beside this.

python -m tests.trainers.record [PROGRAM]...        once for each new version of a trainer; wants strace

One event is [what, name] or [what, name, other name], names relative to the run's folder; temporary names are numbered
in the order they come. Of a run's checkpoints the two that were there in the end and came last are kept.
  folder   a folder was made            open     a file was made, or emptied
  size     given its size, all zeros    write    some of it, one or several times in a row
  rename   within the run               appear   renamed into the run from elsewhere, whole
  close    after writing                remove   a file or folder
  link     a symbolic link, and what it points at
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.trainers import expected
from tests.trainers.expected import EVERYDAY
from tests.trainers.written import PROGRAMS, SLOW, run

ORDERS = Path(__file__).with_name("orders.json")
CALLS = (
    "openat,creat,write,writev,pwrite64,sendfile,copy_file_range,ftruncate,rename,renameat,renameat2,unlink,unlinkat,"
    "rmdir,mkdir,symlink,symlinkat,close"
)
TRACING = ("strace", "--seccomp-bpf", "-f", "-y", "-qq", "-s", "0", "-e", "signal=none", "-e", f"trace={CALLS}")
Event = tuple[str, ...]

_LINE = re.compile(r"(?P<pid>\d+)\s+(?P<rest>.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+)(?:<(?P<path>[^>]*)>)?.*")
_QUOTED = re.compile(r'"([^"]*)"')
_OPENED = re.compile(r"\b\d+<([^>]*)>")
_TEMPORARY = re.compile(r"\.tmp\w{6}|tmp\w{8}")
_MEASURED = re.compile(r"(?<=val_loss=)[\d.]+(?=\.ckpt)")


def completed(lines: Iterable[str]) -> Iterator[re.Match[str]]:
    """The calls that succeeded, each when it returned; strace cuts a line in two when another thread comes between."""
    begun: dict[str, str] = {}
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        rest = found["rest"]
        if rest.endswith("<unfinished ...>"):
            begun[found["pid"]] = rest.removesuffix("<unfinished ...>")
            continue
        if _RESUMED.match(rest):
            rest = begun.pop(found["pid"], "") + _RESUMED.sub("", rest, count=1)
        call = _CALL.fullmatch(rest)
        if call is not None and int(call["result"]) >= 0:
            yield call


def events_of(call: re.Match[str], inside: str) -> Event | None:
    """What a call did below the folder `inside`, with whole paths; None if nothing."""
    name, arguments = call["name"], call["arguments"]
    quoted, opened = _QUOTED.findall(arguments), _OPENED.findall(arguments)
    if name in ("openat", "creat"):
        what = "open" if "O_TRUNC" in arguments or "O_CREAT" in arguments or name == "creat" else ""
        event: Event = (what, call["path"] or "")
    elif name in ("write", "writev", "pwrite64", "copy_file_range", "sendfile"):
        target = opened[-1] if name == "copy_file_range" else opened[0] if opened else ""
        event = ("write", target)
    elif name in ("ftruncate", "close"):
        event = ("size" if name == "ftruncate" else "close", opened[0] if opened else "")
    elif name.startswith("rename"):
        came = quoted[0].startswith(inside)
        event = ("rename", *quoted) if came else ("appear", quoted[1])
    elif name.startswith("symlink"):
        event = ("link", quoted[1], quoted[0])
    else:
        event = ("folder" if name == "mkdir" else "remove", quoted[0] if quoted else "")
    return event if event[0] and event[1].startswith(inside) else None


def order_of(calls: Iterable[re.Match[str]], run_folder: Path, kept: set[str]) -> list[Event]:
    """The events of one run, without what was opened to be read, and without checkpoints that are not `kept`."""
    inside, writable, order = f"{run_folder}/", set[str](), list[Event]()
    temporary: dict[str, str] = {}

    def relative(path: str) -> str:
        name = _MEASURED.sub("*", path.removeprefix(inside))
        last = name.rpartition("/")[2]
        if not _TEMPORARY.fullmatch(last):
            return name
        return name.removesuffix(last) + temporary.setdefault(name, f".tmp{len(temporary) + 1}")

    for call in calls:
        event = events_of(call, inside)
        if event is None:
            continue
        what, path, *others = event
        if what == "open":
            writable.add(path)
        if what == "rename" and path in writable:
            writable.add(others[0])
        if what in ("close", "write", "size") and path not in writable:
            continue
        if what == "close":
            writable.discard(path)
        named = (what, relative(path), *(relative(other) if what == "rename" else other for other in others))
        first = named[1].split("/")[0]
        if (first in kept or first.startswith(".tmp")) and (what != "write" or not order or order[-1] != named):
            order.append(named)
    return order


def kept_in(folder: Path) -> set[str]:
    """A run's own files, and its two newest checkpoints: what stands between is the same again."""
    inner = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
    return {path.name for path in inner[-2:]} | {
        _MEASURED.sub("*", path.name) for path in folder.iterdir() if not path.is_dir()
    }


def thinned(order: list[Event]) -> list[Event]:
    """Of the writes to one opened file the first two and the last two: two ranks may take turns a hundred times."""
    kept: set[int] = set()
    writes: dict[str, list[int]] = {}
    for number, event in enumerate([*order, *(("open", name) for name in {event[1] for event in order})]):
        if event[0] == "open":
            done = writes.pop(event[1], [])
            kept.update(done[:2] + done[-2:])
        elif event[0] == "write":
            writes.setdefault(event[1], []).append(number)
    return [event for number, event in enumerate(order) if event[0] != "write" or number in kept]


def recorded(name: str, base: Path, work: Path, *before: str) -> dict[str, list[Event]]:
    """The orders of a program's runs; `before` sets its environment."""
    out, log = work / "out", work / "strace.log"
    run((PROGRAMS | SLOW)[name], base, out, [*before, *TRACING, "-o", str(log)])
    calls = list(completed(log.read_text(errors="replace").splitlines()))
    folders = {each.name: out / each.name for each in (*EVERYDAY, *expected.SLOW) if each.program == name}
    return {
        each: [("folder", "."), *thinned(order_of(calls, folder, kept_in(folder)))] for each, folder in folders.items()
    }


def as_text(orders: dict[str, dict[str, list[Event]]]) -> str:
    """One event a line."""
    programs = []
    for name, runs in sorted(orders.items()):
        lines = [
            f'  "{each}": [\n   ' + ",\n   ".join(map(json.dumps, order)) + "\n  ]" for each, order in runs.items()
        ]
        programs.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(programs) + "\n}\n"


def main(names: list[str]) -> None:
    from tests.server.real import make_tiny_model

    orders = json.loads(ORDERS.read_text()) if ORDERS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        base = make_tiny_model(Path(folder) / "base")
        for name in names or [*PROGRAMS, *SLOW]:
            work = Path(tempfile.mkdtemp(dir=folder))
            orders[name] = recorded(name, base, work)
            if name == "lightning_fit":  # it writes into TMPDIR first, and from another file system that is no rename
                with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
                    work = Path(tempfile.mkdtemp(dir=folder))
                    orders[f"{name} elsewhere"] = recorded(name, base, work, "env", f"TMPDIR={elsewhere}")
            print(name, {run: len(order) for run, order in orders[name].items()}, file=sys.stderr)
    ORDERS.write_text(as_text(orders))


if __name__ == "__main__":
    main(sys.argv[1:])
