"""What makes an address one of https: a certificate, and the key that belongs to it, in files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import NotFound, Refused, UsageError


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of PEM files, which are read whenever a server begins to listen; empty for plain http."""

    file: str = ""
    key: str = ""

    @property
    def scheme(self) -> str:
        return "https" if self.file else "http"

    def ensure_usable(self) -> None:
        """Raises UsageError, NotFound or Refused where nothing could be served with it."""
        if bool(self.file) != bool(self.key):
            raise UsageError("--tls-cert and --tls-key belong together: give both")
        for flag, path in (("--tls-cert", self.file), ("--tls-key", self.key)):
            if path and not Path(path).is_file():
                raise NotFound(f"{flag}: there is no file '{path}'")
        if self.file:
            try:
                # a key that wants a password would ask for it where nobody answers
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.file, self.key, lambda: "")
            except (ssl.SSLError, OSError, ValueError) as error:
                raise Refused(
                    f"'{self.file}' and '{self.key}' can't be used ({error}): they have to be PEM, the certificate "
                    "with those above it, and its key without a password"
                ) from None
