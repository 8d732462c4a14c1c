"""What the fast tests of the server share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base made of numbers alone, for the tests on a fake engine."""
    from tests.folders import write_base

    return write_base(tmp_path_factory.mktemp("bases") / "numbers")
