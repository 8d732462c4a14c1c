"""A real S3 server on the loopback (moto), and the libraries that lorakit speaks to it with.

They are installed beside the rest (requirements/services.txt), so that they change nothing of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SERVICES = Path(__file__).parent.parent / ".venv" / "services"
SECRET = "0nly-for-tests"


@contextmanager
def s3_server() -> Iterator[str]:
    """Its address. Where it is not installed, the test is skipped."""
    if not SERVICES.is_dir():
        pytest.skip(f"pip install --no-deps --target {SERVICES} -r requirements/services.txt")
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, env={"PYTHONPATH": str(SERVICES)}, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        found = next((match for line in server.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
        assert found is not None, "moto did not start"
        reader = threading.Thread(target=server.stderr.read, daemon=True)
        reader.start()
        yield found[0]
    finally:
        server.kill()
        server.wait()
        reader.join()
        server.stderr.close()


def environment(address: str) -> dict[str, str]:
    """What points every S3 client at it."""
    return {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


@contextmanager
def client(address: str) -> Iterator[Any]:
    """boto3's, with an empty bucket `models`."""
    import boto3

    s3 = boto3.client("s3", endpoint_url=address)
    try:
        s3.create_bucket(Bucket="models")
        yield s3
        for each in s3.list_objects_v2(Bucket="models").get("Contents", []):
            s3.delete_object(Bucket="models", Key=each["Key"])
    finally:
        s3.close()
