"""A visitor of the page, in a tab of a real browser."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

# What lies outside of the window's width, or of what it is in: nobody would see it, or everything would shift.
OVERFLOW = """() => {
  const MEANT = ".skip, .unseen, dialog:not([open]), .wide table, .rail nav, svg";
  const wide = document.documentElement.clientWidth;
  const found = [...document.querySelectorAll("body *")].filter((one) => {
    const box = one.getBoundingClientRect();
    if (!box.width || !box.height || one.closest(MEANT)) return false;
    return box.right > wide + 1 || box.left < -1;
  });
  const page = document.documentElement.scrollWidth > wide ? [`page ${document.documentElement.scrollWidth}`] : [];
  const told = (one) => `${one.tagName}.${one.className} ${one.getBoundingClientRect().right}`;
  return [...page, ...found.slice(0, 5).map(told)];
}"""

# What the buttons at the end of a table's row lie over, in that row.
COVERED = """() => [...document.querySelectorAll(".acts tbody tr")].flatMap((row) => {
  const end = row.lastElementChild.getBoundingClientRect();
  const lies = (box) => Math.min(box.right, end.right) - Math.max(box.left, end.left) > 1
    && Math.min(box.bottom, end.bottom) - Math.max(box.top, end.top) > 1;
  const others = [...row.querySelectorAll("td:not(:last-child) > *")];
  return others.filter((one) => lies(one.getBoundingClientRect())).map((one) => one.textContent);
})"""


class Visit:
    """`elsewhere` are requests that left for another host, `wrong` what the console said of errors."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.elsewhere: list[str] = []
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.allowed: tuple[str, ...] = ()  # texts of errors that are meant
        self.page = context.new_page()
        self.watch(self.page)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        """Before its server ends, or the browser would complain of that."""
        self.context.close()

    def watch(self, page: Any) -> None:
        page.on("request", lambda request: self._note(request.url))
        page.on("websocket", lambda socket: self._note(socket.url))
        page.on("console", lambda line: line.type == "error" and self._complain(line.text))
        page.on("pageerror", lambda error: self._complain(str(error)))

    def _note(self, url: str) -> None:
        self.asked.append(url)
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.elsewhere.append(url)

    def _complain(self, text: str) -> None:
        if not any(part in text for part in self.allowed):
            self.wrong.append(text)

    def open(self, url: str, path: str = "/ui/") -> Any:
        """A screen that talks to its server."""
        self.page.goto(url + path)
        self.page.wait_for_function("() => window.socket && window.socket.connected")
        return self.page

    def overflow(self) -> list[str]:
        found: list[str] = self.page.evaluate(OVERFLOW)
        return found

    def covered(self) -> list[str]:
        found: list[str] = self.page.evaluate(COVERED)
        return found
