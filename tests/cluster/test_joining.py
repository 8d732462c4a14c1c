"""Which Ray is joined, and what is said where that can't be."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorakit.cluster import joining
from lorakit.cluster.joining import joined
from lorakit.errors import LorakitError, UsageError
from lorakit.merge.merge import merge
from tests.folders import write_adapter, write_base

OOM = "RAY_task_oom_retries"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "find_spec", lambda _: "there")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_without_ray_the_extra_is_named_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(joining, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"Ray is not installed, which --ray needs: pip install 'lorakit\[ray\]'"):
        merge("no base", "no adapter", out=tmp_path / "out", ray=True)


def test_nothing_of_ray_is_imported_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    merge(write_base(tmp_path / "base"), write_adapter(tmp_path / "lora"), out=tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ray://head:10001", "'ray://head:10001' is of Ray's client, .* run this on one of its machines"),
        ("head", r"'head' is no address of a Ray cluster: write HOST:PORT"),
        ("http://head:8265", "is no address of a Ray cluster"),
    ],
)
def test_an_address_of_another_kind_is_refused(address: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=reason), joined(address):
        pass
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=reason), joined(True):
        pass


def test_where_no_cluster_answers_it_is_said_at_once() -> None:
    reason = r"no Ray cluster answers at '127.0.0.1:1' \(.*refused\): `ray status`"
    with pytest.raises(LorakitError, match=reason), joined("127.0.0.1:1"):
        pass


def test_a_cluster_that_is_started_here_is_for_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    told = joining._ours()
    assert (told["RAY_USAGE_STATS_ENABLED"], told["RAY_AUTH_MODE"]) == ("0", "token")
    assert len(told["RAY_AUTH_TOKEN"]) == 64
    assert told["RAY_AUTH_TOKEN"] != joining._ours()["RAY_AUTH_TOKEN"]
    before = dict(os.environ)
    with joining._variables(told):
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert dict(os.environ) == before


def test_who_has_a_way_of_their_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert joining._ours() == {"RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize("own", [None, "7"])
def test_a_task_that_ends_for_want_of_memory_is_not_begun_again_for_ever(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray reads it as it is imported; whoever has set it keeps what they set."""
    monkeypatch.delenv(OOM, raising=False)
    if own is not None:
        monkeypatch.setenv(OOM, own)
    seen: list[str | None] = []
    ray = SimpleNamespace(
        init=lambda **_: seen.append(os.environ.get(OOM)), shutdown=lambda: None,
        exceptions=SimpleNamespace(RayError=ValueError),
    )  # fmt: skip
    monkeypatch.setattr(joining, "import_module", lambda _: ray)
    monkeypatch.setattr(joining, "_ensure_answers", lambda _: None)
    for where in (True, "10.0.0.1:6379"):
        with joined(where):
            pass
    assert seen == [own or "3"] * 2
    assert os.environ.get(OOM) == own
