"""The writers of checkpoints that are known, one module each; the first that knows a place as its own has it."""

from __future__ import annotations

from lorakit.checkpoints.places import Place
from lorakit.checkpoints.writers import (
    accelerate,
    dcp,
    deepspeed,
    folder,
    fsdp_ranks,
    litgpt,
    torch_file,
    torchtune,
    transformers,
)
from lorakit.checkpoints.writers.layout import Layout, Writer

WRITERS: tuple[Writer, ...] = (
    transformers, torchtune, litgpt, accelerate, deepspeed, dcp, fsdp_ranks, folder, torch_file
)  # fmt: skip


def folder_written_by(place: Place) -> Layout | None:
    """What a folder is as one checkpoint; None where it may be a run of files that are one each. Raises OSError."""
    layouts = (writer.layout(place) for writer in WRITERS if writer is not torch_file)
    return next(filter(None, layouts), None)


def written_by(place: Place) -> tuple[Writer, Layout] | None:
    """Whose work a place is, and what is there; None when nobody's that is known. Raises OSError."""
    writers = (torch_file,) if place.is_file else WRITERS
    for writer in writers:
        found = writer.layout(place)
        if found is not None:
            return writer, found
    return None
