"""`lorakit config`, and `lorakit serve --config`: flags, variables, a file and defaults, in that order."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.cli.config import show
from lorakit.cli.configured import settings_of, variable_of
from lorakit.cli.serve import command as serve
from lorakit.server.settings import SINGLE
from tests.cli.commands import lorakit
from tests.folders import write_adapter, write_base

Capture = pytest.CaptureFixture[str]
PAGE = Path(__file__).parents[2] / "docs" / "config.md"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for parameter in settings_of(serve).values():
        monkeypatch.delenv(variable_of(parameter), raising=False)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "serve.yaml"


def shown(capsys: Capture, *arguments: str | Path) -> dict[str, dict[str, Any]]:
    ended = lorakit(capsys, "config", "show", "--json", *arguments)
    assert ended.code == 0, ended
    return {setting["key"]: setting for setting in json.loads(ended.out)}


def test_a_flag_goes_before_a_variable_that_before_the_file_that_before_the_default(
    capsys: Capture, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("port: 1\nmax-loras: 2\nfollow: best\n")
    monkeypatch.setenv("LORAKIT_PORT", "3")
    monkeypatch.setenv("LORAKIT_MAX_LORAS", "4")
    told = shown(capsys, "--config", "serve.yaml", "--port", "5")
    assert [tuple(told[key].values()) for key in ("port", "max-loras", "follow", "host")] == [
        ("port", 5, "flag", ""),
        ("max-loras", 4, "env", "LORAKIT_MAX_LORAS"),
        ("follow", "best", "file", "serve.yaml:follow"),
        ("host", "127.0.0.1", "default", ""),
    ]


def test_whence_each_came_stands_behind_it_in_a_file_that_serve_takes(
    capsys: Capture, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_FOLLOW", "manual")
    arguments = (
        "models/llama",
        "--watch",
        "a: b # c",
        "--adapter",
        "sql=runs/sql",
        "--pin",
        "007",
        "--",
        "--seed",
        "7",
    )
    ended = lorakit(capsys, "config", "show", "--origin", *arguments)
    assert "follow: manual  # env LORAKIT_FOLLOW\n" in ended.out
    assert "base: models/llama  # flag\n" in ended.out
    assert "port: 8000  # default\n" in ended.out
    file.write_text(ended.out)
    again = shown(capsys, "--config", file)
    monkeypatch.delenv("LORAKIT_FOLLOW")
    before = shown(capsys, "--follow", "manual", *arguments)
    assert {key: one["value"] for key, one in again.items()} == {key: one["value"] for key, one in before.items()}


def test_names_may_have_dashes_or_underscores_and_one_may_stand_for_a_list(capsys: Capture, file: Path) -> None:
    file.write_text("max_loras: 3\nload-wait: 5\nwatch: runs\nadapter: {sql: runs/sql, chat: runs/chat}\npin: [a, b]\n")
    told = {key: setting["value"] for key, setting in shown(capsys, "--config", file).items()}
    assert (told["max-loras"], told["load-wait"], told["watch"]) == (3, 5.0, ["runs"])
    assert (told["adapter"], told["pin"]) == (["sql=runs/sql", "chat=runs/chat"], ["a", "b"])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("[--seed, 7]", ["--seed", "7"]),
        ("{seed: 7, enforce_eager: true, enable-prefix-caching: false}",
         ["--seed", "7", "--enforce-eager", "--no-enable-prefix-caching"]),
        ("{middleware: [a, b], hf-overrides: {x: 1}, quantization: null}",
         ["--middleware", "a", "b", "--hf-overrides", '{"x": 1}']),
    ],
)  # fmt: skip
def test_what_vllm_is_given_is_a_list_or_a_mapping(capsys: Capture, file: Path, said: str, words: list[str]) -> None:
    file.write_text(f"vllm: {said}")
    assert shown(capsys, "--config", file)["vllm"]["value"] == words


def test_what_stands_behind_the_dashes_is_never_the_base(capsys: Capture, file: Path) -> None:
    file.write_text("base: models/llama\nvllm: {seed: 1}\n")
    told = shown(capsys, "--config", file, "--", "--seed", "7")
    assert (told["base"]["value"], told["vllm"]["value"], told["vllm"]["origin"]) == (
        "models/llama", ["--seed", "7"], "flag",
    )  # fmt: skip
    ended = lorakit(capsys, "serve", "models/llama", "runs")
    assert (ended.code, "'runs' is one argument too many" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("portt: 1", "unknown key 'portt'; did you mean 'port'?"),
        ("zzzzzz: 1", "unknown key 'zzzzzz'; there are base, "),
        ("config: other.yaml", "unknown key 'config'"),
        ("dry-run: true", "unknown key 'dry-run'"),
        ("port: '8000'", 'port: it is "8000", and has to be a whole number'),
        ("port: true", "port: it is true, and has to be a whole number"),
        ("port: 80.5", "port: it is 80.5, and has to be a whole number"),
        ("port: 70000", "port: 70000 is not in the range"),
        ("max_loras: 0", "max_loras: 0 is not in the range"),
        ("follow: newest", "follow: 'newest' is not one of"),
        ("canary: soon", 'canary: it is "soon", and has to be a number'),
        ("metric: yes", "metric: it is true, and has to be text"),
        ("watch: [runs, 7]", "watch: it is 7, and has to be text"),
        ("watch: {a: b}", 'watch: it is {"a": "b"}, and has to be text'),
        ("adapter: {sql: 7}", "adapter: it is 7, and has to be text"),
        ("takeover: 1", "takeover: it is 1, and has to be true or false"),
        ("vllm: --seed 7", "vllm: it has to be a list of words, or a mapping"),
        ("vllm: [[--seed]]", "vllm: a list has to be of words and numbers alone"),
        ("port: 1\nport: 2", "the key 'port' stands twice"),
        ("max-loras: 1\nmax_loras: 2", "'max_loras' stands twice"),
        ("port: 010", "write 010 in plain digits"),
        ("- port", "has to hold settings"),
        ("port: [", "can't be read as YAML"),
        ("port: !!python/object:os.system {}", "can't be read as YAML"),
    ],
)
def test_what_a_file_cant_say_is_named_with_the_file_and_the_key(
    capsys: Capture, file: Path, said: str, error: str
) -> None:
    file.write_text(said)
    ended = lorakit(capsys, "serve", "--config", "serve.yaml")
    assert (ended.code, ended.out) == (2, "")
    assert "error: 'serve.yaml'" in ended.err
    assert error in ended.err


def test_a_file_that_is_not_there_is_not_found(capsys: Capture, file: Path) -> None:
    ended = lorakit(capsys, "serve", "--config", file)
    assert (ended.code, "there is no file" in ended.err) == (3, True)


def test_an_empty_file_says_nothing_and_an_empty_value_leaves_the_default(capsys: Capture, file: Path) -> None:
    file.write_text("")
    assert {one["origin"] for one in shown(capsys, "--config", file).values()} == {"default"}
    file.write_text("port:\nmode: null\n")
    assert {one["origin"] for one in shown(capsys, "--config", file).values()} == {"default"}


def test_a_variable_may_name_the_file(capsys: Capture, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("port: 9000\n")
    monkeypatch.setenv("LORAKIT_CONFIG", str(file))
    assert shown(capsys)["port"] == {"key": "port", "value": 9000, "origin": "file", "place": f"{file}:port"}


def test_variables_of_lists_are_split_as_those_that_vllm_is_started_with(
    capsys: Capture, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_WATCH", "runs:/more runs")
    monkeypatch.setenv("LORAKIT_ADAPTERS", "sql=runs/sql:chat=runs/chat")
    monkeypatch.setenv("LORAKIT_VLLM", """--seed 7 --hf-overrides '{"x": 1}'""")
    told = {key: setting["value"] for key, setting in shown(capsys).items()}
    assert (told["watch"], told["adapter"]) == (["runs", "/more runs"], ["sql=runs/sql", "chat=runs/chat"])
    assert told["vllm"] == ["--seed", "7", "--hf-overrides", '{"x": 1}']
    assert {variable_of(parameter) for parameter in settings_of(serve).values()} >= set(SINGLE)


def test_a_variable_that_is_nearly_one_is_pointed_out(
    capsys: Capture, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("URL", "API_KEY", "ENGINE_KEY", "SERVE", "RUNS", "INPUT_CHECKPOINT_DIR", "CONFIG"):
        monkeypatch.setenv(f"LORAKIT_{other}", "")
    assert lorakit(capsys, "config", "show").err == ""
    monkeypatch.setenv("LORAKIT_ADAPTER", "sql=runs/sql")
    ended = lorakit(capsys, "config", "show")
    assert (ended.code, ended.err) == (0, "note: LORAKIT_ADAPTER is no setting; did you mean LORAKIT_ADAPTERS?\n")


def test_secrets_are_not_printed(capsys: Capture, file: Path) -> None:
    file.write_text("vllm: {hf-token: hf_5ec4e7, seed: 7}\n")
    told = shown(capsys, "--config", file, "--engine", "http://me:5ec4e7@host:8001/")
    assert (told["vllm"]["value"], told["engine"]["value"]) == (
        ["--hf-token", "***", "--seed", "7"],
        ["http://host:8001/"],
    )
    assert shown(capsys, "--tls-key", "key.pem")["tls-key"]["value"] == "key.pem", "a path is none"
    assert shown(capsys, "--", "--hf-token=5ec4e7")["vllm"]["value"] == ["--hf-token=***"]


def test_what_is_shown_is_all_that_serve_takes(capsys: Capture) -> None:
    options = {name for parameter in serve.params for name in parameter.opts if name.startswith("--")}
    alone = {"--config", "--dry-run", "--json"}
    assert {f"--{key}" for key in shown(capsys)} == (options - alone) | {"--base", "--vllm"}
    assert options <= {name for parameter in show.params for name in parameter.opts} | {"--dry-run"}


def test_serve_does_what_its_file_says(capsys: Capture, file: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "models" / "llama")
    write_adapter(tmp_path / "runs" / "sql", rank=40)
    file.write_text("base: models/llama\nwatch: [runs]\nmax-loras: 3\nvllm: {seed: 7}\n")
    ended = lorakit(capsys, "serve", "--config", file, "--home", "home", "--dry-run", "--json")
    assert ended.code == 0, ended
    plan = json.loads(ended.out)
    assert (plan["base"], plan["max_lora_rank"], plan["command"][-2:]) == ("llama", 64, ["--seed", "7"])


def test_the_example_is_each_setting_at_its_default(capsys: Capture, file: Path) -> None:
    example = lorakit(capsys, "config", "example").out
    file.write_text(example)
    assert yaml.safe_load(example) is None, "as it stands it says nothing"
    file.write_text(re.sub(r"(?m)^#(?=[a-z])", "", example))
    assert yaml.safe_load(file.read_text()).keys() == shown(capsys).keys()
    assert {key: one["value"] for key, one in shown(capsys, "--config", file).items()} == {
        key: one["value"] for key, one in shown(capsys).items()
    }


def test_the_page_has_the_example_as_it_is_printed(capsys: Capture) -> None:
    example = lorakit(capsys, "config", "example").out
    assert f"```yaml\n{example}```" in PAGE.read_text(), "put what `lorakit config example` prints into docs/config.md"


def test_what_the_page_begins_with_is_taken(capsys: Capture, file: Path) -> None:
    first = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    assert first is not None
    file.write_text(first[1])
    told = shown(capsys, "--config", file)
    assert {key for key, setting in told.items() if setting["origin"] == "file"} == yaml.safe_load(first[1]).keys()
