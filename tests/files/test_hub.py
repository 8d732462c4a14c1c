"""What looks like a hub id is asked for there; all else is a folder that isn't there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.errors import NotFound, OutOfSpace
from lorakit.files.hub import HubFiles, hub_folder, looks_like_hub_id
from tests.hub import COMMIT, Hub


@pytest.mark.parametrize("name", ["gpt2", "org/model", "org/model-1.5_x", "org/model@v1.0", "org/model@refs/pr/1"])
def test_hub_ids(name: str) -> None:
    assert looks_like_hub_id(name)


@pytest.mark.parametrize("name", ["", "/abs/path", "./here", "../there", "a/b/c", "org/", "/model", "a b", "~/model"])
def test_folders(name: str) -> None:
    assert not looks_like_hub_id(name)
    with pytest.raises(NotFound, match="there is no adapter folder"):
        hub_folder(name, what="adapter", patterns=["*"])


def test_a_hub_that_can_not_be_reached_is_said() -> None:
    with pytest.raises(NotFound, match="there is no base 'org/model': no such folder; the hub: it can't be reached"):
        hub_folder("org/model", what="base", patterns=["*"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "file").write_bytes(b"0123456789")
    serving = Hub({"org/model": tmp_path / "origin"})
    serving.point_there(monkeypatch, tmp_path / "cache")
    yield serving
    serving.close()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(("first", "count", "expected"), [(0, 4, b"0123"), (3, 4, b"3456"), (8, 100, b"89")])
def test_a_part_of_a_file(hub: Hub, ranges: bool, first: int, count: int, expected: bytes) -> None:
    hub.ranges = ranges
    assert HubFiles("org/model@main").part("file", COMMIT, first, count) == (expected, 10)


def test_a_file_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(NotFound, match="'org/model' on the hub has no file 'other'"):
        HubFiles("org/model").part("other", COMMIT, 0, 1)
    with pytest.raises(NotFound, match="'other' of 'org/model' could not be downloaded"):
        HubFiles("org/model").download("other", COMMIT)


def test_a_hub_that_went_away(hub: Hub) -> None:
    hub.close()
    with pytest.raises(NotFound, match="can't be read: the hub"):
        HubFiles("org/model").part("file", COMMIT, 0, 1)


def test_a_full_cache_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OutOfSpace, match="set HF_HUB_CACHE"):
        HubFiles("org/model").download("file", COMMIT)


def test_what_the_hub_s_library_logs_has_no_signatures(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    HubFiles("org/model")
    logging.getLogger("huggingface_hub.utils._http").warning("thrown while requesting %s", "https://c/x?sig=5ec4e7")
    assert caplog.messages == ["thrown while requesting https://c/x?…"]
