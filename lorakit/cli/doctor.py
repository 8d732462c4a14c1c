"""`lorakit doctor`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, note, print_json
from lorakit.cli.tables import printable

if TYPE_CHECKING:
    from lorakit.cli.checkup.finding import Finding


@click.command("doctor")
@click.argument("base", required=False)
@json_option
@click.pass_context
def command(context: click.Context, /, base: str | None, as_json: bool) -> None:
    """Say what this machine can and cannot do, why, and what to do about it; with BASE, whether that model fits.

    Each line is `ok`, a `warning` (something is slower, smaller or missing) or a `problem` (something does not work).
    Ends with 1 when there is a problem. Nothing is fetched, changed, or left behind, and no secret is printed.

    \b
    lorakit doctor
    lorakit doctor models/llama --json
    """
    findings = list(all_findings(base))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    context.exit(1 if any(finding.state == "problem" for finding in findings) else 0)


def all_findings(base: str | None) -> Iterator[Finding]:
    """Each look by itself: one that fails says so, and the others go on."""
    from lorakit.cli.checkup.finding import Finding

    for name, look in _looks(base):
        try:
            yield from look()
        except Exception as error:
            yield Finding(name, "warning", "it could not be looked at", f"{type(error).__name__}: {error}")


def _looks(base: str | None) -> Iterator[tuple[str, Callable[[], Iterable[Finding]]]]:
    from pathlib import Path

    from lorakit.cli.checkup import gpu, machine, network, software
    from lorakit.cli.checkup.base import base_here
    from lorakit.cli.checkup.home import home
    from lorakit.cli.serve import command as serve
    from lorakit.files.folders import free_bytes
    from lorakit.server.supervision.room import free_memory
    from lorakit.store.store import default_home

    torch, error = software.torch_here()
    gpus, driver = gpu.gpus_here()
    told = serve.make_context("serve", [], resilient_parsing=True).params
    yield "software", lambda: software.software(software.requirements())
    yield "torch", lambda: [software.of_threads(torch, error, machine.usable_cores())]
    yield "GPU", lambda: [gpu.of_gpu(gpus, driver, torch, gpu.visible_here())]
    yield "vLLM", lambda: [software.of_vllm(*software.vllm_here(), gpu=bool(gpus) or driver is not None)]
    yield "Hub", lambda: [software.hub_here()]
    yield "machine", lambda: machine.machine(gpu=bool(gpus))
    yield "store", lambda: home(default_home(), said=bool(os.environ.get("LORAKIT_HOME")))
    yield "network", lambda: network.network(told["host"], told["port"], os.environ)
    if base is not None:
        yield "base", lambda: [base_here(base, gpus, free_memory(), free_bytes(Path.cwd()))]


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(printable(f"{finding.state:<7}  {finding.name:<{width}}  {finding.what}"))
        for said in (finding.why, finding.cure):
            if said:
                print(printable(f"{'':<{width + 11}}{said}"))
    counts = [(word, sum(finding.state == word for finding in findings)) for word in ("problem", "warning")]
    said = ", ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts if count)
    note(said or "all is well")
