"""Where a shared store is, from what a person types."""

from __future__ import annotations

import pytest

from lorakit.errors import UsageError
from lorakit.store.remote.address import parse_store


@pytest.mark.parametrize(("text", "bucket", "prefix"), [
    ("s3://models", "models", ""), ("s3://models/", "models", ""), ("s3://models/a/b/", "models", "a/b"),
    ("s3://my.models-2/team=x", "my.models-2", "team=x"),
])  # fmt: skip
def test_a_bucket_and_what_is_below_it(text: str, bucket: str, prefix: str) -> None:
    found = parse_store(text)
    assert (found.bucket, found.prefix) == (bucket, prefix)
    assert str(found) == text.rstrip("/")


@pytest.mark.parametrize(
    "text", ["", "models", "/a", "gs://models/x", "https://s3.host/x", "s3://", "s3:///x", "s3://A"]
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--store"):
        parse_store(text)


@pytest.mark.parametrize("text", ["s3://models/a//b", "s3://models/../x", "s3://models/a b", "s3://models/\n"])
def test_a_prefix_that_would_not_be_one_folder_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="prefix"):
        parse_store(text)


@pytest.mark.parametrize("text", ["s3://KEY:hush@models/x", "s3://hush@models/x", "s3://models/x?secret=hush"])
def test_credentials_in_an_address_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="environment") as refused:
        parse_store(text)
    assert "hush" not in str(refused.value)
