"""Before a server listens: its own key out of a file, and no open door to other machines."""

from __future__ import annotations

import os
import socket
import stat
from ipaddress import ip_address
from pathlib import Path

from lorakit.errors import NotFound, Refused
from lorakit.store.database import is_store
from lorakit.store.keys import KeyStore

KEY = "LORAKIT_API_KEY"  # the variable with a key of the server's own, that may do all
_LONGEST = 4096  # bytes of a key


def key_from_file(file: Path) -> str:
    """The key in a file, which may end with a line's end.

    Raises:
        NotFound: there is no such file.
        Refused: every user of the machine may read it, or it holds no key.
    """
    try:
        with file.open("rb") as stream:
            state, raw = os.fstat(stream.fileno()), stream.read(_LONGEST + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"--api-key-file: there is no file '{file}'") from None
    if stat.S_IMODE(state.st_mode) & 0o007:
        raise Refused(
            f"--api-key-file: every user of this machine can read '{file}': chmod 600 '{file}' (for a secret of "
            "Kubernetes, defaultMode: 0400)"
        )
    key = raw.strip()
    if not key or len(raw) > _LONGEST or not all(0x21 <= letter <= 0x7E for letter in key):
        raise Refused(
            f"--api-key-file: '{file}' has to hold one key of letters, digits and signs, without spaces, and nothing "
            "else: `openssl rand -hex 32` writes a good one"
        )
    return key.decode("ascii")


def refuse_open_door(host: str, home: Path, *, has_own_key: bool) -> None:
    """Raises Refused where other machines can reach an address, and whoever does may do all."""
    if has_own_key or is_loopback(host) or _has_key(home):
        return
    raise Refused(
        f"--host {host} can be reached by other machines, and there is no API key, so whoever reaches it may load, "
        "remove and ask whatever is here: make one (lorakit key create --admin), or set LORAKIT_API_KEY, or say "
        "--allow-no-key if something else guards it"
    )


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches it. Of a name, all addresses count."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):  # to listen there will say so
        return True
    return all(ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _has_key(home: Path) -> bool:
    if not is_store(home):
        return False
    store = KeyStore(home)
    try:
        return any(key.revoked is None for key in store.all())
    finally:
        store.close()
