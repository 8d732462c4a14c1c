"""Adapters from the Hub and from buckets, for clients of LoRAX, which name one where it lies. Only what lies under an
address that the server was started with is fetched: it is fetched with the server's own rights there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from lorakit.checkpoints.moving.addresses import Address, parse_address
from lorakit.checkpoints.moving.download import Patience
from lorakit.checkpoints.moving.fetching import fetch
from lorakit.errors import Refused, UsageError
from lorakit.files.archives import Limits
from lorakit.server.access.fetching import Places
from lorakit.server.settings import Settings

PATIENCE = Patience(tries=3, timeout=20.0)


class Fetching:
    """Fetches few at once, each within the server's limits."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = Places(settings)

    @asynccontextmanager
    async def fetched(self, address: Address) -> AsyncIterator[Path]:
        """The folder of what is at an address, for as long as the block lasts.

        Raises:
            Refused: it is larger, or takes longer, than it may.
            NotFound, LorakitError: as `fetch`.
        """
        async with self._places.new() as place:
            yield await asyncio.to_thread(_fetch, self._settings, address, place / "source")


def allowed(source: str, id: str, addresses: Collection[str]) -> Address:
    """Where LoRAX's `adapter_id` of this `adapter_source` lies.

    Raises:
        Refused: it can't be read, or is under none of these addresses.
    """
    try:
        address = parse_address(f"hf://{id}" if source == "hub" else id)
    except UsageError as error:
        raise Refused(f"`adapter_id`: {error}") from None
    way = {"hub": "hub", "s3": "bucket"}.get(source)
    plain = not any(part in ("", ".", "..") for part in address.shown.partition("://")[2].rstrip("/").split("/"))
    if address.way != way or not plain or not any(_is_under(address.shown, one) for one in addresses):
        raise Refused(
            f"`adapter_source` '{source}': this server fetches nothing from '{address.shown}': start it with "
            f"--allow-source {address.shown.rpartition('/')[0]}/, or bring it here (lorakit fetch), and name it as it "
            "is served"
        )
    return address


def _is_under(address: str, allowed: str) -> bool:
    return f"{address.rstrip('/')}/".startswith(f"{allowed.rstrip('/')}/")


def _fetch(settings: Settings, address: Address, folder: Path) -> Path:
    ends = time.monotonic() + settings.source_timeout

    def still_in_time(done: int, total: int | None) -> None:
        if time.monotonic() > ends:
            raise Refused(f"'{address.shown}' was not here within {settings.source_timeout:g} s (--source-timeout)")

    limits = Limits(max_bytes=settings.max_source * 2**30)
    fetch(address, folder, limits=limits, patience=PATIENCE, progress=still_in_time, with_digest=False)
    return folder
