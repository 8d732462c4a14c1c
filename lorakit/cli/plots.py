"""Pictures of reports, as PNG files that appear whole or not at all. Needs matplotlib, and no display."""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.cli.shared import note, print_json
from lorakit.errors import LorakitError, Refused, UsageError, disk_errors_named
from lorakit.files.folders import refuse_existing, sync_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorakit.checkpoints.curves import Losses
    from lorakit.checkpoints.metadata import Metadata
    from lorakit.mix.compare import CompareReport
    from lorakit.mix.diff import DiffReport

R = TypeVar("R", "CompareReport", "DiffReport")

_LAYER = re.compile(r"^(?P<before>.*?\.)??(?P<layer>\d+)\.(?P<kind>.+)$")
_LABELLED = 60  # rows or columns; more labels than that can't be read
_WRITTEN = 12  # rows and columns whose cells have their number written in


def ensure_plottable(file: Path) -> None:
    """What can be said before the work is done.

    Raises:
        UsageError: the file is not named as a PNG.
        Conflict: it exists.
        LorakitError: matplotlib is not installed.
    """
    if file.suffix.lower() != ".png":
        raise UsageError(f"--plot writes a PNG: name a file that ends in .png, not '{file}'")
    refuse_existing(file)
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        raise LorakitError("matplotlib is not installed, which --plot needs: pip install 'lorakit[plot]'") from None


def tell(
    make: Callable[[], R], words: Callable[[R], None], figure: Callable[[R], Figure], plot: str | None, *, as_json: bool
) -> None:
    """Make a report, draw it where that was asked for, and print it in words or as data."""
    if plot is not None:
        ensure_plottable(Path(plot))
    report = make()
    if plot is not None:
        write_png(figure(report), Path(plot))
    if as_json:
        print_json({**report.as_dict(), "plot": plot})
    else:
        words(report)
        if plot is not None:
            note(f"plotted to {plot}")
    for line in report.notes:
        note(f"note: {line}")


def cosine_map(report: CompareReport) -> Figure:
    """Of two adapters each module's cosine, layer by kind; of more each pair's, over all modules.

    Raises:
        Refused: two adapters have no module in common.
    """
    if len(report.adapters) > 2:
        names = _short_names(report.adapters)
        return _heat_map(report.cosines, names, names, "cosine of the deltas", limit=1.0)
    (pair,) = report.pairs
    if not pair.modules:
        raise Refused("the two adapters have no module in common: there is nothing to plot")
    cosines = {module: found.cosine for module, found in pair.modules.items()}
    rows, columns, cells = by_layer_and_kind(cosines)
    limit = max(0.1, *(abs(value or 0.0) for value in cosines.values()))
    return _heat_map(cells, rows, columns, f"cosine of {' and '.join(_short_names(report.adapters))}", limit=limit)


def by_layer_and_kind(values: dict[str, float | None]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Modules as a table: a row for each layer (those outside of layers last), a column for each kind of module."""
    places = {module: _place(module) for module in values}
    layers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    cells: list[list[float | None]] = [[None] * len(kinds) for _ in layers]
    for module, (layer, kind) in places.items():
        cells[layers.index(layer)][kinds.index(kind)] = values[module]
    return [label for _, _, label in layers], kinds, cells


def _place(module: str) -> tuple[tuple[bool, tuple[str, int], str], str]:
    match = _LAYER.match(module)
    if match is None:
        return (True, ("", 0), "–"), module
    before = match["before"] or ""
    return (False, (before, int(match["layer"])), f"{before}{match['layer']}"), match["kind"]


def stages_figure(report: DiffReport) -> Figure:
    """The spectrum of each stage, and what each lost since the one before and since the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    spectra, losses = figure.subplots(1, 2)
    names = _short_names([stage.path for stage in report.stages])
    for number, name in enumerate(names):
        spectrum = [value for value in report.spectrum(number) if value]
        # the later thinner, so that equal ones don't hide each other
        spectra.plot(range(1, len(spectrum) + 1), spectrum, label=_plain(name), linewidth=4 / (number + 1) + 0.8)
    spectra.set(title=f"singular values ({_count(len(report.modules), 'module')})", xlabel="index", ylabel="σ")
    if any(any(report.spectrum(number)) for number in range(len(names))):
        spectra.set_yscale("log")
    spectra.legend()
    places = range(1, len(names))
    for shift, label, values in (
        (-0.2, "since the stage before", [stage.lost for stage in report.stages[1:]]),
        (0.2, "since the first", [stage.lost_since_first for stage in report.stages[1:]]),
    ):
        losses.bar([place + shift for place in places], [value or 0.0 for value in values], width=0.4, label=label)
    losses.set(title="lost: ‖Δ − Δ′‖ / ‖Δ‖", ylabel="share of the norm")
    losses.set_xticks(list(places), [_plain(name) for name in names[1:]])
    losses.legend()
    return figure


def losses_figure(losses: Losses, checkpoints: Sequence[Metadata], names: Mapping[str, str], title: str) -> Figure:
    """Losses over steps, each checkpoint as a line at its step, and those that are named by their id as well."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for curve, label, style in ((losses.train, "train", {"linewidth": 1.2}), (losses.eval, "eval", {"marker": "o"})):
        if curve.steps:
            axes.plot(curve.steps, curve.values, label=f"{label} loss", **style)
    steps = [row.step for row in checkpoints if row.step is not None]
    axes.vlines(steps, 0, 1, transform=axes.get_xaxis_transform(), color="0.8", linewidth=0.8, zorder=0)
    for row in checkpoints:
        if row.id in names and row.step is not None:
            axes.axvline(row.step, color="C2", linewidth=1.2, zorder=1)
            axes.annotate(
                _plain(names[row.id]), xy=(row.step, 1), xycoords=("data", "axes fraction"), rotation=90, ha="right",
                va="top", fontsize=8, color="C2",
            )  # fmt: skip
    axes.set(title=_plain(title), xlabel="step", ylabel="loss")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _heat_map(
    cells: Sequence[Sequence[float | None]], rows: list[str], columns: list[str], title: str, *, limit: float
) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    values = np.array([[np.nan if cell is None else cell for cell in row] for row in cells], dtype=float)
    values = values.reshape(len(rows), len(columns))
    size = (min(40.0, 3 + 0.5 * len(columns)), min(40.0, 2 + 0.32 * len(rows)))
    figure = Figure(figsize=(max(5.0, size[0]), max(3.0, size[1])), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")  # where there is nothing to compare
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_title(_plain(title))
    _label(axes.set_xticks, columns, rotation=90 if max(map(len, columns), default=0) > 6 else 0)
    _label(axes.set_yticks, rows)
    if len(rows) <= _WRITTEN and len(columns) <= _WRITTEN:
        for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
            value = float(values[row, column])
            color = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, label="cosine")
    return figure


def _label(set_ticks: Any, labels: list[str], **style: Any) -> None:
    step = max(1, -(-len(labels) // _LABELLED))
    set_ticks(range(0, len(labels), step), [_plain(label) for label in labels[::step]], **style)


def _short_names(paths: Sequence[str]) -> list[str]:
    """The folders' own names, with their parents' where those are not enough to tell them apart."""
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(set(paths)) else ["/".join(Path(path).parts[-2:]) for path in paths]


def _plain(name: str) -> str:
    """Without what matplotlib would take for mathematics, or can't show."""
    return "".join(letter if letter.isprintable() else "?" for letter in name).replace("$", r"\$")


def write_png(figure: Figure, file: Path) -> None:
    """Raises Conflict when `file` exists."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font hasn't got
        FigureCanvasAgg(figure).print_png(picture)
    beside = file.parent / f".{file.name}.tmp-{uuid.uuid4().hex[:12]}"
    with disk_errors_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("xb") as stream:
                stream.write(picture.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            refuse_existing(file)
            beside.rename(file)
            sync_folder(file.parent)
        finally:
            beside.unlink(missing_ok=True)
