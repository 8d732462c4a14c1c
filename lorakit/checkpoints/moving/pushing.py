"""`lorakit push`: a checkpoint onto the Hub in one commit, with a card, without what only its trainer needs."""

from __future__ import annotations

import re
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.locate import checkpoint_folder
from lorakit.checkpoints.metadata import Metadata
from lorakit.checkpoints.moving.addresses import hub_address
from lorakit.checkpoints.moving.card import CARD, checkpoint_card, is_persons_own
from lorakit.checkpoints.moving.described import described
from lorakit.checkpoints.moving.hub import commit_files, ensure_repository, own_card
from lorakit.checkpoints.moving.stored import ensure_intact, is_done
from lorakit.checkpoints.moving.trees import LocalFile, ensure_finished, files_of, steady
from lorakit.errors import NotFound, Refused, UsageError
from lorakit.files.archive_bytes import GZIP
from lorakit.files.digests import file_digest
from lorakit.files.hub import ensure_pushable, ensure_repository_name

_PICKLES = re.compile(
    r".*\.(bin|pt|pth|th|pt2|pkl|pickle|ckpt|distcp|joblib|np[yz])|.*/?\.metadata|pytorch_model_fsdp.*", re.IGNORECASE
)
_PIECE = 512  # bytes of a file that tell what it is
_TRAINERS = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states)[._-].*|global_step\d+/.*|latest|zero_.*")
_PICKLED = re.compile(rb"\x80[\x02-\x08]", re.DOTALL)  # how a pickle begins, of protocol 2 and later
_NOBODYS = re.compile(r"lorakit\..*|(.*/)?\.(?!gitattributes$).*|(.*/)?__pycache__/.*")  # ours, and hidden ones


@dataclass(frozen=True, slots=True)
class Pushed:
    """What is on the hub now, or would be: `left_out` names files with the reason; `url` is the commit's, None before.

    `card` is "made", "own" where the checkpoint has one, "theirs" where the repository has one that a person wrote, or
    "none" in a folder of a repository, whose card is the repository's.
    """

    repository: str
    checkpoint: Metadata
    files: tuple[str, ...]
    bytes: int
    left_out: dict[str, str]
    card: str
    url: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "repository": self.repository, "url": self.url, "files": list(self.files), "bytes": self.bytes,
            "left_out": self.left_out, "card": self.card, "checkpoint": self.checkpoint.as_dict(),
        }  # fmt: skip


def push(
    reference: str,
    repository: str,
    *,
    private: bool = False,
    create: bool = False,
    message: str | None = None,
    everything: bool = False,
    unfinished: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Push a checkpoint: a folder, a file, a run's newest, or a name in the store.

    Args:
        create: Make the repository where there is none; `private` makes it a private one.
        everything: Also pickles and what only a trainer needs.

    Raises:
        NotFound: there is no such checkpoint; or no such repository, and none shall be made.
        Refused: it holds pickles alone.
        Incomplete: it is not finished, or was written to meanwhile.
        UsageError: that is no name of a repository, or nobody is logged in.
        LorakitError: the hub refused, or can't be reached. Nothing is changed there.
    """
    if private and not create:
        raise UsageError("--private is for a new repository: add --create")
    address = hub_address(repository)
    name, below = address.path, f"{address.below}/" if address.below else ""
    ensure_repository_name(name)
    source = checkpoint_folder(reference)
    done = is_done(source)
    if dry_run:
        ensure_finished(look_at(source), str(source), unfinished=unfinished or done)
        return _prepared(source, name, below, everything)[0]
    ensure_pushable(name)
    with steady(lambda: look_at(source), str(source), unfinished=unfinished or done):
        pushed, files = _prepared(source, name, below, everything)
        contents: dict[str, Path | bytes] = {f"{below}{file.name}": file.path for file in files}
        ensure_repository(name, create=create, private=private)
        card = pushed.card
        if card == "made":
            theirs = own_card(name)
            card = "theirs" if theirs is not None and is_persons_own(theirs) else "made"
        if card == "made":
            contents[CARD] = checkpoint_card(source, pushed.checkpoint, name).encode()
        for file in files:  # what is sent is what was looked at
            file.ensure_unchanged()
        if done:
            ensure_intact(source, {file.name: file_digest(file.path) for file in files_of(source)})
    url = commit_files(name, contents, message or _message(pushed.checkpoint))
    return Pushed(name, pushed.checkpoint, tuple(contents), pushed.bytes, pushed.left_out, card, url)


def _prepared(source: Path, name: str, below: str, everything: bool) -> tuple[Pushed, list[LocalFile]]:
    files, left_out = chosen(files_of(source), everything=everything)
    if (
        not any(file.name != CARD and file.name.endswith((".safetensors", ".gguf")) for file in files)
        and not everything
    ):
        raise Refused(
            f"'{source}' holds no safetensors: pickles are not pushed, as whoever loads one runs what is in it; "
            f"lorakit convert '{source}' --out DIR writes safetensors, and --all pushes it as it is"
        )
    own = next((file for file in files if file.name == CARD), None)
    kept = own is not None and is_persons_own(own.path.read_text(encoding="utf-8", errors="replace"))
    files = [file for file in files if kept or file.name != CARD]
    checkpoint = described(source, with_digest=True)
    card = "own" if kept else "none" if below else "made"
    names = tuple(f"{below}{file.name}" for file in files) + ((CARD,) if card == "made" else ())
    size = sum(file.size for file in files)
    return Pushed(name, checkpoint, names, size, left_out, card), files


def chosen(files: list[LocalFile], *, everything: bool) -> tuple[list[LocalFile], dict[str, str]]:
    """What is pushed, and why the rest is not."""
    pushed, left_out = [], {}
    for file in files:
        reason = _reason_against(file, everything)
        if reason:
            left_out[file.name] = reason
        else:
            pushed.append(file)
    if not pushed:
        raise NotFound("nothing is left to be pushed: --all pushes every file")
    return pushed, left_out


def _reason_against(file: LocalFile, everything: bool) -> str:
    if _NOBODYS.fullmatch(file.name):
        return "of this machine alone"
    if everything:
        return ""
    if _TRAINERS.fullmatch(file.name):
        return "only its trainer needs it"
    return "a pickle" if _PICKLES.fullmatch(file.name) or _holds_pickle(file) else ""


def _holds_pickle(file: LocalFile) -> bool:
    """By its first bytes, whatever its name: bare, in gzip, or in a zip file as torch and NumPy write them."""
    with open(file.opened(), "rb") as stream:
        beginning = stream.read(_PIECE)
    if beginning.startswith(b"\x1f\x8b"):
        with suppress(zlib.error):
            beginning = zlib.decompressobj(GZIP).decompress(beginning, _PIECE)
    if beginning.startswith(b"PK\x03\x04"):
        return _holds_pickled_member(file.path)
    return _PICKLED.match(beginning) is not None


def _holds_pickled_member(file: Path) -> bool:
    """What can't be read as a zip file may be one to others."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.lower().endswith((".pkl", ".pickle", ".npy")) for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return True


def _message(checkpoint: Metadata) -> str:
    step = "" if checkpoint.step is None else f" at step {checkpoint.step}"
    loss = "" if checkpoint.metric("eval_loss") is None else f", eval_loss {checkpoint.eval_loss:.4g}"
    return f"{'Adapter' if checkpoint.kind == 'adapter' else 'Checkpoint'}{step}{loss}"
