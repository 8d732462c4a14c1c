"""Which keys count, and what they used, as one server knows it beside others on the same store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.server.access import keyring as module
from lorakit.server.access.keyring import Keyring
from lorakit.server.access.rights import ALL, Rights
from lorakit.server.requests.answered import Answered
from lorakit.server.requests.limits import TooMany
from lorakit.store.keys import Allowance, KeyStore

pytestmark = pytest.mark.anyio


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore(tmp_path)
    yield store
    store.close()


@pytest.fixture
async def keyring(tmp_path: Path) -> AsyncIterator[Keyring]:
    opened = await Keyring.opened(tmp_path, "")
    yield opened
    await opened.close()


def given(text: str) -> dict[str, Any]:
    return {"headers": [(b"authorization", f"Bearer {text}".encode())]}


def used(rights: Rights, tokens: int) -> Answered:
    return Answered("sql", "/v1/completions", 200, 0.1, prompt_tokens=0, completion_tokens=tokens, key=rights.key)


async def test_without_a_key_everybody_may_do_all_until_there_is_one(keyring: Keyring, keys: KeyStore) -> None:
    assert keyring.rights_for({"headers": []}) == ALL == keyring.rights_for(given("whatever"))
    assert keyring.counts(ALL)
    text, key = keys.create(Allowance(("sql",)))
    await keyring.look()
    assert keyring.rights_for({"headers": []}) is None
    assert keyring.rights_for(given(text)) == Rights(key.allowance, key.id)
    assert not keyring.counts(ALL)
    keys.revoke(key.id)
    await keyring.look()
    assert keyring.rights_for(given(text)) is None
    assert not keyring.counts(Rights(key.allowance, key.id))


async def test_a_servers_own_key_may_do_all_beside_those_of_the_store(tmp_path: Path, keys: KeyStore) -> None:
    text, key = keys.create(Allowance(("sql",)))
    keyring = await Keyring.opened(tmp_path, "own")
    own, other = keyring.rights_for(given("own")), keyring.rights_for(given(text))
    assert own is not None
    assert own.is_whole
    assert other is not None
    assert other.key == key.id
    assert keyring.rights_for(given("")) is None
    await keyring.close()


async def test_what_another_server_counted_counts_here(keyring: Keyring, keys: KeyStore, tmp_path: Path) -> None:
    text, _ = keys.create(Allowance(tokens=10))
    other = await Keyring.opened(tmp_path, "")
    await keyring.look()
    rights = keyring.rights_for(given(text))
    assert rights is not None
    keyring.answered(used(rights, 6))
    other.answered(used(rights, 5))
    for one in (keyring, other):
        one.admit(rights, spends=True)
    await other.note()
    await keyring.look()
    with pytest.raises(TooMany, match="10 tokens"):
        keyring.admit(rights, spends=True)
    keyring.admit(rights, spends=False)
    await other.close()


async def test_a_new_day_begins_at_midnight_and_what_was_used_before_is_noted_for_its_own(
    keyring: Keyring, keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, key = keys.create(Allowance(tokens=10))
    await keyring.look()
    rights = keyring.rights_for(given(text))
    assert rights is not None
    today = module._today()
    keyring.answered(used(rights, 10))
    with pytest.raises(TooMany):
        keyring.admit(rights, spends=True)
    monkeypatch.setattr(module, "_today", lambda: "9999-01-01")
    keyring.admit(rights, spends=True)
    keyring.answered(used(rights, 3))
    await keyring.look()
    await keyring.note()
    assert (keys.tokens_on(today), keys.tokens_on("9999-01-01")) == ({key.id: 10}, {key.id: 3})


async def test_what_can_not_be_noted_now_is_noted_later(
    keyring: Keyring, keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, key = keys.create(Allowance(tokens=10))
    await keyring.look()
    rights = keyring.rights_for(given(text))
    assert rights is not None
    keyring.answered(used(rights, 10))

    def fail(*_: object) -> None:
        raise LorakitError("no space left")

    with monkeypatch.context() as full:
        full.setattr(KeyStore, "note", fail)
        with pytest.raises(LorakitError):
            await keyring.note()
    with pytest.raises(TooMany):
        keyring.admit(rights, spends=True)
    await keyring.note()
    assert keys.tokens_on(module._today()) == {key.id: 10}
    assert keys.all()[0].used is not None
    with pytest.raises(TooMany):
        keyring.admit(rights, spends=True)


async def test_a_store_that_fails_for_a_moment_is_looked_at_again(
    keyring: Keyring, keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _ = keys.create(Allowance())
    monkeypatch.setattr(module, "LOOK", 0.001)
    failures, real = [LorakitError("damaged"), ValueError("no JSON")], KeyStore.changes

    def changes(store: KeyStore) -> int:
        if failures:
            raise failures.pop()
        return real(store)

    monkeypatch.setattr(KeyStore, "changes", changes)
    running = asyncio.create_task(keyring.run())
    async with asyncio.timeout(60):
        while keyring.rights_for(given(text)) in (None, ALL):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.001)
    assert not failures
    running.cancel()
