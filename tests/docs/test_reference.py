"""The reference pages leave nothing out of what the code has."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

import lorakit
import lorakit.errors
from docs.reference import MADE, pages
from lorakit.cli.main import cli
from lorakit.server.requests.asking import MODEL_ROUTES
from tests.docs.pages import PAGES


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


@pytest.mark.parametrize("name", ["commands", "http", "metrics", "errors", "python"])
def test_each_page_says_that_it_was_made(made: dict[str, str], name: str) -> None:
    assert made[f"reference/{name}.md"].splitlines()[2] == MADE


def test_every_verb_with_every_option_is_told(made: dict[str, str]) -> None:
    page = made["reference/commands.md"]
    sections = dict(re.findall(r"^##+ lorakit ([\w -]+) \{ #[\w-]+ \}\n(.*?)(?=^##|\Z)", page, re.M | re.S))
    commands = dict(below("", cli))
    assert sections.keys() == commands.keys()
    for name, command in commands.items():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden and option.name != "help":
                assert all(flag in sections[name] for flag in option.opts), (name, option.opts)


def below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """The commands of a group, and theirs."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield f"{name} {each}".strip(), found
            yield from below(each, found)


def test_every_route_is_told_with_its_answers(made: dict[str, str]) -> None:
    page = made["reference/http.md"]
    for route in MODEL_ROUTES:
        assert f"- `POST {route}`\n" in page
    for route in (
        "GET /ready", "GET /metrics", "GET /v1/models", "GET /v1/adapters", "POST /v1/adapters",
        "GET /v1/adapters/{name}", "DELETE /v1/adapters/{name}", "PUT /v1/adapters/{name}/aliases/{alias}",
        "GET /v1/adapters/{name}/comparison", "POST /v1/adapters/{name}/rollback", "GET /v1/events", "GET /v1/mixes",
        "POST /v1/mixes",
        "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter", "GET /v1/fine_tuning/jobs", "POST /generate",
        "GET /v1/adapters/{name}/losses", "GET /v1/comparisons", "GET /v1/key",
    ):  # fmt: skip
        (section,) = re.findall(rf"^### `{re.escape(route)}`\n(.*?)(?=^##|\Z)", page, re.M | re.S)
        assert re.search(r"^\| 20[01] \| ", section, re.M)
    assert "| `source` | string | required |" in page


def test_every_metric_is_told_here_and_where_one_reads_about_it(made: dict[str, str]) -> None:
    told = {name: labels for name, _, labels, _ in cells(made["reference/metrics.md"])}
    assert len(told) > 20
    explained = {
        name: labels
        for names, labels, *_ in cells(PAGES["observing.md"])
        for name in re.findall(r"`((?:lorakit_|vllm:)\w+)`", names)
    }
    assert {name.strip("`"): labels for name, labels in told.items()} == explained


def cells(page: str) -> list[list[str]]:
    """Of each row of a page's tables, heads left out."""
    rows = re.findall(r"^\| ?(`.*) \|$", page, re.M)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_every_error_is_told_with_its_code(made: dict[str, str]) -> None:
    page = made["reference/errors.md"]
    for name, error in vars(lorakit.errors).items():
        if isinstance(error, type) and issubclass(error, lorakit.errors.LorakitError):
            assert re.search(rf"^\| (?:&emsp;)*`{name}` \| {error.code} \| \d+ \| .+ \|$", page, re.M), name
    assert "| `TooMany` | 429 |" in page
    assert re.search(r"`NotFound` \| 3 \| 404 \|", page)


def test_every_public_name_is_told(made: dict[str, str]) -> None:
    page = made["reference/python.md"]
    for name in {*lorakit.__all__} - {"__version__"}:
        assert f"### `lorakit.{name}` " in page
    assert "#### `Adapter.save` " in page
    assert "- `dtype`: " in page


def test_nothing_is_said_of_where_it_was_made(made: dict[str, str]) -> None:
    assert not [text for text in made.values() if re.search(r"0x[0-9a-f]{6,}|/(root|home|tmp|work)/\w", text)]
