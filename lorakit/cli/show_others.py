"""What `lorakit show` says of a run, and of a folder of adapters."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.shared import note, print_json
from lorakit.cli.tables import print_table, size_in_words
from lorakit.errors import LorakitError, NotFound, Refused

if TYPE_CHECKING:
    from lorakit.checkpoints.metadata import Metadata
    from lorakit.checkpoints.runs import Candidate

REASONS = 10


def run_at(folder: Path) -> list[Candidate]:
    """The checkpoints of the run that a folder is; none where it is a checkpoint itself, or a folder of adapters."""
    from lorakit.checkpoints.finished import CHECKPOINT
    from lorakit.checkpoints.locate import is_at
    from lorakit.checkpoints.runs import checkpoints_of

    try:
        found = checkpoints_of(folder)
    except (NotFound, PermissionError):
        return []
    inside = [candidate for candidate in found if not is_at(candidate, folder)]
    if any(CHECKPOINT.fullmatch(candidate.folder.name) for candidate in inside):
        return found
    places = {os.path.abspath(candidate.folder) for candidate in inside}
    others = [adapter for adapter in adapters_in(folder) if os.path.abspath(adapter) not in places]
    return found if inside and not others else []


def show_run(folder: Path, candidates: Sequence[Candidate], plot: str | None, *, as_json: bool) -> None:
    """Which checkpoints it has, and which are the latest and the best."""
    from lorakit.checkpoints.runs import originals

    rows = _rows(candidates, with_digest=as_json)
    paths = {os.path.abspath(candidate.folder) for candidate in originals(candidates)}
    chosen_from = [row for row in rows if row.path in paths]
    latest, best = _latest(chosen_from), _best(chosen_from)
    if plot is not None:
        _plot(rows, _names(rows), rows[-1].run, plot)
    steps = [row.step for row in rows if row.step is not None]
    if as_json:
        said = {
            "path": os.path.abspath(folder), "kind": "run", "run": rows[-1].run,
            "steps": [min(steps), max(steps)] if steps else None,
            "latest": latest.id if latest else None, "best": best.id if best else None,
            "size": sum(row.size or 0 for row in rows), "plot": plot,
        }  # fmt: skip
        print_json({**said, "checkpoints": [row.as_dict() for row in rows]})
        return
    _print_run(folder, rows, latest, best)
    if plot is not None:
        note(f"plotted to {plot}")


def _rows(candidates: Sequence[Candidate], *, with_digest: bool) -> list[Metadata]:
    from lorakit.checkpoints.given_names import with_given_names
    from lorakit.checkpoints.metadata import stored_by_path
    from lorakit.checkpoints.remembered import metadata_of_all
    from lorakit.store.store import default_home

    home = default_home()
    return with_given_names(metadata_of_all(candidates, stored_by_path(home), home, with_digest=with_digest))


def _latest(rows: Sequence[Metadata]) -> Metadata | None:
    return next((row for row in reversed(rows) if row.state == "finished"), None)


def _best(rows: Sequence[Metadata]) -> Metadata | None:
    from lorakit.checkpoints.listing import best_of

    try:
        return best_of(rows)
    except NotFound:
        return None


def _print_run(folder: Path, rows: Sequence[Metadata], latest: Metadata | None, best: Metadata | None) -> None:
    from lorakit.cli.show import evaluated_in_words, print_facts

    states = Counter(row.state for row in rows)
    steps = [row.step for row in rows if row.step is not None]
    bases = sorted({row.base for row in rows if row.base})
    print_facts(
        {
            "run": rows[-1].run,
            "path": os.path.abspath(folder),
            "checkpoints": f"{len(rows)} ({', '.join(f'{count} {state}' for state, count in states.items())})",
            "steps": f"{min(steps)} to {max(steps)}" if steps else None,
            "latest": latest.id if latest else "none is finished",
            "best": f"{best.id}, eval loss {evaluated_in_words(best)}" if best else None,
            "kind": ", ".join(sorted({row.kind for row in rows if row.kind})) or None,
            "base": ", ".join(bases) or None,
            "size": size_in_words(sum(row.size or 0 for row in rows)),
        }
    )
    unfinished = [row for row in rows if row.state != "finished"]
    for row in unfinished[:REASONS]:
        note(f"{row.id} is {row.state}: {row.reason}")
    if len(unfinished) > REASONS:
        note(f"and {len(unfinished) - REASONS} more: --json has every reason")


def plot_around(shown: Metadata, place: Path, plot: str) -> None:
    """The losses of the run that a checkpoint is of, where it is of one, with that checkpoint named."""
    from lorakit.checkpoints.locate import candidate_at

    candidate = candidate_at(place)
    run = place.absolute().parent if candidate.kind == "step" else place
    rows = _rows(run_at(run), with_digest=False) or [shown]
    mine = next((row for row in rows if row.path == shown.path), shown)
    _plot(rows, _names(rows, {place.name: mine}), candidate.run, plot)
    note(f"plotted to {plot}")


def _names(rows: Sequence[Metadata], others: Mapping[str, Metadata | None] | None = None) -> dict[str, str]:
    """What is written beside a checkpoint, by its id."""
    names: dict[str, str] = {}
    for word, row in {**(others or {}), "latest": _latest(rows), "best": _best(rows)}.items():
        if row is not None:
            names[row.id] = f"{names[row.id]}, {word}" if row.id in names else word
    return names


def _plot(rows: Sequence[Metadata], names: Mapping[str, str], title: str, plot: str) -> None:
    from lorakit.checkpoints.curves import losses_of
    from lorakit.cli.plots import losses_figure, write_png

    losses = losses_of(rows)
    if not losses:
        raise Refused(f"no losses of '{title}' are known: there is nothing to plot")
    write_png(losses_figure(losses, rows, names, title), Path(plot))


# folders of adapters


def show_adapters(folder: Path, adapters: Sequence[Path], *, as_json: bool) -> None:
    """A table of those that are beside one another, such as the stages of a mix."""
    stages = [_stage(adapter) for adapter in adapters]
    if as_json:
        print_json({"path": str(folder), "kind": "folder of adapters", "adapters": stages})
    else:
        _print_stages(stages)


def adapters_in(folder: Path) -> list[Path]:
    """In the order of their names, numbers by their value."""
    try:
        found = [path for path in folder.iterdir() if os.path.isfile(path / "adapter_config.json")]
    except PermissionError:
        return []
    return sorted(found, key=lambda path: [(int(n or 0), word) for n, word in re.findall(r"(\d*)(\D*)", path.name)])


def _stage(folder: Path) -> dict[str, Any]:
    """What the table of several adapters says of one; what can't be read has the reason in place of its numbers."""
    from math import sqrt

    from lorakit.adapters.reading import load_adapter
    from lorakit.adapters.truncation import one_thread
    from lorakit.mix.lineage import lineage_of

    try:
        lineage, adapter = lineage_of(folder), load_adapter(folder)
        with one_thread():
            norm = sqrt(sum(delta.norm() ** 2 for delta in adapter.deltas.values()))
    except LorakitError as error:
        return {"name": folder.name, "reason": str(error)}
    return {
        "name": folder.name,
        "operation": lineage.operation,
        "rank": adapter.rank,
        "norm": norm,
        "error": lineage.error,
    }


def _print_stages(stages: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            stage["name"],
            stage.get("operation") or "-",
            str(stage.get("rank", "-")),
            f"{stage['norm']:.4g}" if "norm" in stage else "-",
            "-" if stage.get("error") is None else f"{stage['error']:.3g}",
        )
        for stage in stages
    ]
    print_table(("name", "operation", "rank", "norm", "error"), rows)
    for stage in stages:
        if "reason" in stage:
            note(f"note: {stage['reason']}")
