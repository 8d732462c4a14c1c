"""A tied base: one stored weight is both embedding and output head. Stays so where the two sides stay equal.

PEFT's merge writes one side's delta into both (issue 2777 of its repository); what is right is what the unmerged model
computes: each side with its own change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.errors import WrongBase
from lorakit.files.tensors import load_tensor
from lorakit.merge.layers import EMBEDDINGS, HEADS, layer_of
from lorakit.merge.placing import Placer
from lorakit.merge.steps import AddProduct, Step


def settle_tied(placer: Placer) -> None:
    """Drop the head where it is still the embedding; else write it out, and say so in the config."""
    model = placer.model
    if model.embedding is None or model.head is None:
        return
    both = (model.embedding, model.head)
    mine, theirs = (placer.steps.get(name, []) for name in both)
    if placer.ensured_tied and not (mine and theirs):
        mine = theirs = mine or theirs
        for name in both:
            placer.steps[name] = mine
    if _equal(mine, theirs) and model.tensors[model.embedding] == model.tensors[model.head]:
        placer.steps[model.head] = mine  # for a base that stores both
        if model.head not in model.base.tensors:
            del model.tensors[model.head]
        return
    model.config |= untied(model.base.config)
    placer.notes.append(
        f"the base's one weight for embedding and output head becomes two, as the adapter changes them differently: "
        f"'{model.head}' is written, and config.json says tie_word_embeddings false"
    )


def ensure_one_vocabulary(placer: Placer) -> None:
    """Raises WrongBase when an adapter resized the embedding and not the head, or the other way round."""
    tables = {
        name: stored
        for name, stored in placer.model.tensors.items()
        if name.endswith(".weight") and layer_of(name) in HEADS | EMBEDDINGS and len(stored.shape) == 2
    }
    resized = next((name for name in tables if name in placer.homes), None)
    if resized is None:
        return
    whole = placer.model.base.tensors
    old = whole.get(resized, whole.get(placer.model.embedding or "", tables[resized])).shape[0]
    rows = tables[resized].shape[0]
    for name, stored in tables.items():
        if stored.shape[0] == old != rows:
            side = "head" if layer_of(name) in HEADS else "embedding"
            raise WrongBase(
                f"the adapter resized '{resized}' to {rows} rows, and the {side} has {old} in '{name}': "
                f"save both with the adapter (save_embedding_layers=True)"
            )


def _equal(mine: Sequence[Step], theirs: Sequence[Step]) -> bool:
    return len(mine) == len(theirs) and all(
        one == other or _is_transpose(one, other) for one, other in zip(mine, theirs, strict=True)
    )


def _is_transpose(embedding: Step, head: Step) -> bool:
    """Whether both add the same: PEFT's `ensure_weight_tying` gives the head the embedding's factors, transposed."""
    if not (isinstance(embedding, AddProduct) and isinstance(head, AddProduct)):
        return False
    if (embedding.factor, embedding.shape, embedding.rank) != (head.factor, head.shape, head.rank):
        return False
    b, a, other_b, other_a = (load_tensor(stored) for stored in (*embedding.stored, *head.stored))
    return b.dtype == other_b.dtype and bool((other_a == b.T).all() and (other_b == a.T).all())


def untied(config: Any) -> dict[str, Any]:
    """`tie_word_embeddings` false, in the config and in each part that names it."""
    changed: dict[str, Any] = {"tie_word_embeddings": False}
    for key, value in config.items():
        if isinstance(value, dict) and ("tie_word_embeddings" in value or key == "text_config"):
            changed[key] = {**value, "tie_word_embeddings": False}
    return changed
