"""Digests are those of `sha256sum`."""

from __future__ import annotations

import subprocess
from hashlib import sha256
from pathlib import Path

from lorakit.files.digests import file_digest, folder_digest


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"2" * 100_000)
    (tmp_path / "a").write_bytes(b"")
    printed = subprocess.run(["sha256sum", "a", "b"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert file_digest(tmp_path / "b") == printed.split()[2].decode()
    assert folder_digest(tmp_path, ["b", "a"]) == sha256(printed).hexdigest()
