"""`lorakit show`: what a folder holds, and the tree of what it was made of."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cli.commands import lorakit
from tests.folders import factors, linear_modules, stored, write_adapter, write_base

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def mixed(capsys: Capture, tmp_path: Path) -> Path:
    """again = 0.5 (0.7 one + 0.3 two) + 2 one."""
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, factors(linear_modules(), seed=seed), base_model_name_or_path="org/base")
    one, two, made = tmp_path / "one", tmp_path / "two", tmp_path / "made"
    assert lorakit(capsys, "mix", f"{one}=0.7", f"{two}=0.3", "--out", made / "mixed").code == 0
    assert lorakit(capsys, "mix", f"{made / 'mixed'}=0.5", f"{one}=2", "--out", made / "again").code == 0
    return made / "again"


def test_an_adapter_in_words(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "show", mixed)
    assert (ended.code, ended.err) == (0, "")
    facts, tree = ended.out.split("\n\n")
    said = dict(line.split(maxsplit=1) for line in facts.splitlines())
    assert said["kind"].startswith("adapter (LORA), written by lorakit mix ")
    assert (said["base"], said["rank"], said["modules"]) == ("org/base", "6", "6")
    assert said["tensors"] == "12 in F32"
    assert "method=linear" in said["settings"]
    assert [line.partition("  (")[0] for line in tree.splitlines()] == [
        f"{mixed}",
        f"├── 0.5 × {tmp_path / 'made' / 'mixed'}",
        f"│   ├── 0.7 × {tmp_path / 'one'}",
        f"│   └── 0.3 × {tmp_path / 'two'}",
        f"└── 2 × {tmp_path / 'one'}",
    ]


def test_what_lorakit_did_not_write_has_no_tree(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    out = lorakit(capsys, "show", tmp_path / "one").out
    assert "kind      adapter (LORA)\n" in out
    assert not {"settings", "error", "└"} & set(out.split())


def test_parents_that_are_gone_or_changed_are_marked(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "two").rename(tmp_path / "elsewhere")
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"")
    tree = lorakit(capsys, "show", mixed).out.split("\n\n")[1].splitlines()
    assert [line.rpartition("  ")[2] for line in tree[2:]] == ["(changed since)", "(gone)", "(changed since)"]


def test_as_data_the_tree_is_nested(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "show", mixed, "--json")
    data = json.loads(ended.out)
    file = mixed / "adapter_model.safetensors"
    assert (data["kind"], data["rank"], data["dtypes"], data["bytes"]) == ("adapter", 6, ["F32"], file.stat().st_size)
    assert [parent["weight"] for parent in data["lineage"]["parents"]] == [0.5, 2.0]
    grand = data["lineage"]["parents"][0]["parents"]
    assert [(parent["path"], parent["state"]) for parent in grand] == [
        (str(tmp_path / "one"), "there"),
        (str(tmp_path / "two"), "there"),
    ]


def test_a_merged_model(capsys: Capture, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    assert lorakit(capsys, "merge", f"{adapter}=0.5", "--out", tmp_path / "merged").code == 0
    out = lorakit(capsys, "show", tmp_path / "merged").out
    assert "kind      model (llama), written by lorakit merge" in out
    assert f"├── base {base}\n└── 0.5 × {adapter}\n" in out
    assert json.loads(lorakit(capsys, "show", base, "--json").out)["tensors"] == 10


def test_a_folder_of_adapters_is_a_table(capsys: Capture, mixed: Path) -> None:
    made = mixed.parent
    write_adapter(made / "step-9")
    write_adapter(made / "step-10")
    (made / "step-10" / "adapter_model.safetensors").write_bytes(b"cut short")
    ended = lorakit(capsys, "show", made)
    rows = [line.split() for line in ended.out.splitlines()]
    assert rows[0] == ["name", "operation", "rank", "norm", "error"]
    assert [row[:3] for row in rows[1:]] == [
        ["again", "mix", "6"],
        ["mixed", "mix", "4"],
        ["step-9", "-", "2"],
        ["step-10", "-", "-"],
    ]
    assert ended.err.startswith("note: ")
    data = json.loads(lorakit(capsys, "show", made, "--json").out)
    tensors = stored(made / "step-9")
    square = sum(
        float(np.linalg.norm(2 * tensors[name.replace("_A", "_B")] @ a) ** 2)
        for name, a in tensors.items()
        if "lora_A" in name
    )
    assert data["adapters"][2]["norm"] == pytest.approx(square**0.5)
    assert data["adapters"][0]["error"] == 0


def test_names_in_files_give_a_terminal_no_orders(capsys: Capture, mixed: Path) -> None:
    record = json.loads((mixed / "lorakit.json").read_text())
    record["operation"] = "\x1b]0;owned\x07"
    record["settings"] = {"method": "\u009b2J", "a\nb": "\u202e"}
    record["parents"][1]["path"] = "/nowhere/\x1b[31m[bold]red"
    (mixed / "lorakit.json").write_text(json.dumps(record))
    for path in (mixed, mixed.parent):
        ended = lorakit(capsys, "show", path)
        assert ended.code == 0
        assert "\\x1b]0;owned\\x07" in ended.out
        assert not {"\x1b", "\x07", "\u009b", "\u202e"} & {*ended.out, *ended.err}
    assert "2 × /nowhere/\\x1b[31m[bold]red  (gone)" in lorakit(capsys, "show", mixed).out


def test_on_a_terminal_the_same_is_drawn(mixed: Path) -> None:
    outputs = []
    for path in (mixed, mixed.parent):
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "lorakit", "show", str(path)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
        subprocess.run(command, stdout=slave, stderr=slave, check=True, env=environment, timeout=60)
        os.close(slave)
        outputs.append(os.read(master, 1 << 16).decode().replace("\r\n", "\n"))
        os.close(master)
    assert "├── 0.5 × " in outputs[0]
    assert "│   └── 0.3 × " in outputs[0]
    assert "operation" in outputs[1]
    assert "─" in outputs[1]


def test_the_exit_codes_of_what_can_not_be_shown(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (mixed / "lorakit.json").write_text("nonsense")
    assert lorakit(capsys, "show", tmp_path / "nowhere").code == 3
    assert lorakit(capsys, "show", empty).code == 4
    assert lorakit(capsys, "show", mixed).code == 4
    assert json.loads(lorakit(capsys, "show", mixed, "--json").out)["error"]["type"] == "InvalidFile"
