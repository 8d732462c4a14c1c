"""Before a server listens: its key, and who reaches it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.errors import NotFound, Refused
from lorakit.server.access.at_start import is_loopback, key_from_file, refuse_open_door
from lorakit.store.keys import Allowance, KeyStore
from tests.cli.commands import Ended, lorakit
from tests.folders import write_base


def test_a_key_is_what_stands_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text("abc-DEF_123\n")
    assert key_from_file(file) == "abc-DEF_123"
    reading, writing = os.pipe()
    os.write(writing, b"piped")
    os.close(writing)
    assert key_from_file(Path(f"/dev/fd/{reading}")) == "piped"
    os.close(reading)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o606, 0o601])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "key"
    file.write_text("sekret")
    file.chmod(mode)
    with pytest.raises(Refused, match="chmod 600") as refused:
        key_from_file(file)
    assert "sekret" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"two\nlines", b"\xff\xfe", "ключ".encode(), b"x" * 5000]
)
def test_a_file_without_one_key_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_bytes(content)
    with pytest.raises(Refused, match="one key"):
        key_from_file(file)


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFound):
            key_from_file(path)


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.7", False), ("192.168.1.1", False), ("169.254.1.1", False), ("8.8.8.8", False)],
)  # fmt: skip
def test_only_the_loopback_is_this_machines_alone(host: str, is_own: bool) -> None:
    assert is_loopback(host) == is_own


def test_an_address_of_all_takes_a_key_that_counts(tmp_path: Path) -> None:
    refuse_open_door("127.0.0.1", tmp_path, has_own_key=False)
    refuse_open_door("0.0.0.0", tmp_path, has_own_key=True)
    with pytest.raises(Refused, match="lorakit key create"):
        refuse_open_door("0.0.0.0", tmp_path, has_own_key=False)
    assert list(tmp_path.iterdir()) == [], "to look makes no store"
    store = KeyStore(tmp_path)
    _, key = store.create(Allowance())
    refuse_open_door("0.0.0.0", tmp_path, has_own_key=False)
    store.revoke(key.id)
    store.close()
    with pytest.raises(Refused, match="--allow-no-key"):
        refuse_open_door("0.0.0.0", tmp_path, has_own_key=False)


def test_serve_refuses_an_open_door_and_shows_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text("sekret")
    monkeypatch.setenv("LORAKIT_API_KEY", "")  # and back again afterwards

    def serve(*flags: str | Path) -> Ended:
        return lorakit(capsys, "serve", base, "--home", tmp_path / "home", "--dry-run", *flags)

    shut = serve("--host", "0.0.0.0")
    assert (shut.code, "lorakit key create" in shut.err) == (4, True)
    given = serve("--host", "0.0.0.0", "--api-key-file", tmp_path / "key")
    assert given.code == 0, given.err
    assert given.key == "sekret", "as the engine's process inherits it"
    assert "--middleware" in given.out
    assert "sekret" not in given.out + given.err
    assert serve("--host", "0.0.0.0", "--allow-no-key").code == 0
    assert serve("--api-key", "sekret").code == 2
    assert serve("--tls-cert", tmp_path / "key").code == 2
    assert serve("--allow-host", "https://files.test").code == 2
