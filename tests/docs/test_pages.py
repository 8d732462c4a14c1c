"""The commands of every page are such; those of `console` blocks are run, and print what the page says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from lorakit.cli.main import VERBS, cli
from tests.checkpoints.written import evaluated, finish
from tests.cli.commands import lorakit
from tests.docs.pages import PAGES, Shown, command_lines, named, sessions
from tests.folders import factors, linear_modules, write_adapter, write_base
from tests.readme import blocks

RUN_FOR_REAL = {"tutorial.md", "howto/canary.md"}  # by tests/docs/test_tutorial.py, and test_canary.py
LINES = sorted({(page, shlex.join(line)) for page, text in PAGES.items() for line in command_lines(text)})
RUN = [page for page, text in PAGES.items() if sessions(text) and page not in RUN_FOR_REAL]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The verb, or the one below it, and its arguments."""
    command: click.Command = cli
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"no such command: {words[0]}"
        command, words = found, words[1:]
    return command, words


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a run of two checkpoints, and an adapter beside it."""
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "models" / "llama", hidden_size=8, num_attention_heads=2)
    for step, train_loss, eval_loss in ((500, 1.4, 1.3), (1000, 1.0, 1.1)):
        folder = tmp_path / "runs" / "sql" / f"checkpoint-{step}"
        write_adapter(folder, factors(linear_modules(), seed=step), base_model_name_or_path="models/llama")
        finish(folder, [{"step": step, "loss": train_loss}, evaluated(step, eval_loss)])
    write_adapter(tmp_path / "runs" / "chat", factors(linear_modules(), seed=7), base_model_name_or_path="models/llama")
    return tmp_path


@pytest.mark.parametrize(("page", "line"), LINES, ids=[line for _, line in LINES])
def test_every_command_line_can_be_read(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "serve.yaml").write_text("base: models/llama\n")
    command, words = command_of(shlex.split(line)[1:])
    command.make_context(line, words)


@pytest.mark.parametrize("page", PAGES)
def test_what_the_text_names_is_there(page: str) -> None:
    for said in named(PAGES[page]):
        words = said.split()
        assert words[1] in VERBS or words[1].startswith("-"), said
        flags = re.findall(r"--[a-z][a-z-]+", said.partition(" -- ")[0]) if words[1] in VERBS else []
        command, _ = command_of(words[1:] if words[1] in VERBS else ["serve"])
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(flags) <= known | {"--help"}, said


@pytest.mark.parametrize("page", RUN)
def test_what_is_shown_is_what_comes(page: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in blocks("json", PAGES[page]):
        json.loads(given)
        (workplace / "weights.json").write_text(given)
    for shown in sessions(PAGES[page]):
        ended = lorakit(capsys, *shlex.split(shown.command)[1:])
        assert ended.code == 0, ended.err
        printed = ended.out + ended.err, ended.err + ended.out
        assert any(map(shown.is_what, printed)), f"$ {shown.command}\n{ended.out}{ended.err}"


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks("python", text)])
def test_every_python_block_can_be_read(page: str) -> None:
    for block in blocks("python", PAGES[page]):
        compile(block, page, "exec")


def test_three_dots_stand_for_anything_and_nothing_else_does() -> None:
    assert Shown("", "a ... c\n").is_what("a b\nb c")
    assert Shown("", "a  b").is_what("a b\n")
    assert not Shown("", "a b ...").is_what("b a b")
    assert not Shown("", "a.c").is_what("abc")
