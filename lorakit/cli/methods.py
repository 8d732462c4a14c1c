"""`lorakit methods`."""

from __future__ import annotations

from typing import Any

import click

from lorakit.cli.shared import json_option, print_json


@click.command("methods")
@json_option
def command(as_json: bool) -> None:
    """List the methods of `lorakit mix`, what they are good for, and their options.

    Only the weighted sum was found to gain reliably on language models (arXiv:2511.21437): take it unless a
    measurement of your own speaks for another.

    \b
    lorakit methods
    """
    from lorakit.mix.methods.registry import METHODS

    listed: list[dict[str, Any]] = [
        {
            "name": method.name, "summary": method.summary, "paper": method.paper, "options": dict(method.options),
            "default": method.name == "linear",
        }
        for method in METHODS.values()
    ]  # fmt: skip
    if as_json:
        print_json(listed)
        return
    width = max(len(method["name"]) for method in listed)
    for method in listed:
        print(f"{method['name']:<{width}}  {method['summary']}")
        options = ", ".join(f"{name}={value}" for name, value in method["options"].items())
        print(f"{'':<{width}}  {method['paper']}" + (f"; options: {options}" if options else ""))
