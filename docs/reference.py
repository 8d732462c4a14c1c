"""The reference pages, made from the code as the site is built (`make docs`); none of them is a file.

MkDocs calls `on_files` (mkdocs.yml, `hooks`). `pages()` is what it adds, by path under docs/.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import click

MADE = "*Made from the code by `docs/reference.py`, as the site was built.*"


def pages() -> dict[str, str]:
    known = _server()
    return {
        "reference/commands.md": commands(),
        "reference/http.md": http(known),
        "reference/metrics.md": metrics(known),
        "reference/errors.md": errors(),
        "reference/python.md": python(),
    }


def on_files(files: Any, config: Any) -> Any:
    """Put the pages beside those that are files."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


# The command line


def commands() -> str:
    from lorakit.cli.main import cli

    context = click.Context(cli, info_name="lorakit")
    verbs = [_command(name, cli.get_command(context, name), context) for name in cli.list_commands(context)]
    return _page(
        "Command line",
        "Data goes to stdout, all else to stderr; `--json` prints the same as data. What the exit codes mean stands "
        "under [Errors](errors.md).",
        *verbs,
    )


def _command(name: str, command: click.Command | None, above: click.Context, level: str = "##") -> str:
    assert command is not None
    context = click.Context(command, info_name=name, parent=above)
    path = context.command_path
    parts = [f"{level} {path} {{ #{path.removeprefix('lorakit ').replace(' ', '-')} }}"]
    parts += [_code(" ".join([path, *command.collect_usage_pieces(context)])), *_paragraphs(command.help or "")]
    if options := [(f"`{names}`", _plain(_joined(about))) for names, about in _options(command, context)]:
        parts.append(_table(("option", "what it does"), options))
    if isinstance(command, click.Group):
        under = command.list_commands(context)
        parts += [_command(each, command.get_command(context, each), context, level + "#") for each in under]
    return "\n\n".join(parts)


def _options(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    for option in command.get_params(context):
        if isinstance(option, click.Option) and option.name != "help" and (record := option.get_help_record(context)):
            yield record


def _paragraphs(help: str) -> Iterator[str]:
    """Click's help: what follows a `\\b` stands as it is."""
    for paragraph in inspect.cleandoc(help).split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield _code(paragraph.removeprefix("\b\n"))
        else:
            yield _plain(_joined(paragraph))


# HTTP


def _server() -> Any:
    """What a server knows that serves nothing, on no engine: enough to be asked for its routes and metrics."""
    from lorakit.server.engines.engine import Limits
    from lorakit.server.following.served import Served
    from lorakit.server.settings import Settings

    engine: Any = SimpleNamespace(limits=Limits("base", "base", 1, 16, "none", True))
    nothing: Any = None
    return Served(Settings(), engine, nothing)


def description(known: Any) -> dict[str, Any]:
    """The OpenAPI description of lorakit's own routes."""
    from lorakit.server.described import whole_description
    from lorakit.server.routes import routes_for
    from lorakit.server.sight.metrics import Metrics

    unasked: Any = None
    return whole_description(routes_for(known, Metrics(known), unasked, unasked).openapi())


def http(known: Any) -> str:
    from lorakit.server.requests.asking import BASE_IF_NONE, WITH_MODEL

    described = description(known)
    schemas = described["components"]["schemas"]
    by_tag: dict[str, list[str]] = {}
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            (tag,) = operation["tags"]
            by_tag.setdefault(tag, []).append(_operation(method.upper(), path, operation, schemas))
    return _page(
        "HTTP",
        "A running server tells the same at `/openapi.json`, together with its engine's own routes, and shows it at "
        "`/docs`. Where there are [keys](../keys.md), each request carries one: `Authorization: Bearer KEY`. Errors "
        'have OpenAI\'s shape, `{"error": {"message", "type", "param", "code"}}`, LoRAX\'s routes excepted.',
        "## What asks a model",
        "The engine answers these; lorakit finds the revision that `model` means, and names it in the answer and in "
        "`x-lorakit-revision`. Their bodies and answers are vLLM's.",
        _list(f"`POST {path}`" for path in sorted(WITH_MODEL)),
        "Of these the base is asked where they name no model:",
        _list(f"`POST {path}`" for path in sorted(BASE_IF_NONE)),
        *(part for tag, operations in by_tag.items() for part in (f"## {_titles.get(tag, tag)}", *operations)),
        "## Bodies",
        *(_schema(name, schemas[name]) for name in sorted(_bodies(schemas, described["paths"]))),
    )


_titles = {"lorakit": "lorakit's own", "LoRAX": "LoRAX's"}


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = [f"### `{method} {path}`", _plain(_joined(operation.get("description", "")))]
    asked = [
        (f"`{each['name']}`", each["in"], _type(each["schema"]), _default(each["schema"]))
        for each in operation.get("parameters", ())
    ]
    if asked:
        parts.append(_table(("parameter", "where", "type", "default"), asked))
    if body := operation.get("requestBody"):
        parts.append(f"Body: {_type(body['content']['application/json']['schema'])}.")
    answers = sorted(operation["responses"].items())
    parts.append(_table(("status", "meaning"), [(code, _plain(said["description"])) for code, said in answers]))
    return "\n\n".join(parts)


def _bodies(schemas: dict[str, Any], paths: dict[str, Any]) -> set[str]:
    """What requests hold, and what that holds."""
    found: set[str] = set()
    operations = [operation for path in paths.values() for operation in path.values()]
    new = _named_in([operation.get("requestBody") for operation in operations])
    while new:
        found |= new
        new = {inner for name in new for inner in _named_in(schemas[name])} - found
    return found


def _named_in(schema: Any) -> set[str]:
    return set(re.findall(r"#/components/schemas/(\w+)", str(schema)))


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (f"`{field}`", _type(how), "required" if field in required else _default(how))
        for field, how in schema.get("properties", {}).items()
    ]
    about = _plain(_joined(schema.get("description", "")))
    return "\n\n".join([f"### {name}", about, _table(("field", "type", "default"), rows)])


def _type(schema: dict[str, Any]) -> str:
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if either := schema.get("anyOf"):
        return " or ".join(_type(each) for each in either)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


def _default(schema: dict[str, Any]) -> str:
    return f"`{schema['default']}`" if "default" in schema else ""


# Metrics


def metrics(known: Any) -> str:
    from lorakit.server.sight.levels import levels
    from lorakit.server.sight.metrics import Metrics
    from lorakit.server.sight.tallies import Count, Times

    kinds = {Count: "counter", Times: "histogram"}
    counted = [tally for tally in vars(Metrics(known)).values() if isinstance(tally, Count | Times)]
    rows = []
    for tally in sorted([*counted, *levels(known)], key=lambda tally: tally.name):
        name = f"{tally.name}_total" if isinstance(tally, Count) else tally.name
        labels = ", ".join(f"`{label}`" for label in tally.labels)
        rows.append((f"`{name}`", kinds.get(type(tally), "gauge"), labels, _plain(tally.about)))
    return _page(
        "Metrics",
        "`GET /metrics` has these beside the engine's own. What an `alias` is there, and what to look at, stands under "
        "[Seeing what a server does](../observing.md).",
        _table(("name", "type", "labels", "what it says"), rows),
    )


# Errors


def errors() -> str:
    import lorakit.errors
    from lorakit.server.requests.asking import REFUSALS
    from lorakit.server.routes import STATUS

    statuses = {error: status for error, status, *_ in (*STATUS, *REFUSALS)}
    everywhere, of_a_server = [], []
    for depth, error in _tree(lorakit.errors.LorakitError):
        status = str(next(statuses[above] for above in error.__mro__ if above in statuses))
        name, about = f"`{error.__name__}`", _first_line(error)
        if error.__module__ == lorakit.errors.__name__:
            everywhere.append(("&emsp;" * depth + name, str(error.code), status, about))
        elif error in statuses:
            of_a_server.append((name, status, about))
    codes = [("0", "done"), ("1", "failed"), ("2", "usage"), ("3", "not found"), ("4", "refused by validation"),
             ("5", "conflict, or in use"), ("130", "interrupted")]  # fmt: skip
    return _page(
        "Errors",
        "A message says what was found, where, and what to do. Programs tell errors apart by the exit code, with "
        "`--json` by `error.type` on stdout, over HTTP by the status, and in Python by the class.",
        "## Exit codes",
        _table(("code", "meaning"), codes),
        "## Classes",
        "All are in `lorakit.errors`; the status is what a server answers where one reaches a client.",
        _table(("class", "exit code", "HTTP status", "meaning"), everywhere),
        "## Of a server alone",
        _table(("class", "HTTP status", "meaning"), sorted(of_a_server, key=lambda row: row[1])),
    )


def _tree(error: type[Any], depth: int = 0) -> Iterator[tuple[int, type[Any]]]:
    yield depth, error
    for under in error.__subclasses__():
        yield from _tree(under, depth + 1)


def _first_line(documented: Any) -> str:
    return _plain(_joined((inspect.getdoc(documented) or "").partition("\n\n")[0]))


# Python


def python() -> str:
    import lorakit

    names = sorted(name for name in lorakit.__all__ if name != "__version__")
    objects = {name: getattr(lorakit, name) for name in names}
    functions = {name: found for name, found in objects.items() if not inspect.isclass(found)}
    classes = {name: found for name, found in objects.items() if inspect.isclass(found)}
    return _page(
        "Python",
        "`import lorakit` imports no torch: each name loads its module when it is first used.",
        "## Functions",
        *(_documented("###", f"lorakit.{name}", found, name.replace("_", "-")) for name, found in functions.items()),
        "## Classes",
        *(_class(name, found) for name, found in classes.items()),
    )


def _class(name: str, found: type[Any]) -> str:
    parts = [_documented("###", f"lorakit.{name}", found, name)]
    for member, value in vars(found).items():
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        is_one = inspect.isfunction(value) or isinstance(value, property)
        if is_one and inspect.getdoc(value) and not member.startswith("_"):
            parts.append(_documented("####", f"{name}.{member}", value, f"{name}-{member}"))
    return "\n\n".join(parts)


def _documented(level: str, name: str, found: Any, anchor: str) -> str:
    parts = [f"{level} `{name}` {{ #{anchor} }}"]
    if not isinstance(found, property) and (signature := _signature(name, found)):
        parts.append(_code(signature, "python"))
    return "\n\n".join([*parts, *_sections(inspect.getdoc(found) or "")])


def _signature(name: str, found: Any) -> str:
    try:
        signature = inspect.signature(found)
    except ValueError:  # an exception takes whatever Exception does
        return ""
    shown: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        annotation = parameter.annotation
        words = parameter.name if annotation is parameter.empty else f"{parameter.name}: {annotation}"
        if parameter.default is not parameter.empty:
            plain = type(parameter.default) in (int, float, str, bool, tuple, type(None))
            words += f" = {parameter.default!r}" if plain else " = ..."
        if parameter.kind is parameter.KEYWORD_ONLY and not any(each.startswith("*") for each in shown):
            shown.append("*")
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        shown.append(stars.get(parameter.kind, "") + words)
    returned = "" if signature.return_annotation in (signature.empty, "None") else f" -> {signature.return_annotation}"
    one_line = f"{name}({', '.join(shown)}){returned}"
    if len(one_line) <= 100:
        return one_line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){returned}"


def _sections(documentation: str) -> Iterator[str]:
    """A docstring: paragraphs, and what stands under `Args:` and `Raises:` as a list."""
    for block in documentation.split("\n\n"):
        head, _, rest = block.partition("\n")
        if head in ("Args:", "Raises:"):
            items = re.findall(r"^ {4}(\S[^:]*): (.*(?:\n {5,}.*)*)", rest, re.M)
            yield f"**{'Arguments' if head == 'Args:' else 'Raises'}**"
            yield _list(f"`{name}`: {_plain(_joined(about))}" for name, about in items)
        elif head.startswith(("    ", ">>>")):
            yield _code(inspect.cleandoc(block), "python")
        elif block:
            yield _plain(_joined(block))


# Markdown


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", MADE, *(part for part in parts if part)]) + "\n"


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{inspect.cleandoc(text)}\n```"


def _joined(text: str) -> str:
    return " ".join(text.split())


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _plain(text: str) -> str:
    """With what Markdown would take for its own held back, but not between backticks."""
    parts = re.split(r"(``?[^`]+``?)", text)
    return "".join(part if part.startswith("`") else _held_back(part) for part in parts)


def _held_back(text: str) -> str:
    return re.sub(r"([*_\[\]{}|])", r"\\\1", text.replace("<", "&lt;"))
