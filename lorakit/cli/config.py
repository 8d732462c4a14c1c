"""`lorakit config`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from lorakit.cli.configured import Configured, as_yaml, config_option, example_of, settings_in, settings_of
from lorakit.cli.serve import command as serve
from lorakit.cli.shared import json_option, print_json
from lorakit.cli.tables import printable


@click.group("config")
def command() -> None:
    """Say what `lorakit serve` would be told, and from where; or print a file to begin with.

    A flag goes before its variable, LORAKIT_MAX_LORAS of --max-loras, that before the file of --config, and that before
    the default.

    \b
    lorakit config example > serve.yaml
    lorakit config show --origin --config serve.yaml
    """


@command.command("show", cls=Configured, params=[*settings_of(serve).values()])
@config_option
@click.option("--origin", is_flag=True, allow_from_autoenv=False, help="Say behind each where it came from.")
@json_option
@click.pass_context
def show(context: click.Context, /, origin: bool, as_json: bool, **_: Any) -> None:
    """Print each setting that `lorakit serve` would have with the same arguments, as YAML that --config takes.

    Secrets are printed as ***. Nothing is started, and no folder looked for.

    \b
    lorakit config show --config serve.yaml --port 9000 --origin
    lorakit config show --json
    """
    settings = settings_in(context)
    if as_json:
        print_json([asdict(setting) for setting in settings])
        return
    for setting in settings:
        whence = f"  # {setting.origin} {setting.place}".rstrip() if origin else ""
        print(printable(as_yaml(setting.key, setting.value) + whence))


@command.command("example")
def example() -> None:
    """Print a file for `lorakit serve --config`: every setting with what it is, and its default.

    \b
    lorakit config example > serve.yaml
    """
    print(example_of(serve), end="")
