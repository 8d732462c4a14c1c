"""Bases of every family, each made once for all modules here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.merge.kinds import make_model


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("bases-of-adapters"), dict[str, Path]()

    def base(family: str) -> Path:
        if family not in made:
            made[family] = make_model(folder / family, family)
        return made[family]

    return base
