"""A folder in Hugging Face's layout that names no trainer: what PEFT or transformers saved, or lorakit wrote."""

from __future__ import annotations

from lorakit.checkpoints.places import Place
from lorakit.checkpoints.writers.layout import LastWord, Layout, WriterName, parts, plain_files
from lorakit.checkpoints.writers.model_files import model_files
from lorakit.files.provenance import FILE as PROVENANCE


def layout(place: Place) -> Layout | None:
    model = model_files(place)
    if model.kind is None:
        return None
    writer: WriterName = "peft" if model.kind == "adapter" else "huggingface"
    return Layout(
        "lorakit" if PROVENANCE in plain_files(place) else writer,
        model.kind,
        parts(model=True),
        covered=(*model.names, *model.companions),
        weights=model.names,
        missing=model.missing,
        refusal=model.refusal,
    )


def last_word(place: Place, layout: Layout) -> LastWord | None:
    return None
