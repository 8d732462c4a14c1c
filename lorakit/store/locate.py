"""From what a person types to an adapter: a folder, a name in the store, a hub id, or `hub-id@revision`."""

from __future__ import annotations

from pathlib import Path

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.reading import load_adapter
from lorakit.errors import NotFound, Refused, UsageError
from lorakit.files.hub import hub_folder, looks_like_hub_id
from lorakit.store.catalog import Revision
from lorakit.store.names import split_model
from lorakit.store.store import bases_in, default_home, open_store

HUB_PATTERNS = ("adapter_*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


def open_adapter(reference: str) -> Adapter:
    """Open the adapter that `reference` names.

    Raises:
        NotFound: there is neither a folder, nor a name in the store, nor a hub repository of that name.
        Refused: it is a run, not an adapter; names its newest checkpoint.
        UsageError: the store has that name for several bases.
        Incomplete, InvalidFile: as `load_adapter`.
    """
    folder = Path(reference)
    if not folder.is_dir():
        revision = stored_revision(reference)
        if revision is not None:
            return load_adapter(revision.folder)
        if not looks_like_hub_id(reference):
            raise NotFound(f"there is no adapter folder '{reference}', and no such name in the store")
        return load_adapter(hub_folder(reference, what="adapter", patterns=HUB_PATTERNS))
    if not (folder / "adapter_config.json").is_file():
        newest = _newest_checkpoint(folder)
        if newest is not None:
            raise Refused(f"'{folder}' is a run, not an adapter: name one of its checkpoints; the newest is '{newest}'")
    return load_adapter(folder)


def stored_revision(reference: str, home: Path | None = None) -> Revision | None:
    """What a name such as `sql@best` or `sql@step-500` means in the store; None when it means nothing there.

    Raises:
        UsageError: it means different adapters for different bases.
    """
    home = home or default_home()
    name, selector = split_model(reference)
    found: dict[str, tuple[str, Revision]] = {}
    for base in bases_in(home):
        with open_store(home, base) as store:
            run = store.runs().get(name)
        revision = run.select(selector) if run else None
        if revision is not None:
            found.setdefault(revision.digest, (base, revision))
    if len(found) > 1:
        bases = ", ".join(f"'{base}'" for base, _ in found.values())
        raise UsageError(f"the store has '{reference}' for several bases ({bases}): give the folder instead")
    return next((revision for _, revision in found.values()), None)


def _newest_checkpoint(run: Path) -> Path | None:
    steps = {
        int(number): path
        for path in run.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdecimal() and (path / "adapter_config.json").is_file()
    }
    return steps[max(steps)] if steps else None
