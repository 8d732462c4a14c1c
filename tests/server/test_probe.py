"""An engine and PEFT, asked for the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import load_file, save_file

from lorakit.convert.adapters.convert import convert_adapter
from lorakit.convert.answers import Check
from lorakit.errors import EngineFailed
from lorakit.server import probe
from lorakit.server.probe import Compared

BASE = (-5.0, -4.0, -3.0)


def said(peft: tuple[float, ...], engine: tuple[float, ...], dtype: str = "float32") -> bool | None:
    return Compared(BASE, peft, engine, dtype).answer().ok


def test_what_answers_as_peft_does_within_rounding_is_right() -> None:
    assert said((-1.0, -2.0, -9.0), (-1.001, -2.0, -9.0)) is True
    assert said((-1.0, -2.0, -9.0), (-1.1, -2.0, -9.0), "bfloat16") is True


def test_what_answers_as_the_base_or_as_half_of_the_adapter_is_wrong() -> None:
    assert said((-1.0, -2.0, -9.0), BASE) is False
    assert said((-1.0, -2.0, -9.0), (-3.0, -3.0, -6.0)) is False


def test_an_adapter_that_changes_next_to_nothing_tells_nothing() -> None:
    assert said((-5.001, -4.0, -3.0), BASE) is None
    assert said((-5.1, -4.0, -3.0), (-5.1, -4.0, -3.0), "bfloat16") is None


ENDS = """
import sys
print("ValueError: no such thing")
print("RuntimeError: Engine core initialization failed. See root cause above.")
sys.exit(1)
"""
HANGS_UP = """
import socket, sys
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    for _ in range(9):
        listening.accept()[0].close()
"""


@pytest.mark.parametrize(("program", "said"), [(ENDS, "ValueError: no such thing"), (HANGS_UP, "gave no answer")])
def test_an_engine_that_refuses_the_adapter_is_an_answer_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, materials: tuple[Path, list[Path]], program: str, said: str
) -> None:
    asked: list[dict[str, Any]] = []

    def command(*_: object, **settings: Any) -> list[str]:
        asked.append(settings)
        return [sys.executable, "-c", program, settings["socket"]]

    monkeypatch.setattr(probe, "plain_command", command)
    base, adapters = materials
    found = probe.probe(adapters[0], adapters[0], str(base))
    assert (found.name, found.ok) == ("probe", False)
    assert said in str(found.reason)
    assert "lorakit merge" in str(found.cure)
    assert (asked[0]["extra"], asked[0]["rank"]) == (["--dtype", "float32"], 8)


def test_without_vllm_the_rest_of_the_verdict_stays(
    monkeypatch: pytest.MonkeyPatch, materials: tuple[Path, list[Path]]
) -> None:
    def missing() -> NoReturn:
        raise EngineFailed("vLLM is not installed: pip install it")

    monkeypatch.setattr(probe, "installed", missing)
    found = probe.probe(materials[1][0], materials[1][0], str(materials[0]))
    assert found == Check("probe", None, "vLLM is not installed", "pip install it")


def probed(adapter: Path, base: Path, *more: str) -> tuple[int, dict[str, object]]:
    command = [sys.executable, "-m", "lorakit", "check", str(adapter), "--base", str(base), "--probe", "--json", *more]
    ended = subprocess.run(command, capture_output=True, text=True)
    answers = {check["name"]: check for check in json.loads(ended.stdout)["checks"]}
    return ended.returncode, answers["probe"]


@pytest.mark.slow
def test_check_asks_a_real_engine_when_told_to(materials: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = materials
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "adapter_config.json").write_text((adapters[0] / "adapter_config.json").read_text())
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, raw / "adapter_model.safetensors", metadata={"format": "pt"})
    code, answer = probed(raw, base)  # which vLLM refuses as it is, and gets repaired
    assert answer["ok"] is None or (code, answer["ok"]) == (0, True)
    code, answer = probed(adapters[0], base)
    assert (code, answer["ok"]) == (0, True), answer


@pytest.mark.slow
def test_an_adapter_that_is_served_otherwise_than_peft_has_it_is_found(
    materials: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = materials
    assert probe.probe(adapters[0], adapters[1], str(base)).ok is False
    convert_adapter(adapters[0], tmp_path / "out", base=str(base))
    assert probe.probe(adapters[0], tmp_path / "out", str(base)).ok is True
