"""What may be printed of an address, however it was pasted."""

from __future__ import annotations

import pytest

from lorakit.files.addresses import without_queries, without_secrets


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://u:s3cret@h:1/a?s3cret", "https://h:1/a"),
        ("https://user:s3cret/12@host/x?s", "https://…@host/x"),
        ("https://user:12?s3cret@host/x", "https://…"),
        ("http://127.0.0.1:9000/b/k?Credential=a@s3cret", "http://127.0.0.1:9000/b/k"),
        ("https:/u:s3cret@host/x?s3cret", "https:/host/x"),
        ("u:s3cret@host/x?s3cret", "host/x"),
        ("host/x?s3cret=1", "host/x"),
        ("s3://key:s3cret@models/sql@best", "s3://models/sql@best"),
        ("sql@step-500", "sql@step-500"),
        ("runs/a#1", "runs/a#1"),
    ],
)
def test_no_part_of_a_secret_is_shown(address: str, shown: str) -> None:
    assert without_secrets(address) == shown


def test_a_message_of_somebody_else_loses_what_is_secret_in_it() -> None:
    said = "error for url 'https://u:s3cret@cdn/x?Signature=s3cret' while asking http://cdn/y?s3cret again"
    assert without_queries(said) == "error for url 'https://cdn/x?…' while asking http://cdn/y?… again"
