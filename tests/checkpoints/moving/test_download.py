"""A stream that goes on where the connection broke, and gives the bytes of one version or none."""

from __future__ import annotations

import base64
import hashlib
import logging
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.checkpoints.moving.download import Download, Patience, StartAgain, client_for
from lorakit.errors import InvalidFile, LorakitError, NotFound, Refused
from tests.checkpoints.moving.web import WORDS, Web, serving

DATA = random.Random(1).randbytes(200_000)
QUICK = Patience(tries=4, timeout=0.3, pause=0.001)


def downloaded(web: Web, path: str, patience: Patience = QUICK, start: int = 0) -> bytes:
    with client_for(patience) as client:
        download = Download(client, web.url(path), patience, start=start)
        blocks = []
        while block := download.read(50_000):
            assert len(block) <= 50_000
            blocks.append(block)
        download.close()
        assert download.sha256() == hashlib.sha256(b"".join(blocks)).hexdigest()
    return b"".join(blocks)


def test_all_of_it(web: Web) -> None:
    web.put("a", DATA)
    assert downloaded(web, "a") == DATA
    assert web.asked[0][1]["accept-encoding"] == "identity"


cut_lists = st.lists(st.integers(1, 60_000), max_size=12)


@settings(max_examples=60)
@given(cuts=cut_lists, ranges=st.booleans(), strong=st.booleans(), length=st.sampled_from([-1, None]))
def test_wherever_the_connection_breaks_the_bytes_are_the_same(
    cuts: list[int], ranges: bool, strong: bool, length: int | None
) -> None:
    with serving() as web:
        # a server that knows no parts begins at the start each time: it has to come a little further
        at = cuts if ranges else [sum(cuts[: count + 1]) for count in range(len(cuts))]
        web.put("a", DATA, cuts=at, ranges=ranges, etag='"v1"' if strong else 'W/"v1"', length=length)
        assert downloaded(web, "a") == DATA


def test_the_rest_is_asked_for_on_condition_that_it_is_the_same(web: Web) -> None:
    web.put("a", DATA, cuts=[1000])
    assert downloaded(web, "a") == DATA
    assert (web.asked[1][1]["range"], web.asked[1][1]["if-match"]) == ("bytes=1000-", '"v1"')
    page = web.put("b", DATA, cuts=[1000], etag='W/"v1"')
    assert downloaded(web, "b") == DATA
    assert web.asked[3][1]["if-unmodified-since"] == page.modified
    assert "if-match" not in web.asked[3][1]


def test_what_stands_still_is_given_up_and_gone_on_with(web: Web) -> None:
    web.put("a", DATA, stalls=[70_000])
    assert downloaded(web, "a") == DATA
    assert web.ranges() == ["", "bytes=70000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_is_not_gone_on_with(web: Web, ranges: bool) -> None:
    page = web.put("a", DATA, cuts=[1000], ranges=ranges)
    page.then = type(page)(DATA[::-1], etag='"v2"', ranges=ranges)
    with pytest.raises(StartAgain, match="changed on the server") as found:
        downloaded(web, "a")
    assert found.value.changed


def test_without_a_version_there_is_no_rest_to_ask_for(web: Web) -> None:
    web.put("a", DATA, cuts=[1000], etag=None, modified=None)
    with pytest.raises(StartAgain, match="gives the file no version") as found:
        downloaded(web, "a")
    assert not found.value.changed


def test_more_than_was_said_is_refused_and_less_is_asked_for_again(web: Web) -> None:
    web.put("short", DATA, length=len(DATA) + 10)
    with pytest.raises(StartAgain):
        downloaded(web, "short")
    web.put("long", DATA, length=len(DATA) - 10)  # what stands behind is not of the answer
    assert downloaded(web, "long") == DATA[:-10]


def test_a_server_that_is_down_for_a_while_is_asked_again_and_given_up_in_the_end(web: Web) -> None:
    web.put("a", DATA, statuses=[503, 500, 429, 200])
    assert downloaded(web, "a") == DATA
    web.put("b", DATA, statuses=[503] * 10)
    with pytest.raises(LorakitError, match=r"can't answer \(503\), 4 times in a row \(no answer\): try again later"):
        downloaded(web, "b")


def test_each_byte_that_comes_gives_all_tries_back(web: Web) -> None:
    web.put("a", DATA, cuts=[10_000] * 15)
    assert downloaded(web, "a") == DATA


@pytest.mark.parametrize("name", ["Repr-Digest", "Digest", "Content-MD5", "x-goog-hash", "x-amz-checksum-sha256"])
@pytest.mark.parametrize("true", [True, False])
def test_digests_that_the_server_gives_are_held_against_what_came(web: Web, name: str, true: bool) -> None:
    of = DATA if true else DATA[:-1]
    long = base64.b64encode(hashlib.sha256(of).digest()).decode()
    short = base64.b64encode(hashlib.md5(of).digest()).decode()
    value = {
        "Repr-Digest": f"sha-256=:{long}:", "Digest": f"SHA-256={long}", "Content-MD5": short,
        "x-goog-hash": f"crc32c=AAAAAA==, md5={short}", "x-amz-checksum-sha256": long,
    }[name]  # fmt: skip
    web.put("a", DATA, headers={name: value}, cuts=[50_000])
    if true:
        assert downloaded(web, "a") == DATA
        return
    with pytest.raises(InvalidFile, match="is not what the server has"):
        downloaded(web, "a")


def test_a_digest_of_digests_is_not_taken_for_one_of_bytes(web: Web) -> None:
    web.put("a", DATA, headers={"x-amz-checksum-sha256": "AAAA-3", "Digest": "SHA-256=!!"})
    assert downloaded(web, "a") == DATA


def test_it_broke_behind_the_last_byte_of_a_file_whose_size_nobody_said(web: Web) -> None:
    page = web.put("a", DATA, length=None, cuts=[len(DATA) - 1])
    assert downloaded(web, "a") == DATA
    page.cuts = [len(DATA)]
    page.unended = True
    assert downloaded(web, "a") == DATA
    assert web.ranges()[-1] == f"bytes={len(DATA)}-"


def test_redirects_are_followed_and_credentials_stay_with_their_host(web: Web) -> None:
    with serving() as other:
        other.put("there", DATA)
        web.put("a", b"", location=f"http://127.0.0.1:{other.port}/there?{WORDS[0]}=1")
        web.put("round", b"", location="/round")
        web.put("out", b"", location="file:///etc/passwd")
        web.put("same", b"", location="/b")
        web.put("b", DATA)
        assert downloaded(web, "a") == DATA
        assert "authorization" in web.asked[0][1]
        assert "authorization" not in other.asked[0][1]
        assert downloaded(web, "same") == DATA
        assert "authorization" in web.asked[-1][1]
        with pytest.raises(Refused, match="from place to place"):
            downloaded(web, "round")
        with pytest.raises(Refused, match="not safe"):
            downloaded(web, "out")


def test_each_try_begins_at_the_first_address_again(web: Web) -> None:
    """As the address that a redirect leads to may be signed for a minute only."""
    web.put("start", b"", location="/data")
    web.put("data", DATA, cuts=[1000])
    assert downloaded(web, "start") == DATA
    assert [path for path, _ in web.asked] == ["start", "data", "start", "data"]


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (403, b"<Error><Code>AccessDenied</Code></Error>", Refused, "has expired or is not for you .403 AccessDenied"),
        (403, b"<Error><Code>ExpiredToken</Code></Error>", Refused, "the URL has expired: ask for a new one"),
        (403, b"<Code>AccessDenied</Code><Message>Request has expired</Message>", Refused, "has expired: ask"),
        (403, b"<Code>SignatureDoesNotMatch</Code><StringToSign>5ec4e7", Refused, "in single quotes"),
        (401, b"", Refused, "has expired or is not for you"),
        (404, b"", NotFound, "there is nothing at"),
        (410, b"", NotFound, "there is nothing at"),
        (418, b"", LorakitError, "the server says 418"),
    ],
)
def test_answers_that_no_second_try_will_better(
    web: Web, status: int, body: bytes, kind: type[LorakitError], words: str
) -> None:
    web.put("a", DATA, statuses=[status], body=body)
    with pytest.raises(kind, match=words) as found:
        downloaded(web, "a")
    assert found.value.code == kind.code
    assert len(web.asked) == 1
    assert not any(word in str(found.value) for word in WORDS)


def test_a_url_that_expires_on_the_way_says_so(web: Web) -> None:
    web.put("a", DATA, statuses=[200, 403], cuts=[1000], body=b"<Code>ExpiredToken</Code>")
    with pytest.raises(Refused, match="the URL has expired"):
        downloaded(web, "a")


def test_a_server_that_is_not_there() -> None:
    with serving() as web:
        pass
    with pytest.raises(LorakitError, match="can't be connected to, 4 times in a row"):
        downloaded(web, "a")


def test_a_part_that_nobody_asked_for_is_refused(web: Web) -> None:
    web.put("a", DATA, statuses=[206])
    with pytest.raises(InvalidFile, match=r"which is no number|a part where the whole was asked for"):
        downloaded(web, "a")


def test_what_is_logged_holds_no_secret(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    web.put("a", b"", location=f"/b?{WORDS[0]}=1")
    web.put("b", DATA, cuts=[1000])
    assert downloaded(web, "a") == DATA
    assert not any(word in caplog.text for word in WORDS)


@pytest.mark.parametrize("host", ["xn--", "a" * 70 + ".com", "exa mple", "....", "127.0.0.1:99999999"])
@pytest.mark.parametrize("redirected", [False, True])
def test_a_host_that_can_not_be_is_said(web: Web, host: str, redirected: bool) -> None:
    web.put("a", b"", location=f"http://{host}/x?5ec4e7")
    address = web.url("a") if redirected else f"http://{host}/x?5ec4e7"
    with client_for(QUICK) as client, pytest.raises(LorakitError) as found:
        Download(client, address, QUICK)
    assert "5ec4e7" not in str(found.value)


@pytest.mark.parametrize("proxy", ["foo://user:pa55word@x", "socks5://127.0.0.1:1", ":::"])
def test_a_proxy_that_can_not_be_used_is_said(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(LorakitError, match="check HTTP_PROXY") as found, client_for(QUICK):
        pass
    assert "pa55word" not in str(found.value)


def test_an_error_that_is_packed_in_nothing_known_is_still_that_error(web: Web) -> None:
    web.put("a", b"", statuses=[403], headers={"Content-Encoding": "gzip"}, body=b"<Code>ExpiredToken</Code>")
    with client_for(QUICK) as client, pytest.raises(Refused, match="the URL has expired"):
        Download(client, web.url("a"), QUICK)
