"""Digests are those of `sha256sum`."""

from __future__ import annotations

import subprocess
from hashlib import sha256
from pathlib import Path

from lorakit.files.digests import file_digest, folder_digest, sampled_digest


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"2" * 100_000)
    (tmp_path / "a").write_bytes(b"")
    printed = subprocess.run(["sha256sum", "a", "b"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert file_digest(tmp_path / "b") == printed.split()[2].decode()
    assert folder_digest(tmp_path, ["b", "a"]) == sha256(printed).hexdigest()


def test_a_sampled_digest_tells_sizes_and_contents_apart(tmp_path: Path) -> None:
    contents = [b"", b"1", b"2", b"1" * 10_000_000, b"1" * 10_000_001, b"1" * 5_000_000 + b"2" * 5_000_000]
    digests = []
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
        digests.append(sampled_digest(tmp_path / str(number)))
    assert len(set(digests)) == len(contents)
    (tmp_path / "copy").write_bytes(contents[-1])
    assert sampled_digest(tmp_path / "copy") == digests[-1]
