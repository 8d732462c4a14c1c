"""From what a person types to an adapter: a folder, a hub id, or `hub-id@revision`."""

from __future__ import annotations

from pathlib import Path

from lorakit.adapters.adapter import Adapter, load_adapter
from lorakit.errors import NotFound, Refused
from lorakit.files.hub import hub_folder, looks_like_hub_id

HUB_PATTERNS = ("adapter_*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


def open_adapter(reference: str) -> Adapter:
    """Open the adapter that `reference` names.

    Raises:
        NotFound: there is neither a folder nor a hub repository of that name.
        Refused: it is a run, not an adapter; names its newest checkpoint.
        Incomplete, InvalidFile: as `load_adapter`.
    """
    folder = Path(reference)
    if not folder.is_dir():
        if not looks_like_hub_id(reference):
            raise NotFound(f"there is no adapter folder '{reference}'")
        return load_adapter(hub_folder(reference, what="adapter", patterns=HUB_PATTERNS))
    if not (folder / "adapter_config.json").is_file():
        newest = _newest_checkpoint(folder)
        if newest is not None:
            raise Refused(f"'{folder}' is a run, not an adapter: name one of its checkpoints; the newest is '{newest}'")
    return load_adapter(folder)


def _newest_checkpoint(run: Path) -> Path | None:
    steps = {
        int(number): path
        for path in run.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdecimal() and (path / "adapter_config.json").is_file()
    }
    return steps[max(steps)] if steps else None
