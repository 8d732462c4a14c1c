"""`lorakit completion`."""

from __future__ import annotations

import os

import click

from lorakit.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def command(context: click.Context, /, shell: str | None) -> None:
    """Print what has a shell complete lorakit's verbs, flags and names; without SHELL, for the one of $SHELL.

    Names are those in the store, and those that a running server serves, if one answers at once. Put it where the
    shell looks for it:

    \b
    lorakit completion bash > ~/.local/share/bash-completion/completions/lorakit
    lorakit completion zsh > "${fpath[1]}/_lorakit"
    lorakit completion fish > ~/.config/fish/completions/lorakit.fish

    or, for this session alone:

    \b
    source <(lorakit completion bash)
    """
    from lorakit.cli.completing import script_for

    name = shell or os.path.basename(os.environ.get("SHELL", ""))
    if name not in SHELLS:
        raise UsageError(f"$SHELL is '{os.environ.get('SHELL', '')}': name one of {', '.join(SHELLS)}")
    print(script_for(name, context.find_root().command), end="")
