"""Folders on the Hugging Face Hub, fetched into its own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import NotFound

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")


def looks_like_hub_id(reference: str) -> bool:
    """Whether `reference` could be `name`, `owner/name`, or one of them with `@revision`."""
    return _ID.match(reference) is not None


def hub_folder(reference: str, *, what: str, patterns: Sequence[str]) -> Path:
    """The local copy of a repository's files that match `patterns`; downloads what the cache lacks.

    Raises:
        NotFound: the name is no hub id, the hub has none of that name, or it can't be reached.
    """
    if not looks_like_hub_id(reference):
        raise NotFound(f"there is no {what} folder '{reference}'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except RepositoryNotFoundError:
        reason = "it has none of that name, or none that you may read"
    except LocalEntryNotFoundError:
        reason = "it can't be reached, and nothing of that name is in the cache"
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise NotFound(f"there is no {what} '{reference}': no such folder; the hub: {reason}")
