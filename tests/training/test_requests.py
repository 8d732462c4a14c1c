"""The files that ask a trainer to save: whole, claimed once, answered, and lost by no crash."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import Conflict, LorakitError, NotFound, OutOfSpace, Refused, UsageError
from lorakit.training import requests
from lorakit.training.requests import (
    AXOLOTL,
    Receipt,
    Request,
    answer,
    ask,
    left_unanswered,
    listener,
    listening,
    name_checkpoint,
    receipt_of,
    request_file,
    wait_for,
    withdraw,
)
from tests.disks import small_disk_at


def claim(run: Path) -> list[Request]:
    return list(requests.claim(run))


def receipt(request: Request, step: int = 7) -> Receipt:
    return Receipt(request.uuid, step, f"checkpoint-{step}", 0.5)


def test_what_is_asked_is_claimed_once_and_answered(tmp_path: Path) -> None:
    request = ask(tmp_path, name="before-lr-drop", reason="the loss is odd")
    assert claim(tmp_path) == [request]
    assert claim(tmp_path) == []
    assert receipt_of(tmp_path, request) is None
    answer(tmp_path, receipt(request))
    assert wait_for(tmp_path, request, 0) == receipt(request)
    assert os.listdir(tmp_path / ".lorakit") == [f"save-result-{request.uuid}.json"]
    assert json.loads((tmp_path / ".lorakit" / f"save-result-{request.uuid}.json").read_text()) == {
        "uuid": request.uuid, "step": 7, "path": "checkpoint-7", "seconds": 0.5, "name": None, "note": None,
    }  # fmt: skip


def test_what_a_trainer_had_claimed_when_it_died_the_next_one_takes_up(tmp_path: Path) -> None:
    request = ask(tmp_path, name="odd")
    claim(tmp_path)
    assert left_unanswered(tmp_path) == [request]
    claimed = tmp_path / ".lorakit" / f"save-request-{request.uuid}.json.claimed"
    content = claimed.read_text()
    answer(tmp_path, receipt(request))
    claimed.write_text(content)  # it died before it removed this
    assert left_unanswered(tmp_path) == []
    assert not claimed.exists()


def test_a_request_is_withdrawn_until_it_is_claimed(tmp_path: Path) -> None:
    first, second = ask(tmp_path), ask(tmp_path)
    assert withdraw(tmp_path, first)
    assert claim(tmp_path) == [second]
    assert not withdraw(tmp_path, second)
    assert not withdraw(tmp_path, first)


def test_axolotls_trigger_is_a_request_without_a_name(tmp_path: Path) -> None:
    (tmp_path / AXOLOTL).touch()
    [request] = claim(tmp_path)
    assert (request.name, request.reason) == (None, AXOLOTL)
    assert not (tmp_path / AXOLOTL).exists()
    assert [one.uuid for one in left_unanswered(tmp_path)] == [request.uuid]
    (tmp_path / AXOLOTL).mkdir()
    assert claim(tmp_path) == []


def test_a_run_that_nobody_ever_asked_has_no_requests(tmp_path: Path) -> None:
    assert claim(tmp_path) == []
    assert left_unanswered(tmp_path) == []
    assert listener(tmp_path) is None
    assert os.listdir(tmp_path) == []


def test_who_may_not_rename_is_told_and_the_request_stays(tmp_path: Path) -> None:
    """Then it is not a request at every step for ever, as with axolotl."""
    asked = [ask(tmp_path) for _ in range(5)]
    stuck = asked[2]
    claimed = tmp_path / ".lorakit" / f"{request_file(tmp_path, stuck).name}.claimed"
    claimed.mkdir()
    found: list[Request] = []

    def take() -> None:
        for request in requests.claim(tmp_path):
            found.append(request)

    with pytest.raises(OSError, match="claimed"):
        take()
    assert {one.uuid for one in found} == {one.uuid for one in asked} - {stuck.uuid}
    assert request_file(tmp_path, stuck).exists()


@settings(max_examples=30)
@given(content=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["uuid", "time", "name", "reason", "step"]) | st.text(), inner)
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_whatever_a_request_says_the_wish_to_save_is_in_its_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / ".lorakit").mkdir()
    (run / ".lorakit" / f"save-request-{'0' * 32}.json").write_bytes(content)
    (run / ".lorakit" / "save-request-../../x.json".replace("/", "_")).write_bytes(content)
    [request] = claim(run)
    assert request.uuid == "0" * 32
    assert request.name is None or isinstance(request.name, str)
    (run / ".lorakit" / f"save-result-{'0' * 32}.json").write_bytes(content)
    receipt_of(run, request)


@pytest.mark.parametrize(
    "said",
    [
        {"path": 5}, {"path": "/etc/passwd"}, {"path": "../x"}, {"path": ".."}, {"path": ""}, {"path": "x\n\x1b[31m"},
        {"step": "7"}, {"step": True}, {"note": 5}, {"name": []}, {"seconds": None}, {"uuid": "d" * 32},
    ],
)  # fmt: skip
def test_a_receipt_that_says_something_else_is_none(tmp_path: Path, said: dict[str, object]) -> None:
    request = ask(tmp_path)
    answer(tmp_path, receipt(request))
    file = tmp_path / ".lorakit" / f"save-result-{request.uuid}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    assert receipt_of(tmp_path, request) is None


def test_a_reason_is_read_as_long_as_it_may_be(tmp_path: Path) -> None:
    ask(tmp_path, name="odd", reason="r" * 65_000)
    assert [(one.name, len(one.reason or "")) for one in claim(tmp_path)] == [("odd", 65_000)]
    with pytest.raises(UsageError, match="the reason is too long: a request has at most 64 KiB"):
        ask(tmp_path, name="odd", reason="r" * 65_600)


def test_a_request_that_is_a_link_or_a_pipe_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"name": "stolen", "reason": "secret"}')
    (tmp_path / ".lorakit").mkdir()
    (tmp_path / ".lorakit" / f"save-request-{'a' * 32}.json").symlink_to(tmp_path / "secret.json")
    os.mkfifo(tmp_path / ".lorakit" / f"save-request-{'b' * 32}.json")
    assert [(one.name, one.reason) for one in claim(tmp_path)] == [(None, None), (None, None)]


def test_of_many_that_claim_at_once_each_request_goes_to_one(tmp_path: Path) -> None:
    asked = {ask(tmp_path).uuid for _ in range(60)}
    claimed: list[str] = []
    gate = threading.Barrier(6)

    def take() -> None:
        gate.wait()
        claimed.extend(one.uuid for one in claim(tmp_path))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(asked)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("latest", Refused), ("checkpoint-5", Refused), ("config.json", Refused), ("a/b", Refused), ("..", Refused),
        ("", Refused), ("step-5", Refused), ("3fa9", Refused), ("taken", Conflict), ("dangling", Conflict),
    ],
)  # fmt: skip
def test_a_name_that_could_be_mistaken_is_refused_and_nothing_asked(
    tmp_path: Path, name: str, error: type[LorakitError]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(error):
        ask(tmp_path, name=name)
    assert not (tmp_path / ".lorakit").exists()


def test_what_is_wrong_with_a_name_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the name 'latest' is reserved; choose another word"):
        ask(tmp_path, name="latest")


def test_only_a_run_can_be_asked(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no folder"):
        ask(tmp_path / "nowhere")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "odd").symlink_to("checkpoint-5")
    for name in ("checkpoint-5", "odd"):
        with pytest.raises(UsageError, match="name the run"):
            ask(tmp_path / name)


def test_a_name_is_a_link_that_lasts_and_never_takes_anothers_place(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    assert name_checkpoint(tmp_path, "odd", "checkpoint-5") is None
    assert (tmp_path / "odd").resolve() == tmp_path / "checkpoint-5"
    assert name_checkpoint(tmp_path, "odd", "checkpoint-5") is None
    assert "exists already" in str(name_checkpoint(tmp_path, "odd", "checkpoint-6"))
    assert "can't be a name" in str(name_checkpoint(tmp_path, "../odd", "checkpoint-6"))
    assert os.readlink(tmp_path / "odd") == "checkpoint-5"


def test_who_listens_is_known_while_it_lives_and_not_when_it_was_killed(tmp_path: Path) -> None:
    """Although a worker that it had forked lives on."""
    program = (
        "import os, sys, time; from pathlib import Path; from lorakit.training.requests import listening\n"
        "with listening(Path(sys.argv[1])) as alone:\n"
        "    if os.fork(): time.sleep(60)\n"
        "    print(alone, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], **pipes) as other:
        assert other.stdout
        assert other.stdout.readline() == "True\n"
        assert (listener(tmp_path) or {})["pid"] == other.pid
        with listening(tmp_path) as alone:
            assert not alone
        other.send_signal(signal.SIGKILL)
        assert other.wait() == -signal.SIGKILL
        assert listener(tmp_path) is None
        with listening(tmp_path) as alone:
            assert alone
        assert listener(tmp_path) is None


def test_who_stops_listening_does_so_at_once_whatever_was_forked(tmp_path: Path) -> None:
    for _ in range(20):
        with listening(tmp_path), subprocess.Popen(["true"]):
            pass
        assert listener(tmp_path) is None


def test_on_a_full_disk_nothing_is_asked_and_it_says_so(tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "small", 16) as run:
        (run / ".lorakit").mkdir()
        (run / "filler").write_bytes(bytes(1 << 14)[: os.statvfs(run).f_bavail * os.statvfs(run).f_frsize])
        with pytest.raises(OutOfSpace, match="no space left on device; free some space"):
            ask(run)
        assert os.listdir(run / ".lorakit") == []


def test_a_request_is_never_seen_half(tmp_path: Path) -> None:
    """It has its name when it is written and synced: a temporary file is no request."""
    (tmp_path / ".lorakit").mkdir()
    (tmp_path / ".lorakit" / f".save-request-{'c' * 32}.json.12345678.tmp").write_text('{"na')
    assert claim(tmp_path) == []
    file = request_file(tmp_path, ask(tmp_path))
    assert stat.S_IMODE(file.stat().st_mode) & 0o600 == 0o600


def test_asking_costs_no_torch() -> None:
    program = "import sys, lorakit.training.requests; print('torch' in sys.modules, 'transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == "False False\n"
