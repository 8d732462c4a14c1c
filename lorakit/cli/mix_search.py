"""`lorakit mix --search`: weights found against a score that the person wrote."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import note, print_json, weighted
from lorakit.errors import LorakitError, NotFound, UsageError

if TYPE_CHECKING:
    from lorakit.mix.search import Score, Trial

NAMES = ("search", "evaluations", "minimise", "url", "share")


def search_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Those of a search; `NAMES` are their names."""
    for option in (
        click.option("--share", metavar="DIR", help="Where candidates are made; the server at --url loads from there."),
        click.option("--url", help="A running server that loads each candidate while it is scored."),
        click.option("--minimise", is_flag=True, help="A lower score is better."),
        click.option("--evaluations", type=int, metavar="N", help="How often to score.  [default: 40]"),
        click.option(
            "--search", metavar="FILE.py[:FUNCTION]",
            help="Find the weights that score best: FUNCTION (score) takes a candidate and gives a number.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def refuse_without_search(options: Mapping[str, Any]) -> None:
    """Raises UsageError when one of a search's options is there, and no `--search`."""
    for name in NAMES:
        if options["search"] is None and options[name]:
            raise UsageError(f"--{name} is for a search: name what to score with by --search FILE.py")


def mix_by_search(
    arguments: Sequence[str],
    out: str | None,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Search, write what was found, and say it. Weights among the arguments are where the search starts.

    Raises:
        NotFound: there is no such file, or no such function in it.
        LorakitError: the file can't be run; says where.
    """
    from lorakit.mix.search import search

    pairs = [weighted(argument) for argument in arguments]
    adapters = [adapter for adapter, _ in pairs]
    start = None if adapters == list(arguments) else [weight for _, weight in pairs]
    how_often = {} if options["evaluations"] is None else {"evaluations": options["evaluations"]}
    with redirect_stdout(sys.stderr):  # what a score prints is no data of ours
        report = search(
            adapters, _score(options["search"]), start=start, maximise=not options["minimise"], url=options["url"],
            share=options["share"], progress=_tell, **how_often, **settings,
        )  # fmt: skip
    if out is not None and not dry_run:
        report.adapter.save(out)
    result = {"out": out, "dry_run": dry_run, **report.as_dict()}
    if as_json:
        print_json(result)
    else:
        put: Callable[[str], None] = print if dry_run else note
        if not dry_run:
            print(out)
        failed = f", {result['failed']} of them failed" if result["failed"] else ""
        put(f"score {report.score:.6g}, the best of {len(report.trials)}{failed}")
        for adapter, weight in zip(report.adapters, report.weights, strict=True):
            put(f"{weight:.4g} × {adapter}")


def _tell(trial: Trial, best: Trial | None) -> None:
    """A line for what is better than all before, and for what failed."""
    weights = " ".join(f"{weight:.4g}" for weight in trial.weights)
    if trial is best:
        note(f"{trial.score:.6g}  {weights}")
    elif trial.error is not None:
        note(f"failed  {weights}  {trial.error}")


def _score(said: str) -> Score:
    """The function that `FILE.py[:FUNCTION]` names."""
    file, separator, name = said.rpartition(":")
    if not separator or Path(said).is_file():
        file, name = said, "score"
    if not Path(file).is_file():
        raise NotFound(f"there is no file '{file}' to score with")
    found = _run(Path(file)).get(name)
    if not callable(found):
        raise NotFound(f"'{file}' has no function '{name}': name the one to score with, --search {file}:FUNCTION")
    return found  # type: ignore[no-any-return]


def _run(file: Path) -> dict[str, Any]:
    """What a person's own file defines; it may import its neighbours, as a program can.

    Raises:
        LorakitError: it can't be run; says what, and in which line.
    """
    import importlib.util

    from lorakit.mix.search import said_of

    spec = importlib.util.spec_from_file_location("lorakit_score", file.absolute())
    if spec is None or spec.loader is None:
        raise UsageError(f"'{file}' is no Python file: --search wants one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # before it runs: dataclasses and pickle look there
    sys.path.insert(0, str(file.absolute().parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise LorakitError(f"'{error.filename}', line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise LorakitError(said_of(error, file=str(file.absolute()))) from None
    return vars(module)
