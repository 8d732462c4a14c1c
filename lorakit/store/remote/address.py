"""Where a shared store is, from what a person types."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorakit.errors import UsageError
from lorakit.files.addresses import without_secrets

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()=+-]+(?:/[A-Za-z0-9!_.*'()=+-]+)*")


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """`prefix` without slashes at its ends; empty for the whole bucket."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse_store(text: str) -> StoreAddress:
    """`s3://BUCKET/PREFIX`, the prefix may be missing.

    Raises:
        UsageError: it is none, or holds what may be a secret.
    """
    shown = without_secrets(text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme != "s3":
        raise UsageError(f"--store '{shown}' has to be s3://BUCKET/PREFIX, a bucket of an S3-compatible store")
    if "@" in rest or ":" in rest.partition("/")[0] or "?" in rest:
        raise UsageError(
            f"--store '{shown}': an address holds no credentials and no options: put them into the environment "
            f"(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"--store '{shown}' names no bucket: write s3://BUCKET/PREFIX")
    if prefix and (not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/"))):
        raise UsageError(
            f"--store '{shown}': a prefix has letters, digits, '-', '_', '.', and single '/' between its parts"
        )
    return StoreAddress(bucket, prefix)
