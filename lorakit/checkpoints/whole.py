"""Is one file whole in itself? By its structure: a safetensors header, the end of a zip, JSON that parses."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lorakit.adapters.config import parse_config
from lorakit.checkpoints.places import Entry, Place, entry_of, within
from lorakit.errors import InvalidFile
from lorakit.files.folders import MAX_JSON, parse_json
from lorakit.files.safetensors import MAX_HEADER, Header, parse_header

TORCH = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".lora")
_HEAD = 1 << 16  # bytes that are read first: most headers fit in
_ZIP_START, _ZIP_END, _ZIP64_AT, _ZIP64_END = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_ZIP_TAIL = 98  # bytes: the record at the end, and the two that a large zip has before it


def what_is_cut_short(place: Place, name: str) -> str | None:
    """Why this file is not whole, beginning with its name; None when nothing shows that it isn't.

    Raises:
        OSError: it can't be read.
    """
    entry = entry_of(place, name)
    if entry is None:
        return f"{name} is not there yet"
    if entry.is_folder:
        return f"{name} is a folder, not a file"
    holder, last = within(place, name)
    if last.endswith(".safetensors"):
        return _in_safetensors(holder, last, name, entry)
    if last.endswith(TORCH):
        return _in_torch_file(holder, last, name, entry)
    if last.endswith(".index.json") or last in ("config.json", "adapter_config.json"):
        return _in_json(holder, last, name)
    return None


def header_in(place: Place, name: str) -> Header:
    """Raises OSError, and InvalidFile when it is cut short, or isn't safetensors."""
    holder, last = within(place, name)
    entry = holder.entries.get(last)
    size = entry.size if entry else 0
    head = holder.read(last, 0, _HEAD)
    if len(head) < 8:
        raise InvalidFile(f"{name}: cut short: {size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER:
        raise InvalidFile(f"{name}: no safetensors file: it claims a header of {length} bytes")
    if 8 + length > size:
        raise InvalidFile(f"{name}: cut short: {size} bytes are there, and its header alone takes {8 + length}")
    raw = head[8 : 8 + length] if len(head) >= 8 + length else holder.read(last, 8, length)
    if (whole := _whole_size(raw)) is not None and size < whole:
        raise InvalidFile(f"{name}: {progress(size, whole)}")
    return parse_header(Path(name), raw, size)


def _in_safetensors(holder: Place, last: str, name: str, entry: Entry) -> str | None:
    try:
        header_in(holder, last)
    except InvalidFile as error:
        return str(error).replace(last, name, 1)
    return None


def _whole_size(raw: bytes) -> int | None:
    """Bytes of the finished file, by its header; None when that says nothing."""
    try:
        entries = json.loads(raw)
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return 8 + len(raw) + max(ends, default=0)


def progress(there: int, whole: int) -> str:
    """`4.1 of 83.9 MB`: in the unit of the whole, or the next in which the two differ."""
    for scale, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if whole >= scale and f"{there / scale:.1f}" != f"{whole / scale:.1f}":
            return f"{there / scale:.1f} of {whole / scale:.1f} {unit}"
    return f"{there} of {whole} bytes"


def _in_torch_file(holder: Place, last: str, name: str, entry: Entry) -> str | None:
    """A zip has its directory at its end. An older pickle shows its end to nobody who does not run it."""
    head = holder.read(last, 0, 16)
    if not head.strip(b"\0") or (len(head) < 4 and _ZIP_START.startswith(head)):
        return f"{name}: cut short" if entry.size else f"{name}: cut short, it is empty"
    if not head.startswith(_ZIP_START):
        return None
    tail = holder.read(last, max(0, entry.size - _ZIP_TAIL), _ZIP_TAIL)
    return None if _ends_as_zip(tail, entry.size) else f"{name}: cut short"


def _ends_as_zip(tail: bytes, size: int) -> bool:
    """Whether `tail`, the end of a file of `size` bytes, is the end of a zip's directory (APPNOTE 4.3.14 to 4.3.16).

    torch.save puts no comment behind it, and the 64 bit record before it.
    """
    record = tail[-22:]
    if len(record) < 22 or not record.startswith(_ZIP_END):
        return False
    length, offset, comment = struct.unpack("<IIH", record[12:])
    locator = tail[-42:-22]
    if locator.startswith(_ZIP64_AT):
        (at,) = struct.unpack("<Q", locator[8:16])
        return bool(at == size - 98 and tail[-98:].startswith(_ZIP64_END))
    return bool(comment == 0 and offset + length == size - 22)


def _in_json(holder: Place, last: str, name: str) -> str | None:
    try:
        said = read_object(holder, last)
    except InvalidFile as error:
        return str(error).replace(last, name, 1)
    if last.endswith(".index.json") and not _shards(said):
        return f"{name} has no weight_map"
    if last == "adapter_config.json":
        try:
            parse_config(said, Path(name))
        except InvalidFile as error:
            return str(error)
    return None


def read_object(place: Place, name: str) -> dict[str, Any]:
    """A JSON object. Raises OSError, and InvalidFile when it is none, or not wholly there."""
    holder, last = within(place, name)
    try:
        said = parse_json(holder.read(last, 0, MAX_JSON + 1))
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{name} can't be read as JSON: {error}") from None
    if not isinstance(said, dict):
        raise InvalidFile(f"{name} holds no JSON object")
    return said


def shards_of(place: Place, index: str) -> tuple[str, ...]:
    """The files that an index names, in order; none while it can't be read. Raises OSError."""
    try:
        return _shards(read_object(place, index))
    except InvalidFile:
        return ()


def _shards(index: dict[str, Any]) -> tuple[str, ...]:
    """Names that lead out of the folder are none of its shards."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        return ()
    return tuple(sorted({name for name in shards.values() if ".." not in name.split("/") and not name.startswith("/")}))
