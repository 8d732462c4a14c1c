"""What a person types, taken apart; and nothing of it that is secret in what is shown."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.checkpoints.moving.addresses import archive_named, expires_at, hub_address, parse_address
from lorakit.errors import UsageError
from lorakit.files.addresses import without_secrets


@pytest.mark.parametrize(
    ("text", "way", "shown", "path", "name"),
    [
        ("https://u:p@h:1/a/b.tar.gz?s=1#f", "url", "https://h:1/a/b.tar.gz", "/a/b.tar.gz", "b.tar.gz"),
        ("HTTP://h/a%20b.zip", "url", "http://h/a%20b.zip", "/a b.zip", "a b.zip"),
        ("s3://models/sql/step-5/", "bucket", "s3://models/sql/step-5/", "models/sql/step-5/", "step-5"),
        ("s3://models/sql@best/a", "bucket", "s3://models/sql@best/a", "models/sql@best/a", "a"),
        (" 'https://h/a.zip?s=1' ", "url", "https://h/a.zip", "/a.zip", "a.zip"),
        ("gs://k:s@models/a.tar", "bucket", "gs://models/a.tar", "models/a.tar", "a.tar"),
        ("hf://org/name@v1/sub/folder", "hub", "hf://org/name@v1/sub/folder", "org/name@v1", "name"),
        ("hf://org/name@refs%2Fpr%2F1", "hub", "hf://org/name@refs%2Fpr%2F1", "org/name@refs/pr/1", "name"),
        ("file:///a/b%20c", "local", "file:///a/b%20c", "/a/b c", "b c"),
        ("runs/sql", "local", "runs/sql", "runs/sql", "sql"),
        ("sql@step-500", "local", "sql@step-500", "sql@step-500", "sql@step-500"),
    ],
)  # fmt: skip
def test_addresses(text: str, way: str, shown: str, path: str, name: str) -> None:
    found = parse_address(text)
    assert (found.way, found.shown, found.path, found.name) == (way, shown, path, name)


def test_hub_ids() -> None:
    assert hub_address("org/name@v1").path == "org/name@v1"
    assert hub_address("hf://org/name/sub").below == "sub"
    assert parse_address("hf://models/org/name").path == "org/name"
    with pytest.raises(UsageError, match="write OWNER/NAME"):
        hub_address("https://huggingface.co/org/name")


@given(
    st.sampled_from(["http", "https", "s3", "HTTPS"]),
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=5),
    st.text("?&=%/@:#é +", max_size=10),
)
def test_no_secret_is_shown_wherever_it_stands(scheme: str, host: str, noise: str) -> None:
    for address in (
        f"{scheme}://us3cret:us3cret@{host}/a",
        f"{scheme}://{host}/a?{noise}us3cret",
        f"{scheme}://{host}/a#{noise}us3cret",
        f"{scheme}://{host}?us3cret{noise}",
    ):
        assert "us3cret" not in without_secrets(address)


def test_what_a_terminal_would_obey_is_not_shown() -> None:
    assert "\x1b" not in without_secrets("https://host/\x1b[2J")


@pytest.mark.parametrize(
    ("query", "ends"),
    [
        ("X-Amz-Date=20260102T030405Z&X-Amz-Expires=3600", datetime(2026, 1, 2, 4, 4, 5, tzinfo=UTC)),
        ("X-Goog-Date=20260102T030405Z&X-Goog-Expires=60", datetime(2026, 1, 2, 3, 5, 5, tzinfo=UTC)),
        ("AWSAccessKeyId=a&Expires=1767323045&Signature=b", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("sv=1&se=2026-01-02T03:04:05Z&sig=a", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("X-Amz-Date=yesterday&X-Amz-Expires=1", None),
        ("Expires=99999999999999999999", None),
        ("", None),
    ],
)
def test_when_a_url_ends(query: str, ends: datetime | None) -> None:
    assert expires_at(f"https://host/a?{query}") == ends


def test_archives_by_their_names() -> None:
    assert archive_named("a.TAR.GZ") == archive_named("a.tgz") == "tar.gz"
    assert archive_named("a.tar.zst") == "tar.zst"
    assert archive_named("model.safetensors") is archive_named("a.gz") is None


@pytest.mark.parametrize(
    "address",
    [
        "https:/host/a?X-Amz-Signature=s3cret",
        "bucket.s3.amazonaws.com/a?X-Amz-Signature=s3cret",
        "https://user:s3/cret@host/a?sig=s3cret",
        "https://user:s3?cret@host/a",
        "https://host:port/a?s3cret",
        "http://host/\udcff?s3cret",
        "ttps://user:s3cret@host/a?s3cret",
    ],
)
def test_a_url_that_was_damaged_when_it_was_pasted_is_none_and_shows_no_secret(address: str) -> None:
    with pytest.raises(UsageError) as found:
        parse_address(address)
    with pytest.raises(UsageError) as of_hub:
        hub_address(address)
    assert "cret" not in f"{found.value}{of_hub.value}"
