"""`lorakit fetch`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, progress_bar
from lorakit.cli.tables import printable, size_in_words
from lorakit.errors import Refused, UsageError

if TYPE_CHECKING:
    from lorakit.checkpoints.moving.fetching import Fetched, FetchPlan


@click.command("fetch")
@click.argument("addresses", metavar="URL|ID", nargs=-1)
@click.option("--out", type=click.Path(), required=True, help="The folder to write; it must not exist.")
@click.option("--sha256", metavar="HEX", help="What the archive or the single file has to have.")
@click.option("--then", type=click.Choice(["merge", "serve"]), help="What to do with it once it is here.")
@click.option("--base", help="With --then: model folder or hub id. Left out: the one that the adapter names.")
@click.option("--then-out", type=click.Path(), metavar="DIR", help="With --then merge: the folder to merge into "
              "[the one of --out, with -merged behind].")  # fmt: skip
@click.option("--max-size", metavar="SIZE", help="Refuse what comes to more, packed or unpacked [274GB].")
@click.option("--max-files", type=click.IntRange(min=1), default=1000, show_default=True,
              help="Refuse an archive, or a folder in a bucket, with more files and folders.")  # fmt: skip
@click.option("--tries", type=click.IntRange(min=1), default=8, show_default=True,
              help="How often in a row a server may send nothing.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0.1), default=30.0, show_default=True, metavar="SECONDS",
              help="Without a byte, after which a connection counts as broken.")  # fmt: skip
@click.option("--unfinished", is_flag=True, help="Take a checkpoint that its writer is not done with, too.")
@dry_run_option
@json_option
def command(
    addresses: tuple[str, ...], out: str, sha256: str | None, then: str | None, base: str | None, then_out: str | None,
    max_size: str | None, max_files: int, tries: int, timeout: float, unfinished: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fetch a checkpoint into a folder, and say what it is.

    It comes from a URL (a pre-signed one in single quotes; its query is a secret, and is printed and stored nowhere),
    from s3://, gs://, hf://, a folder or file, the store, or the Hub. A .tar, .tar.gz, .tar.zst or .zip is unpacked as
    it arrives. A connection that breaks is gone on with; the folder appears when all of it is there and right. In place
    of the URL, - reads it from standard input: there no other user of the machine sees it.

    \b
    lorakit fetch 'https://bucket.s3.amazonaws.com/sql.tar.gz?X-Amz-Signature=…' --out sql
    lorakit fetch s3://models/sql/checkpoint-500 --out sql --then merge
    """
    if len(addresses) != 1:  # said without them: what stands in a URL is a secret
        raise UsageError(f"one address is fetched at a time, and {len(addresses)} were given: put it in single quotes")
    if then is None and (base or then_out):
        raise UsageError("--base and --then-out are for --then: say --then merge or --then serve")
    if sha256 is not None and (len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef")):
        raise UsageError("--sha256 takes the 64 hexadecimal digits that sha256sum prints")
    address = sys.stdin.readline().strip() if addresses[0] == "-" else addresses[0]
    from lorakit.checkpoints.amounts import bytes_of
    from lorakit.checkpoints.moving.download import Patience
    from lorakit.checkpoints.moving.fetching import fetch, plan_fetch
    from lorakit.files.archives import Limits
    from lorakit.files.folders import refuse_existing

    patience = Patience(tries=tries, timeout=timeout)
    limits = Limits(max_files=max_files) if max_size is None else Limits(bytes_of(max_size), max_files)
    merged = Path(then_out or f"{out.rstrip('/')}-merged")
    if then == "merge":
        refuse_existing(merged)
        ensure_base(base)
    if dry_run:
        plan = plan_fetch(
            address, Path(out), sha256=sha256 and sha256.lower(), limits=limits, patience=patience,
            unfinished=unfinished,
        )  # fmt: skip
        print_plan(plan, as_json)
        return
    with progress_bar("fetching", wanted=not as_json) as progress:
        fetched = fetch(
            address, Path(out), sha256=sha256 and sha256.lower(), limits=limits, patience=patience,
            unfinished=unfinished, with_digest=as_json, progress=progress,
        )  # fmt: skip
    say_fetched(fetched)
    if then == "merge":
        _refuse_model(fetched, "merge")
        merge_into(fetched, base, merged, as_json)
    print_fetched(fetched, as_json, {"merged": str(merged)} if then == "merge" else {})
    if then == "serve":
        _serve(fetched, base)


def say_fetched(fetched: Fetched) -> None:
    """In a line, on stderr."""
    row = fetched.checkpoint
    unknown = "nothing that lorakit knows" if fetched.writer is None else "a checkpoint of unknown kind"
    kind = {"adapter": "an adapter", "regular": "a whole model"}.get(row.kind or "", unknown)
    facts = [
        (None if fetched.writer is None else f"written by {fetched.writer}"),
        (None if row.base is None else f"base {printable(row.base)}"),
        (None if row.rank is None else f"rank {row.rank}"),
        (None if row.step is None else f"step {row.step}"),
        _evaluated(fetched),
    ]
    resumed = f", resumed {fetched.resumed} time{'s' * (fetched.resumed != 1)}" if fetched.resumed else ""
    count = f"{len(fetched.files)} file{'s' * (len(fetched.files) != 1)}, {size_in_words(fetched.bytes)}"
    note(f"fetched {', '.join([kind, *filter(None, facts)])}: {count} in {fetched.seconds:.1f} s{resumed}")
    for line in fetched.notes:
        note(f"note: {line}")
    if row.kind is not None and row.state != "finished":
        note(f"note: it is {row.state}: {printable(row.reason or '')}")


def _evaluated(fetched: Fetched) -> str | None:
    row = fetched.checkpoint
    if row.eval_loss is None:
        return None
    return f"eval_loss {row.eval_loss:.4g}" + ("" if row.eval_step == row.step else f" (of step {row.eval_step})")


def print_fetched(fetched: Fetched, as_json: bool, more: dict[str, Any]) -> None:
    if as_json:
        print_json({**fetched.as_dict(), **more})
    else:
        print(more.get("merged", fetched.out))
    sys.stdout.flush()


def print_plan(plan: FetchPlan, as_json: bool) -> None:
    if as_json:
        print_json(plan.as_dict())
        return
    size = "of a size that is not said" if plan.size is None else size_in_words(plan.size)
    print(f"{printable(plan.source)}: {'an' if plan.kind == 'archive' else 'a'} {plan.kind}, {size}")
    for name in plan.files or ():
        print(printable(name))
    if not plan.resumable:
        note("note: a connection that breaks can't be gone on with there: the server gives the file no version")
    note(f"it would become '{plan.out}'; nothing was fetched")


def _refuse_model(fetched: Fetched, verb: str) -> None:
    if fetched.checkpoint.kind != "adapter":
        raise Refused(f"'{fetched.out}' is there, and is no adapter: there is nothing to {verb} into a base")


def ensure_base(base: str | None) -> None:
    """Raises what merging into it would, before anything is fetched; None is the one that the adapter will name."""
    if base is not None:
        from lorakit.merge.fetch import open_base

        open_base(base)


def merge_into(fetched: Fetched, base: str | None, merged: Path, as_json: bool) -> None:
    from lorakit.merge.merge import merge

    with progress_bar("merging", wanted=not as_json) as progress:
        merge(base, [(str(fetched.out), 1.0)], out=str(merged), progress=progress)
    note(f"merged into '{merged}'; the adapter is '{fetched.out}'")


def _serve(fetched: Fetched, base: str | None) -> None:
    """Become the server. A whole model is one's own base."""
    options: list[str] = []
    served = os.path.abspath(fetched.out)
    if fetched.checkpoint.kind == "adapter":
        base = base or fetched.checkpoint.base
        if base is None:
            raise UsageError(f"'{fetched.out}' is there, and does not name its base: lorakit serve BASE --adapter …")
        options = ["--adapter", f"{os.path.basename(served)}={fetched.out}"]
        served = base
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "lorakit", "serve", *options, "--", served])
