"""Where adapters may be loaded from, when somebody asks for that over HTTP."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import Refused
from lorakit.server.access.rights import Rights
from lorakit.server.settings import Settings


def permitted(settings: Settings, source: str, rights: Rights) -> Path:
    """A folder under one of the server's roots, links followed. It touches the disk.

    What lies under `--root` is there for every admin; runs and adapters that are served from where they are, for those
    who see all of them: under another name, one could be called by whoever may not.

    Raises:
        Refused: it is anywhere else, or no local path at all.
    """
    if "://" in source or "\0" in source:
        raise Refused(f"'{source.partition('?')[0]}' is no local folder: fetch it first (lorakit fetch), then load it")
    folder = Path(source)
    roots = settings.allowed_roots if rights.sees_all else settings.shared_roots
    closed = () if rights.sees_all else settings.served_folders
    try:
        resolved = folder.resolve()
    except (OSError, RuntimeError):
        raise Refused(f"'{source}' can't be resolved") from None
    is_inside = any(resolved.is_relative_to(root) for root in roots)
    # nor what any of it lies in, as a run's folder may be loaded as a whole
    is_closed = any(resolved.is_relative_to(one) or one.is_relative_to(resolved) for one in closed)
    if not folder.is_absolute() or not is_inside or is_closed:
        shown = ", ".join(f"'{root}'" for root in roots) or "none"
        raise Refused(
            f"'{source}' is not under a folder that this server loads from ({shown}): start it with --root FOLDER"
        )
    return resolved
