"""What a server is told, and how it travels from the supervisor to the gateway."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.errors import UsageError
from lorakit.server.settings import VARIABLE, Settings, from_environment, from_mapping, named_path


def test_all_of_it_survives_the_way_through_the_environment(tmp_path: Path) -> None:
    given = Settings(
        home=str(tmp_path), watch=("/a", "/b"), adapters={"sql": "/c"}, roots=("/d",), follow="best", max_loras=3,
        poll=0.1, quiet=1.0, load_wait=2.0, drain=5.0,
    )  # fmt: skip
    assert from_environment(given.as_environment()) == given


def test_single_variables_do_for_those_who_start_vllm_themselves() -> None:
    found = from_environment(
        {"LORAKIT_WATCH": f"/a{os.pathsep}b", "LORAKIT_ADAPTERS": f"sql=/c{os.pathsep}chat=d", "LORAKIT_FOLLOW": "best",
         "LORAKIT_HOME": "/home", "LORAKIT_ROOTS": "", "OTHER": "x"}
    )  # fmt: skip
    assert found.watch == ("/a", str(Path("b").absolute()))
    assert found.adapters == {"sql": "/c", "chat": str(Path("d").absolute())}
    assert (found.follow, found.home, found.roots) == ("best", "/home", ())


def test_nothing_said_is_the_defaults() -> None:
    assert from_environment({}) == Settings()


def test_an_unknown_key_is_an_error_that_offers_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'folow'; did you mean 'follow'"):
        from_mapping({"folow": "best"})
    with pytest.raises(UsageError, match=r"unknown setting 'zzzzz'$"):
        from_mapping({"zzzzz": 1})


@pytest.mark.parametrize("text", ["{", "3x", '{"follow": "newest"}', '{"surprise": 1}', "[]", "null"])
def test_what_cant_be_read_says_so(text: str) -> None:
    with pytest.raises(UsageError):
        from_environment({VARIABLE: text})


@pytest.mark.parametrize("text", ["", "sql", "=path", "sql=", "="])
def test_a_named_adapter_has_a_name_and_a_path(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=PATH"):
        named_path(text)


def test_a_path_may_hold_an_equals_sign() -> None:
    assert named_path("sql=/a=b") == ("sql", "/a=b")


def test_adapters_load_from_watched_folders_roots_and_named_ones_alone(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = Settings(watch=(str(tmp_path / "link"),), roots=("/r",), adapters={"a": "/x/y"}).allowed_roots
    assert found == (tmp_path / "real", Path("/r"), Path("/x/y"))


def test_the_home_is_the_environments_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", "/elsewhere")
    assert Settings().store_home == Path("/elsewhere")
    assert Settings(home="/here").store_home == Path("/here")
