"""What the tests of a shared store start from: a real S3 server behind a proxy that can be told to fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.store.remote.address import parse_store
from lorakit.store.remote.objects import Objects
from lorakit.store.remote.shared import SharedStore
from tests.bucket import SERVICES, environment, s3_server
from tests.store.remote.faulty import Faulty, faulty

ADDRESS = "s3://models/lorakit"


@pytest.fixture(scope="module")
def real_s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def proxy(real_s3: str) -> Iterator[Faulty]:
    """One for all, so that they share what speaks to it: to make that takes longer than a test."""
    with pytest.MonkeyPatch.context() as patch, faulty(real_s3) as proxy:
        patch.setattr(sys, "path", [*sys.path, str(SERVICES)])
        for name, value in environment(proxy.url).items():
            patch.setenv(name, value)
        yield proxy
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def boto(proxy: Faulty, real_s3: str) -> Iterator[Any]:
    """A client that speaks to the server itself, with a bucket `models`."""
    import boto3

    found = boto3.client("s3", endpoint_url=real_s3)
    found.create_bucket(Bucket="models")
    yield found
    found.close()


@pytest.fixture
def s3(boto: Any) -> Iterator[Any]:
    """The same, with nothing in the bucket."""
    yield boto
    if keys := [{"Key": each["Key"]} for each in boto.list_objects_v2(Bucket="models").get("Contents", [])]:
        boto.delete_objects(Bucket="models", Delete={"Objects": keys})


@pytest.fixture
def bucket(proxy: Faulty, s3: Any) -> Iterator[Faulty]:
    """An empty bucket `models`, and nothing fails."""
    proxy.heal()
    yield proxy
    proxy.heal()


@pytest.fixture
def objects(bucket: Faulty) -> Objects:
    return Objects(parse_store(ADDRESS))


@pytest.fixture
def machine(tmp_path: Path, bucket: Faulty, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SharedStore]]:
    """Stores of machines, each by its name, that share the bucket; joined, unless that is not wanted."""
    monkeypatch.setattr(Objects, "ensure_conditions", lambda self: None)  # which takes as long as a test
    made: list[SharedStore] = []

    def of(name: str, *, joined: bool = True) -> SharedStore:
        store = SharedStore(tmp_path / name, "llama-0123", ADDRESS)
        made.append(store)
        if joined:
            store.join()
        return store

    yield of
    for store in made:
        store.close()
