"""Folders on the Hugging Face Hub, fetched into its own cache."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import InvalidFile, LorakitError, NotFound, OutOfSpace, UsageError
from lorakit.files.addresses import without_queries, without_secrets

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@(?!.*\.\.)[\w./-]+)?$")


def looks_like_hub_id(reference: str) -> bool:
    """Whether `reference` could be `name`, `owner/name`, or one of them with `@revision`."""
    return _ID.match(reference) is not None


def hub_folder(reference: str, *, what: str, patterns: Sequence[str]) -> Path:
    """The local copy of a repository's files that match `patterns`; downloads what the cache lacks.

    Raises:
        NotFound: the name is no hub id, the hub has none of that name, or it can't be reached.
    """
    if not looks_like_hub_id(reference):
        raise NotFound(f"there is no {what} folder '{without_secrets(reference)}'")
    from huggingface_hub import snapshot_download

    log_no_queries()
    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        raise NotFound(f"there is no {what} '{reference}': no such folder; the hub: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return "it has none of that name, or none that you may read"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "it can't be reached, and nothing of that name is in the cache"
    said = str(getattr(error, "server_message", None) or error).strip()
    return without_queries(said.splitlines()[0]) if said else type(error).__name__


def log_no_queries() -> None:
    """What huggingface_hub says of its tries may hold the signed addresses that the hub leads to."""
    logging.getLogger("huggingface_hub.utils._http").addFilter(_without_queries)  # once, however often


def _without_queries(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_queries(record.getMessage()), ()
    return True


class NoSuchFile(NotFound):
    """The repository is there, and has no file of that name."""


class HubFiles:
    """Single files of one repository, by huggingface_hub's own session: its endpoint, proxies and login hold here."""

    def __init__(self, reference: str) -> None:
        self.name = reference.partition("@")[0]
        log_no_queries()

    @staticmethod
    def can_read_parts() -> bool:
        """huggingface_hub has sessions that stream an answer from 1.0 on."""
        from huggingface_hub.utils import get_session

        return callable(getattr(get_session(), "stream", None))

    def part(self, file: str, commit: str, first: int, count: int) -> tuple[bytes, int]:
        """At most `count` bytes of a file from `first` on, and the size of the whole file.

        Raises:
            NoSuchFile: the hub has none of that name.
            NotFound: the hub can't be reached.
            InvalidFile: the hub's answer does not say how large the file is.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.name, file, revision=commit)
        # as they are: a compressed answer has offsets of its own
        wanted = {"range": f"bytes={first}-{first + count - 1}", "accept-encoding": "identity"}
        session: Any = get_session()
        got = bytearray()
        try:
            with session.stream("GET", url, headers={**build_hf_headers(), **wanted}, timeout=30) as answer:
                hf_raise_for_status(answer)
                whole = answer.headers.get("content-range", "").rpartition("/")[2] if answer.status_code == 206 else ""
                size = whole or answer.headers.get("content-length", "")
                skipped = 0 if answer.status_code == 206 else first  # a server without ranges sends the whole
                for block in answer.iter_bytes():
                    got += block
                    if len(got) >= skipped + count:
                        break
        except EntryNotFoundError:
            raise NoSuchFile(f"'{self.name}' on the hub has no file '{file}'") from None
        except Exception as error:  # those of the HTTP client have no base in common with huggingface_hub's
            raise NotFound(f"'{file}' of '{self.name}' can't be read: the hub: {_reason(error)}") from None
        if not size.isdecimal():
            raise InvalidFile(f"the hub does not say how large '{file}' of '{self.name}' is")
        return bytes(got[skipped : skipped + count]), int(size)

    def download(self, file: str, commit: str) -> Path:
        """The file in the cache.

        Raises:
            NotFound: it is not there, and the hub can't be reached or has no such file.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import HF_HUB_CACHE

        try:
            return Path(hf_hub_download(self.name, file, revision=commit))
        except Exception as error:  # as above
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfSpace(
                    f"no space left for '{file}' of '{self.name}' in the cache '{HF_HUB_CACHE}': free some space, or "
                    f"set HF_HUB_CACHE to another place"
                ) from error
            raise NotFound(f"'{file}' of '{self.name}' could not be downloaded: {_reason(error)}") from None


def ensure_pushable(repository: str) -> None:
    """Raises UsageError when nothing could be pushed there: before the work that is to be pushed."""
    from huggingface_hub import get_token

    ensure_repository_name(repository)
    if get_token() is None:
        raise UsageError(f"nobody is logged in who could push to '{repository}': run `hf auth login`, or set HF_TOKEN")


def ensure_repository_name(repository: str) -> None:
    """Raises UsageError when a repository can't be called so."""
    if "@" in repository or not looks_like_hub_id(repository):
        raise UsageError(
            f"'{without_secrets(repository)}' is no name of a repository on the hub: write it as owner/name"
        )


def push_folder(folder: Path, repository: str, *, private: bool, message: str, leave: Sequence[str] = ()) -> str:
    """Upload a folder into a repository, made if need be, with huggingface_hub's own login; its address.

    Raises:
        LorakitError: the hub refused, or can't be reached. The folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=message, ignore_patterns=list(leave) or None
        )
    except Exception as error:  # as above
        raise LorakitError(
            f"'{folder}' is whole, but was not pushed to '{repository}': the hub: {_reason(error)}; push it again with "
            f"`hf upload {repository} {folder}`"
        ) from None
    return str(made)
