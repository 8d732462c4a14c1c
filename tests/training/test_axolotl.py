"""The plugin for axolotl, against the part of its interface that it uses: axolotl itself is not installed here."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lorakit.errors import LorakitError, UsageError
from lorakit.training import Interruptible, KeepCheckpoints, LoadStates, SaveOnRequest, SaveState
from tests.training.trainer import tiny_trainer


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "lorakit.training.axolotl", raising=False)
    return import_module("lorakit.training.axolotl").LorakitPlugin()


@pytest.fixture
def retention(tmp_path: Path) -> Path:
    file = tmp_path / "keep.yaml"
    file.write_text("keep_last: 1\n")
    return file


def config(plugin: Any, **said: Any) -> dict[str, Any]:
    """As axolotl makes it: its own model, mixed with that of the plugin, and dumped without what is None."""
    module, _, name = plugin.get_input_args().rpartition(".")
    mixed = type("Config", (type("Base", (BaseModel,), {}), getattr(import_module(module), name)), {})
    validated: dict[str, Any] = mixed.model_validate(said).model_dump(exclude_none=True)
    return validated


def kinds(callbacks: list[Any]) -> list[type]:
    return [type(callback) for callback in callbacks]


def test_without_a_section_it_saves_when_asked_and_when_interrupted(plugin: Any) -> None:
    assert kinds(plugin.add_callbacks_post_trainer(config(plugin), None)) == [SaveOnRequest, Interruptible]


def test_the_section_says_what_there_is(plugin: Any, retention: Path) -> None:
    said = {
        "save_on_request": False, "keep": str(retention), "save_state": {"every": 5},
        "load_states": {"checkpoint": "runs/sql", "strict": False},
    }  # fmt: skip
    made = plugin.add_callbacks_post_trainer(config(plugin, lorakit=said), None)
    assert kinds(made) == [LoadStates, SaveState, KeepCheckpoints, Interruptible]


def test_what_to_keep_may_stand_in_the_section_itself(plugin: Any) -> None:
    said = {"keep": {"keep_last": 3, "keep_best": {"count": 2}}, "keep_earlier": True}
    assert KeepCheckpoints in kinds(plugin.add_callbacks_post_trainer(config(plugin, lorakit=said), None))
    with pytest.raises(UsageError, match="keep_last"):
        plugin.add_callbacks_post_trainer(config(plugin, lorakit={"keep": {"keep_lats": 3}}), None)


@pytest.mark.parametrize("section", [{"keeep": "x"}, {"save_state": {}}, {"every_steps": 0}])
def test_a_mistake_in_the_section_is_an_error(plugin: Any, section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(plugin, lorakit=section)


def test_axolotls_own_default_limit_does_not_undo_what_is_kept(plugin: Any, retention: Path, tmp_path: Path) -> None:
    said = config(plugin, lorakit={"keep": str(retention)})
    trainer = tiny_trainer(tmp_path / "run", save_total_limit=4)
    for callback in plugin.add_callbacks_post_trainer(said, trainer):
        trainer.add_callback(callback)
    plugin.post_trainer_create(said, trainer)
    trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"save_total_limit": 4, "lorakit": {"keep": {"keep_last": 1}}}, UsageError, "leave one of them out"),
        ({"lorakit": {"keep": {"keep_lats": 1}}}, UsageError, "keep_last"),
        ({"lorakit": {"keep": "there/is/none.yaml"}}, LorakitError, "there/is/none.yaml"),
        ({"lorakit": {"save_state": {"states": "modle", "every": 1}}}, UsageError, "modle"),
        ({"lorakit": {"keeep": "x"}}, ValidationError, "lorakit.keeep"),
    ],
)
def test_a_mistake_is_told_before_any_model_is_loaded(
    plugin: Any, said: dict[str, Any], error: type[Exception], words: str
) -> None:
    """axolotl registers its plugins with what the file says, before it looks at any of it itself."""
    with pytest.raises(error, match=re.escape(words)):
        plugin.register(said)


def test_without_mistakes_nothing_is_said_or_done(plugin: Any, retention: Path) -> None:
    plugin.register({})
    plugin.register({"save_total_limit": 4})
    plugin.register({"lorakit": {"keep": str(retention), "save_state": {"every": 5}}})
