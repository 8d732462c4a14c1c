"""lorakit's log: lines for a person, or one JSON object each; with the id of the request that they are about.

No line holds a header, a prompt or an answer.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, get_args

from lorakit.server.requests.answered import Answered
from lorakit.server.sight.request_id import current_request

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

log = logging.getLogger("lorakit")
_LEVEL = re.compile(r"(?:\([^)]*\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
MOST_WAITING = 10_000  # lines
MOMENT = 0.02  # seconds in which lines gather
LONGEST_NAME = 200  # letters of what a client calls a model


class TextLines(logging.Formatter):
    """`lorakit: message [request]`; names in it are anybody's, so what a terminal would obey is written out."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if not message.isprintable():
            message = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in message)
        request = current_request.get()
        return f"lorakit: {message} [{request}]" if request else f"lorakit: {message}"


class JsonLines(logging.Formatter):
    """One object a line; what `extra={"fields": …}` holds stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        request = current_request.get()
        fields = {**({"request_id": request} if request else {}), **getattr(record, "fields", {})}
        return json_line(record.levelname, record.name, record.getMessage(), record.created, fields)


def json_line(
    level: str, logger: str, message: str, at: float | None = None, fields: Mapping[str, Any] | None = None
) -> str:
    """A line of the log; `at` in seconds since 1970, now without."""
    at = time.time() if at is None else at
    second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
    stamp = f"{second}.{int(at % 1 * 1000):03d}Z"
    said = {"time": stamp, "level": level.lower(), "logger": logger, "message": message, **(fields or {})}
    return json.dumps(said, default=str)


class _Aside(logging.Handler):
    """Lines are made where they are said, which knows the request, and written elsewhere: whoever reads stderr may be
    slow, and the event loop is not to wait for that. What is more than can wait is lost.

    To wake a thread for each line would cost a busy event loop more than the line: it writes what came in a moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream = sys.stderr
        self._lines: deque[str] = deque()
        self._any = threading.Event()
        self._writing = False
        threading.Thread(target=self._write, name="lorakit-log", daemon=True).start()
        atexit.register(self._wait_until_written)

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) < MOST_WAITING:
            self._lines.append(self.format(record) + "\n")
            if not self._any.is_set():
                self._any.set()

    def _write(self) -> None:
        while True:
            self._any.wait()
            self._writing = True
            time.sleep(MOMENT)
            self._any.clear()
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
                self._stream.write("".join(lines))
                self._stream.flush()
            self._writing = False

    def _wait_until_written(self) -> None:
        """For a second at most: nobody may be reading any more."""
        ends = time.monotonic() + 1
        while (self._lines or self._writing) and time.monotonic() < ends:
            time.sleep(0.01)


def log_to_stderr(form: LogFormat = "text") -> None:
    """Show lorakit's own lines beside the engine's, unless the program that this runs in has set up logging for it."""
    if not log.handlers:
        handler = _Aside()
        handler.setFormatter(JsonLines() if form == "json" else TextLines())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def own_line(message: str, form: LogFormat) -> str:
    """What the supervisor says, which has no logger."""
    return json_line("INFO", "lorakit.supervisor", message) if form == "json" else f"lorakit: {message}"


def engine_line(text: str, form: LogFormat) -> str:
    """A line that the engine's process wrote, as it is passed on: what is no object yet becomes one."""
    if form == "text" or _is_object(text):
        return text
    level = _LEVEL.match(text)
    return json_line(level[1] if level else "INFO", "engine", text)


def _is_object(text: str) -> bool:
    if not text.startswith("{"):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def log_answered(answer: Answered) -> None:
    """One line for each answer."""
    name = answer.revision.name if answer.revision else None
    model = answer.model[:LONGEST_NAME]
    meant = f" {model} ({name})" if name and name != model else f" {model}" if model else ""
    tokens = [count for count in (answer.prompt_tokens, answer.completion_tokens) if count is not None]
    first_byte = None if answer.first_byte is None else round(answer.first_byte, 6)
    counted = f", {' + '.join(map(str, tokens))} tokens" if tokens else ""
    log.log(
        logging.WARNING if answer.status >= 500 else logging.INFO,
        "%s", f"{answer.status} {answer.path}{meant} in {answer.seconds:.3f} s{counted}",
        extra={"fields": {
            "status": answer.status, "path": answer.path, "model": model, "revision": name,
            "seconds": round(answer.seconds, 6), "first_byte": first_byte, "waited": round(answer.waited, 6),
            "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens,
            "key": answer.key or None,
        }},
    )  # fmt: skip
