"""`--ray`, with or without an address."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any

import click

FLAG = "--ray"


class WithRay(click.Command):
    """A verb whose `--ray` takes an address behind an equals sign alone, so that no argument is taken for one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        said = [f"{FLAG}=" if argument == FLAG else argument for argument in args[:end]]
        return super().parse_args(ctx, said + args[end:])


def ray_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a `WithRay`; see `where` for what the verb makes of it."""
    return click.option(
        FLAG, "ray", metavar="[=ADDRESS]",
        help="Spread the work over a Ray cluster: that at ADDRESS (HOST:6379) or in RAY_ADDRESS, else one of this "
        "machine. All its machines need the same files under the same paths.",
    )(function)  # fmt: skip


def where(ray: str | None) -> str | bool:
    """The address, or whether a cluster is wanted at all."""
    return False if ray is None else ray or True


def data_alone(ray: str | None) -> AbstractContextManager[object]:
    """While Ray is at work, stdout is not for what it has to say: it prints there of workers that died."""
    return nullcontext() if ray is None else redirect_stdout(sys.stderr)
