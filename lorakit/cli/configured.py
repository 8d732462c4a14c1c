"""A command whose settings may also come from the environment or a YAML file, and where each of them came from.

A flag goes before `LORAKIT_*`, that before the file, that before the default: the order in which click asks them.
Whatever is said of a setting here, its own declaration says; there is no second list.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

import click
from click.core import ParameterSource

from lorakit.cli.shared import note
from lorakit.errors import UsageError
from lorakit.files.addresses import without_secrets

VARIABLES = "LORAKIT"  # what the variables of all settings begin with
_BEHIND, _FILE = "lorakit.behind_dashes", "lorakit.config_file"  # what a context remembers of its words
_SECRET = re.compile(r"(?:^|[-_])(?:key|token|secret|password)$")
MASK = "***"
WIDTH = 110  # of an example
_DOCUMENT_END = "...\n"

Origin = Literal["flag", "env", "file", "default"]
_ORIGINS: Mapping[ParameterSource | None, Origin] = {
    ParameterSource.COMMANDLINE: "flag", ParameterSource.ENVIRONMENT: "env", ParameterSource.DEFAULT_MAP: "file",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it holds: plain data under the key that it has in a file. `place` is the variable, or the file and
    the key there; empty for a flag and a default."""

    key: str
    value: Any
    origin: Origin
    place: str = ""


class NamedPath(click.ParamType):  # type: ignore[type-arg]
    """NAME=PATH; in a file also as a mapping, in a variable several with a colon between them."""

    name = "NAME=PATH"
    envvar_list_splitter = os.pathsep


class Words(click.ParamType):  # type: ignore[type-arg]
    """Words for another program, in a variable as a shell would read them."""

    name = "WORD"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return shlex.split(rv)


class Configured(click.Command):
    """A command that reads `--config`. What stands behind `--` goes to its last argument, never to one before it."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        more["context_settings"] = {"auto_envvar_prefix": VARIABLES, **(more.get("context_settings") or {})}
        super().__init__(*arguments, **more)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, ctx.meta[_BEHIND] = args[:at], args[at + 1 :]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        for said, near in misspelt(os.environ, {variable_of(one) for one in settings_of(self).values()}).items():
            note(f"note: {said} is no setting; did you mean {near}?")
        return super().invoke(ctx)


class Described(click.Argument):
    """An argument with a line on what it is, as options have, and with a key in a file."""

    def __init__(self, *arguments: Any, key: str, meaning: str, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.key, self.meaning = key, meaning


class BehindDashes(Described):
    """Words for another program, which stand behind `--`; in a file a list, or a mapping of its flags."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        if behind := ctx.meta.get(_BEHIND):
            return tuple(behind), ParameterSource.COMMANDLINE
        value, source = super().consume_value(ctx, opts)
        if source is ParameterSource.COMMANDLINE and value and not ctx.resilient_parsing:
            ctx.fail(f"'{value[0]}' is one argument too many: what {self.key} is given stands behind --")
        return value, source


def config_option(function: Any) -> Any:
    """`--config FILE`, read before all other options."""
    return click.option(
        "--config", metavar="FILE", type=click.Path(dir_okay=False), is_eager=True, expose_value=False,
        callback=_read, help="YAML with any of these options, by their names: port: 8000.",
    )(function)  # fmt: skip


def _read(context: click.Context, parameter: click.Parameter, file: str | None) -> str | None:
    if file and not context.resilient_parsing:
        context.default_map, context.meta[_FILE] = said_in(Path(file), context), file
    return file


def settings_of(command: click.Command) -> dict[str, click.Parameter]:
    """What a file may say to a command, by its key there: not what is for one call alone."""
    return {
        key_of(parameter): parameter
        for parameter in command.params
        if isinstance(parameter, click.Argument)
        or (isinstance(parameter, click.Option) and parameter.allow_from_autoenv and not parameter.is_eager)
    }


def key_of(parameter: click.Parameter) -> str:
    """The flag without its dashes."""
    if isinstance(parameter, Described):
        return parameter.key
    return max(parameter.opts, key=len).lstrip("-").replace("_", "-")


def said_in(file: Path, context: click.Context) -> dict[str, Any]:
    """What a file says to the command, by the names of its parameters.

    Raises:
        NotFound: there is no such file.
        UsageError: it is no YAML, a key is unknown or stands twice, or a value is not what its flag takes.
    """
    from lorakit.files.plain_yaml import read_strictly

    said = read_strictly(file)
    if not isinstance(said, Mapping | None):
        raise UsageError(f"'{file}' has to hold settings, such as: port: 8000")
    known, found = settings_of(context.command), dict[str, Any]()
    for key, value in (said or {}).items():
        parameter = known.get(str(key).replace("_", "-"))
        if parameter is None:
            raise UsageError(f"'{file}': unknown key '{key}'{_hint(str(key), known)}")
        if parameter.name in found:
            raise UsageError(f"'{file}': '{key}' stands twice")
        if value is None:
            continue
        try:
            found[str(parameter.name)] = _checked(parameter, value, context)
        except (click.BadParameter, UsageError) as error:
            words = error.message if isinstance(error, click.BadParameter) else str(error)
            raise UsageError(f"'{file}': {key}: {words.rstrip('.')}") from None
    return found


def _hint(key: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(key.replace("_", "-"), known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"


def _checked(parameter: click.Parameter, value: Any, context: click.Context) -> Any:
    """A value as its flag would give it to the command.

    Raises:
        click.BadParameter, UsageError: it is of another type, or out of its range.
    """
    if isinstance(parameter, BehindDashes):
        return list(_words(value))
    if isinstance(parameter.type, NamedPath) and isinstance(value, Mapping):
        value = [f"{name}={_of_type(parameter, path)}" for name, path in value.items()]
    if isinstance(parameter, click.Option) and parameter.multiple:
        value = [_of_type(parameter, one) for one in (value if isinstance(value, list) else [value])]
    else:
        value = _of_type(parameter, value)
    parameter.type_cast_value(context, value)
    return value


def _of_type(parameter: click.Parameter, value: Any) -> Any:
    """YAML reads `yes` as true, and click takes that for 1: the types have to agree before it is asked."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        wanted, fits = "true or false", isinstance(value, bool)
    elif isinstance(parameter.type, type(click.INT)):
        wanted, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(parameter.type, type(click.FLOAT)):
        wanted, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        wanted, fits = "text, in quotes where YAML would read it as something else", isinstance(value, str)
    if not fits:
        raise UsageError(f"it is {json.dumps(value, default=str)}, and has to be {wanted}")
    return value


def _words(said: Any) -> Iterator[str]:
    """Arguments as a list of words, or as flags with their values: {max-model-len: 4096, enforce-eager: true}."""
    if isinstance(said, list):
        if any(isinstance(word, bool | list | dict | None) for word in said):
            raise UsageError("a list has to be of words and numbers alone: ['--max-model-len', 4096]")
        yield from map(str, said)
        return
    if not isinstance(said, Mapping):
        raise UsageError("it has to be a list of words, or a mapping: {max-model-len: 4096}")
    for name, value in said.items():
        flag = str(name).lstrip("-").replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield f"--{flag}"
            several = value if isinstance(value, list) else [value]
            yield from (json.dumps(one) if isinstance(one, Mapping) else str(one) for one in several)


def settings_in(context: click.Context) -> list[Setting]:
    """Each setting of a command that was parsed, without secrets, and where it came from."""
    file, found = context.meta.get(_FILE, ""), []
    for key, parameter in settings_of(context.command).items():
        name = str(parameter.name)
        origin = _ORIGINS.get(context.get_parameter_source(name), "default")
        place = {"env": variable_of(parameter), "file": f"{file}:{key}"}.get(origin, "")
        value = context.params[name]
        about = "" if isinstance(parameter.type, click.Path) else key  # where a key is may be known
        found.append(Setting(key, _shown(about, list(value) if isinstance(value, tuple) else value), origin, place))
    return found


def variable_of(parameter: click.Parameter) -> str:
    """The variable that a setting may come from."""
    return str(parameter.envvar) if parameter.envvar else f"{VARIABLES}_{str(parameter.name).upper()}"


def misspelt(environ: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Variables that are nearly those of a setting, with the setting's."""
    begins = f"{VARIABLES}_"
    names = {name.removeprefix(begins) for name in known}
    said = {name.removeprefix(begins) for name in environ if name.startswith(begins)} - names
    near = {name: get_close_matches(name, names, n=1, cutoff=0.8) for name in sorted(said)}
    return {begins + name: begins + found[0] for name, found in near.items() if found}


def as_yaml(key: str, value: Any) -> str:
    """One line of a file."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return f"{key}: {text.removesuffix(_DOCUMENT_END).strip()}"


def example_of(command: click.Command) -> str:
    """A file with all settings of a command at their defaults, each behind a #, and what they are."""
    lines = [
        f"# For `lorakit {command.name} --config FILE`: each setting at its default, and its variable in brackets."
    ]
    context = click.Context(command)
    for key, parameter in settings_of(command).items():
        meaning = parameter.meaning if isinstance(parameter, Described) else getattr(parameter, "help", None) or ""
        lines += [
            "",
            *wrap(f"{meaning} [{variable_of(parameter)}]", WIDTH, initial_indent="# ", subsequent_indent="# "),
        ]
        several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
        default = [] if several else parameter.get_default(context)
        lines.append(f"#{as_yaml(key, default if isinstance(default, str | int | float | list) else None)}")
    return "\n".join(lines) + "\n"


def _shown(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [MASK if at and _is_secret(value[at - 1]) else _shown("", word) for at, word in enumerate(value)]
    if not isinstance(value, str) or not value:
        return value
    flag, separator, _ = value.partition("=")
    if _is_secret(key):
        return MASK
    if separator and _is_secret(flag):  # --hf-token=…
        return f"{flag}={MASK}"
    return without_secrets(value) if "://" in value else value


def _is_secret(name: Any) -> bool:
    return isinstance(name, str) and _SECRET.search(name) is not None
