"""`lorakit show`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import json_option, note, print_json
from lorakit.cli.tables import print_table, printable, size_in_words
from lorakit.errors import InvalidFile, Refused, UsageError

if TYPE_CHECKING:
    from lorakit.checkpoints.details import Details
    from lorakit.checkpoints.metadata import Metadata
    from lorakit.convert.verdict import Judgement
    from lorakit.mix.lineage import Lineage

FILES = 30


@click.command("show")
@click.argument("path", metavar="PATH|ID")
@click.option("--plot", type=click.Path(), metavar="FILE.png", help="Write the losses of its run; needs matplotlib.")
@json_option
def command(path: str, plot: str | None, as_json: bool) -> None:
    """Say all that is known of a checkpoint, an adapter or a model: what it holds, how it was trained, whether vLLM
    would serve it, and what it was made of. Of a run, which checkpoints it has, and which are the best and the latest.

    A folder of adapters that are no run's is a table of them. ID is a name in the store.

    \b
    lorakit show runs/sql/checkpoint-500
    lorakit show runs/sql --plot losses.png
    lorakit show sql@best --json
    """
    from lorakit.cli import show_others

    if plot is not None:
        from lorakit.cli.plots import ensure_plottable

        ensure_plottable(Path(plot))
    folder = Path(path)
    if folder.is_dir() and (run := show_others.run_at(folder)):
        show_others.show_run(folder, run, plot, as_json=as_json)
    elif folder.is_dir() and not _holds_something(folder) and (adapters := show_others.adapters_in(folder)):
        if plot is not None:
            raise UsageError(f"'{folder}' is a folder of adapters, and --plot is for a run or one of its checkpoints")
        show_others.show_adapters(folder, adapters, as_json=as_json)
    else:
        _show_checkpoint(path, plot, as_json=as_json)


def _show_checkpoint(reference: str, plot: str | None, *, as_json: bool) -> None:
    from lorakit.checkpoints.details import details_of
    from lorakit.checkpoints.finished import NO_PERMISSION
    from lorakit.convert.verdict import judge

    place, row = _found(reference)
    details = details_of(place)
    if details.writer is None and row.reason is not None and row.reason.endswith(NO_PERMISSION):
        raise Refused(f"'{place}': {row.reason}")
    if details.writer is None and not (place.is_dir() and (row.step is not None or _holds_something(place))):
        raise Refused(f"'{place}' is neither an adapter nor a model, holds no adapters, and lorakit did not write it")
    lineage = _lineage(place) if place.is_dir() else None
    judged = judge(place, quiet=0, ask_hub=False, sampled=True)
    if plot is not None:
        from lorakit.cli.show_others import plot_around

        plot_around(row, place, plot)
    if as_json:
        print_json(_as_dict(row, details, judged, lineage, plot))
    else:
        _print_checkpoint(row, details, judged, lineage)


def _found(reference: str) -> tuple[Path, Metadata]:
    """The checkpoint's place, and what is known of it.

    Raises:
        NotFound: there is neither a path of that name, nor such a name in the store.
    """
    from lorakit.checkpoints.given_names import with_given_names
    from lorakit.checkpoints.locate import candidate_at, content_of, find_stored, nothing_named
    from lorakit.checkpoints.metadata import metadata_of, stored_by_path
    from lorakit.checkpoints.stored import row_of
    from lorakit.store.store import default_home

    place = Path(reference)
    if place.exists():
        row = metadata_of(candidate_at(place), stored_by_path(default_home()), with_digest=True)
        return place, with_given_names([row])[0]
    stored = find_stored(reference)
    if stored is None:
        raise nothing_named(reference)
    return content_of(stored), row_of(stored, default_home())


def _lineage(folder: Path) -> Lineage | None:
    from lorakit.mix.lineage import lineage_of

    try:
        return lineage_of(folder)
    except (InvalidFile, OSError) as error:
        note(f"note: what it was made of is unreadable: {error}")
        return None


def _holds_something(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in ("adapter_config.json", "config.json", "lorakit.json"))


def _as_dict(
    row: Metadata, details: Details, judged: Judgement, lineage: Lineage | None, plot: str | None
) -> dict[str, Any]:
    said = asdict(details)
    files = [{"path": name, "size": size} for name, size in said.pop("files")]
    ready = {
        "ready": judged.ready, "verdict": judged.word, "reasons": list(judged.problems or judged.open_questions),
        "repairs": list(judged.repairs),
    }  # fmt: skip
    return {
        **row.as_dict(), **said, **_types(Path(row.path)), "inference_ready": ready, "files": files,
        "lineage": lineage.as_dict() if lineage else None, "plot": plot,
    }  # fmt: skip


def _types(path: Path) -> dict[str, str | None]:
    """What an adapter's config calls its method, and a model's its architecture and how it is quantised."""
    adapter, model = _config(path / "adapter_config.json"), _config(path / "config.json")
    quantised = model.get("quantization_config")
    said = {
        "peft_type": adapter.get("peft_type"),
        "model_type": model.get("model_type"),
        "quantised": quantised.get("quant_method") if isinstance(quantised, dict) else None,
    }
    return {key: value if isinstance(value, str) else None for key, value in said.items()}


def _config(file: Path) -> Mapping[str, Any]:
    from lorakit.files.folders import read_json

    try:
        return read_json(file)
    except InvalidFile:
        return {}


def _print_checkpoint(row: Metadata, details: Details, judged: Judgement, lineage: Lineage | None) -> None:
    print_facts(_facts(row, details, judged, lineage))
    if details.files:
        print()
        print_table(("file", "size"), [(name, size_in_words(size)) for name, size in details.files[:FILES]])
        if len(details.files) > FILES:
            note(f"and {len(details.files) - FILES} more files: --json has every one")
    if lineage is not None and lineage.parents:
        from lorakit.cli.trees import print_tree

        print()
        print_tree(lineage)


def _facts(row: Metadata, details: Details, judged: Judgement, lineage: Lineage | None) -> dict[str, Any]:
    versions = (("transformers", details.transformers_version), ("peft", details.peft_version))
    return {
        "id": row.id,
        "path": row.path,
        "run": row.run if row.step is not None else None,
        "step": row.step,
        "epoch": None if row.epoch is None else f"{row.epoch:.4g}",
        "train loss": _loss(row.train_loss),
        "eval loss": evaluated_in_words(row),
        "metrics": " ".join(f"{name}={value:.4g}" for name, value in (row.metrics or {}).items()) or None,
        "kind": _kind(row, lineage),
        "writer": details.writer,
        "holds": ", ".join(details.holds) or None,
        "base": row.base,
        "versions": ", ".join(f"{name} {version}" for name, version in versions if version) or None,
        "rank": row.rank,
        "modules": details.modules,
        "tensors": f"{details.tensors} in {', '.join(details.dtypes)}" if details.tensors and details.dtypes else None,
        "size": None if row.size is None else size_in_words(row.size),
        "digest": row.digest,
        "created": None if row.created is None else _moment(row.created),
        "state": f"{row.state}: {row.reason}" if row.reason else row.state,
        "aliases": ", ".join(row.aliases) or None,
        **_made(lineage),
        "inference ready": _ready(judged),
    }


def _kind(row: Metadata, lineage: Lineage | None) -> str:
    kinds = ", ".join(value for value in _types(Path(row.path)).values() if value)
    kind = f"{row.kind or 'folder'} ({kinds})" if kinds else row.kind or "folder"
    if lineage is None or not lineage.operation:
        return kind
    return f"{kind}, written by lorakit {lineage.operation}{f' {lineage.version}' if lineage.version else ''}"


def _made(lineage: Lineage | None) -> dict[str, str | None]:
    """What lorakit itself did to make it."""
    if lineage is None:
        return {}
    return {
        "settings": " ".join(f"{key}={value}" for key, value in lineage.settings.items() if value is not None) or None,
        "error": None if lineage.error is None else f"{lineage.error:.3g} of the norm was cut off",
        "survival": None if lineage.survival is None else f"{lineage.survival:.2%} of the change survived rounding",
    }


def _ready(judged: Judgement) -> str:
    if judged.ready:
        return "yes" + (f", after {'; '.join(judged.repairs)} is written anew" if judged.repairs else "")
    word = "no" if judged.problems else "unknown"
    return f"{word}: {'; '.join(judged.problems or judged.open_questions)}"


def evaluated_in_words(row: Metadata) -> str | None:
    """The eval loss, with its step where that is not the checkpoint's own."""
    if row.eval_loss is None or row.eval_step == row.step:
        return _loss(row.eval_loss)
    return f"{_loss(row.eval_loss)} ({'of no known step' if row.eval_step is None else f'step {row.eval_step}'})"


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _moment(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def print_facts(facts: Mapping[str, Any]) -> None:
    """One a line; what is None is left out."""
    known = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, known))
    for name, value in known.items():
        print(f"{name:<{width}}  {printable(str(value))}")
