"""The options of the verbs that follow runs and keep an engine's adapters in step with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.configured import NamedPath
from lorakit.errors import NotFound, UsageError

if TYPE_CHECKING:
    from lorakit.server.settings import Settings

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--watch", multiple=True, metavar="DIR", type=click.Path(),
                  help="Serve every run and adapter in this folder."),
    click.option("--adapter", "adapters", multiple=True, type=NamedPath(), help="Serve this adapter or run as NAME."),
    click.option("--follow", type=click.Choice(["latest", "best", "manual"]), default="latest", show_default=True,
                  help="Which checkpoint a run's name means."),
    click.option("--metric", default="eval_loss", show_default=True, metavar="NAME",
                  help="Of --follow best, at a checkpoint's own step. NAME@best is by eval_loss always."),
    click.option("--mode", type=click.Choice(["min", "max"]), default=None,
                  help="Of --metric; min for those that are called a loss or perplexity."),
    click.option("--min-delta", default=0.0, metavar="X", type=click.FloatRange(0),
                  help="Follow only what is better by so much than what the name means."),
    click.option("--min-steps", default=0, metavar="N", type=click.IntRange(0),
                  help="Follow no checkpoint of fewer steps."),
    click.option("--probe", default="", metavar="FILE", type=click.Path(dir_okay=False),
                  help="Smoke prompts that have to pass before a name moves, one JSON object a line: "
                  '{"prompt": "1+1=", "expect": "2"}; or "messages", "matches" (a regular expression), '
                  '"max_tokens".'),
    click.option("--max-error-rise", default=0.1, show_default=True, metavar="SHARE", type=click.FloatRange(0, 1),
                  help="Go back to the revision before when so many more answers fail; 1: never."),
    click.option("--keep-revisions", default=0, metavar="N", type=click.IntRange(0),
                  help="Keep the last N of each run, and what is aliased or in use. Default: all."),
    click.option("--retention", default="", metavar="FILE", type=click.Path(dir_okay=False),
                  help="Keep what this YAML says, as prune --config, and what is aliased or in use."),
)  # fmt: skip


def following_options(function: Any) -> Any:
    """What to watch, what names mean, and what is kept."""
    return reduce(lambda made, option: option(made), reversed(_OPTIONS), function)


def whole_paths(
    base: str, adapters: Sequence[str], *, watch: Sequence[str], roots: Sequence[str] = (), **files: str | None
) -> dict[str, Any]:
    """Folders and files as settings have them, absolute; `base` is a name that no adapter may have.

    Raises:
        UsageError: a name stands twice, or can't be one.
        NotFound: there is no such folder.
    """
    from lorakit.server.settings import named_path
    from lorakit.store.names import check_name

    named = dict(named_path(text) for text in adapters)
    if len(named) < len(adapters):
        raise UsageError("--adapter: a name stands twice")
    for adapter, path in named.items():
        check_name(adapter, base)
        if not Path(path).is_dir():
            raise NotFound(f"--adapter {adapter}: there is no folder '{path}'")
    for folder in (*watch, *roots):
        if not Path(folder).is_dir():
            raise NotFound(f"there is no folder '{folder}' to watch or to load from")
    return {
        "adapters": named,
        "watch": [str(Path(folder).absolute()) for folder in watch],
        "roots": [str(Path(folder).absolute()) for folder in roots],
        **{what: str(Path(file).absolute()) if file else "" for what, file in files.items()},
    }


def refuse_unfollowable(settings: Settings) -> None:
    """Raises NotFound, UsageError where what is to be followed, or kept, can't be read."""
    from lorakit.server.following.retention import retention_of
    from lorakit.server.following.smoke import read_smokes

    _ = settings.following  # which metric is better as it is less, or more
    retention_of(settings.keep_revisions, settings.retention)
    if settings.probe:
        read_smokes(Path(settings.probe))


def largest_rank(folders: Sequence[str]) -> int:
    """The largest rank that a config under these folders names, 16 at least (vLLM's own default)."""
    from lorakit.adapters.config import read_config
    from lorakit.checkpoints.runs import find_candidates
    from lorakit.errors import LorakitError

    rank = 16
    for folder in folders:
        for candidate in find_candidates(Path(folder)):
            try:
                config = read_config(candidate.folder)
            except LorakitError:
                continue
            rank = max(rank, config.rank, *config.rank_pattern.values(), 0)
    return rank
