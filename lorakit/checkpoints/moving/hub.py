"""Repositories on the Hugging Face Hub: one commit fetched whole, one commit pushed whole."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from lorakit.checkpoints.moving.addresses import Address
from lorakit.checkpoints.moving.trees import LocalFile
from lorakit.errors import InvalidFile, LorakitError, NotFound
from lorakit.files.addresses import without_queries
from lorakit.files.digests import file_digest
from lorakit.files.hub import hub_folder, log_no_queries

_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def snapshot(address: Address) -> Path:
    """The folder in huggingface_hub's cache that holds the files of one commit, all of them.

    Raises:
        NotFound: the hub has nothing of that name, or can't be reached and the cache has nothing either.
    """
    below = address.below
    with _bars_on_terminals_alone():
        folder = hub_folder(address.path, what="model", patterns=[f"{escape(address.below)}/*" if below else "*"])
    found = folder / below
    if not found.is_dir() or not any(found.iterdir()):
        raise NotFound(f"the repository '{address.path}' on the hub has no files in '{below or '.'}'")
    return found


def commit_of(folder: Path) -> str | None:
    """Of which commit a folder in the cache is."""
    above = next((path for path in (folder, *folder.parents) if path.parent.name == "snapshots"), None)
    return above.name if above is not None and _SHA1.fullmatch(above.name) else None


def hub_listing(address: Address) -> dict[str, int | None]:
    """Names and sizes of what would be fetched.

    Raises:
        NotFound: the hub has nothing of that name, no file there, or can't be reached.
    """
    from huggingface_hub import HfApi

    log_no_queries()
    name, _, revision = address.path.partition("@")
    try:
        files = HfApi().model_info(name, revision=revision or None, files_metadata=True).siblings or []
    except Exception as error:  # those of the HTTP client have no base in common with huggingface_hub's
        raise NotFound(f"there is no model '{address.path}': the hub: {_in_words(error)}") from None
    below = f"{address.below}/" if address.below else ""
    found = {file.rfilename.removeprefix(below): file.size for file in files if file.rfilename.startswith(below)}
    if not found:
        raise NotFound(f"the repository '{address.path}' on the hub has no files in '{address.below or '.'}'")
    return found


def ensure_as_on_hub(files: Sequence[LocalFile], folder: Path) -> None:
    """Hold copies against the names of the blobs that they are of: SHA-256, or git's SHA-1 for small files.

    Raises:
        InvalidFile: one is damaged.
    """
    for file in files:
        blob, copy = file.path.name, folder / file.name
        if _SHA256.fullmatch(blob):
            same = file_digest(copy) == blob
        elif _SHA1.fullmatch(blob):
            content = copy.read_bytes()
            head = b"blob %d\0" % len(content)
            same = hashlib.sha1(head + content, usedforsecurity=False).hexdigest() == blob
        else:  # a cache without links keeps no names of blobs
            continue
        if not same:
            raise InvalidFile(f"'{file.name}' is damaged in the hub's cache: remove '{file.path}', and fetch it again")


def ensure_repository(name: str, *, create: bool, private: bool) -> None:
    """Raises NotFound when it is not there and shall not be made; LorakitError when the hub refuses."""
    from huggingface_hub import HfApi

    log_no_queries()
    api = HfApi()
    try:
        if create:
            api.create_repo(name, private=private or None, exist_ok=True)
            return
        there = api.repo_exists(name)
    except Exception as error:  # as above
        raise LorakitError(f"'{name}' can't be pushed to: the hub: {_in_words(error)}") from None
    if not there:
        raise NotFound(f"there is no repository '{name}' on the hub, or none that you may see: --create makes it")


def own_card(name: str) -> str | None:
    """The card that the repository has; None when it has none."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if not api.file_exists(name, "README.md"):
            return None
        return Path(api.hf_hub_download(name, "README.md")).read_text(encoding="utf-8", errors="replace")
    except Exception as error:  # as above
        raise LorakitError(f"'{name}' can't be read: the hub: {_in_words(error)}") from None


def commit_files(name: str, files: Mapping[str, Path | bytes], message: str) -> str:
    """Put files into a repository, in one commit: its address.

    Raises:
        LorakitError: the hub refused, or can't be reached. Nothing is changed there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
    try:
        with _bars_on_terminals_alone():
            done: Any = HfApi().create_commit(name, operations, commit_message=message)
    except Exception as error:  # as above
        raise LorakitError(f"nothing was pushed to '{name}': the hub: {_in_words(error)}; try again") from None
    return str(done.commit_url)


@contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _in_words(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return "it has none of that name, or none that you may read"
    if isinstance(error, OfflineModeIsEnabled):
        return "it can't be reached (HF_HUB_OFFLINE is set)"
    said = str(getattr(error, "server_message", None) or error).strip()
    return without_queries(said.splitlines()[0]) if said else type(error).__name__
