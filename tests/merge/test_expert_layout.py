"""What an adapter's own words say of how its factors were packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.config import AdapterConfig
from lorakit.errors import UnsupportedAdapter
from lorakit.merge.expert_layout import has_input_first, is_grouped_by_expert


def config(**raw: Any) -> AdapterConfig:
    return AdapterConfig(rank=2, alpha=4.0, raw=raw)


@pytest.mark.parametrize(
    ("version", "plain", "transposed"),
    [
        ("0.17.0", True, True),
        ("0.18.1", True, True),
        ("0.19.0", True, False),
        ("0.19.1", False, True),
        ("0.21.2", False, True),
        ("0.20.1.dev0@abc", False, True),
        ("0.18.0.dev0", True, True),
    ],
)
def test_the_side_of_the_input_is_the_version_s(version: str, plain: bool, transposed: bool) -> None:
    settings = config(peft_version=version)
    assert has_input_first(settings, name="a", module="m", layout=None, is_transposed=False) is plain
    assert has_input_first(settings, name="a", module="m", layout=None, is_transposed=True) is transposed


@pytest.mark.parametrize("version", [None, "", "main", "0.18.2.dev0", "0.19.0.dev0", "0.19.1.dev0@1a2b"])
def test_a_version_that_does_not_tell_is_asked_for(version: str | None) -> None:
    settings = config(peft_version=version)
    with pytest.raises(UnsupportedAdapter, match=r"--expert-layout peft for 0.19.1 and later"):
        has_input_first(settings, name="a", module="m", layout=None, is_transposed=False)
    assert has_input_first(settings, name="a", module="m", layout="peft-0.18", is_transposed=False)
    assert not has_input_first(settings, name="a", module="m", layout="unsloth", is_transposed=False)


def test_an_unknown_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match="unknown lora_B_layout 'zigzag'"):
        is_grouped_by_expert(config(lora_B_layout="zigzag"), tmp_path, name="a", layout="peft")


def test_an_adapter_of_peft_has_peft_s_order(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff made with PEFT")
    assert not is_grouped_by_expert(config(), tmp_path, name="a", layout=None)
