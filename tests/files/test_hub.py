"""What looks like a hub id is asked for there; all else is a folder that isn't there."""

from __future__ import annotations

import pytest

from lorakit.errors import NotFound
from lorakit.files.hub import hub_folder, looks_like_hub_id


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
