"""The same question to several revisions, or a mix of them, side by side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup
from nicegui import background_tasks

from lorakit.server.page.api import NotTold
from lorakit.server.page.markup import NOTHING, after_at, button, card, count, joined, options, seconds
from lorakit.server.page.screens.screen import Said, Screen, number, text, texts

MOST = 4  # columns, the mix not counted
OFFERED = 8  # revisions of each name in the list
MOMENT = 0.1  # seconds in which pieces of an answer gather
LONGEST = 100_000  # letters of a question

Kind = Literal["chat", "completion"]
_PATHS: Mapping[Kind, str] = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    kind: Kind
    most: int  # tokens
    temperature: float

    def body(self, model: str) -> dict[str, Any]:
        said: dict[str, Any] = {"prompt": self.text}
        if self.kind == "chat":
            said = {"messages": [{"role": "user", "content": self.text}]}
        usage = {"stream_options": {"include_usage": True}}
        return {"model": model, "max_tokens": self.most, "temperature": self.temperature, **said, **usage}


class Playground(Screen):
    title = "playground"
    place = "playground"
    every = 0

    def build(self) -> None:
        self._models: list[str] = []
        self._columns: list[str] = []
        self._names: list[str] = []
        self._asking: list[asyncio.Task[Any]] = []
        self.acts = {"ask": self._ask, "stop": self._stop, "add": self._add, "less": self._less}
        self.add("head", self.head("Playground"))
        self.add("form")
        self.add("answers")
        self.client.on_delete(self._cancel)

    async def look(self) -> None:
        adapters = (await self.api.get("/v1/adapters", revisions=OFFERED))["data"]
        mixes = (await self.api.get("/v1/mixes"))["data"]
        base = str((await self.api.get("/info"))["model_id"]) if self.base else ""
        models = [*_models(adapters, mixes), *([base] if base else [])]
        self._names = [one["name"] for one in adapters if one["revision"]]
        if not self._columns:
            asked = self.request.query_params.get("ask", "")
            self._columns = list(dict.fromkeys([*([asked] if asked else self._names[:1]), *models[-1:]]))
        if models != self._models:
            self._models = models
            self._show_form(_USUAL)

    def _show_form(self, question: Question) -> None:
        self.show("form", form_card(question, self._columns, self._models, self._names))

    async def _add(self, said: Said) -> None:
        self._columns = texts(said, "model")[: MOST - 1]
        unused = [one for one in self._models if one not in self._columns]
        self._columns += (unused or self._models)[:1]
        self._show_form(question_of(said))

    async def _less(self, said: Said) -> None:
        self._columns = texts(said, "model")[:-1][:MOST] or self._columns[:1]
        self._show_form(question_of(said))

    async def _stop(self, said: Said) -> None:
        self._cancel()

    def _cancel(self) -> None:
        for task in self._asking:
            task.cancel()
        self._asking = []

    async def _ask(self, said: Said) -> None:
        self._cancel()
        question = question_of(said)
        self._columns = [one.strip() for one in texts(said, "model") if one.strip()][:MOST]
        models = list(self._columns)
        if text(said, "with-mix"):
            models.append(mix_text(texts(said, "part"), texts(said, "weight")))
        if not question.text.strip() or not models:
            self.say("Type a question in, and name what it is for.", "wrong")
            return
        self.show("answers", NOTHING)
        self.show("answers", answers_cards(models))
        self._asking = [
            background_tasks.create(self._answer(place, model, question), name=f"answer {place}")
            for place, model in enumerate(models)
        ]

    async def _answer(self, place: int, model: str, question: Question) -> None:
        """Each piece goes to the browser once; several of a moment go together."""
        begun, first, tokens, pieces = time.monotonic(), None, None, 0
        waiting, told = "", begun
        try:
            async with self.api.asked(_PATHS[question.kind], question.body(model)) as (revision, events):
                self._tell(place, "by", after_at(revision) if "@" in revision else revision)
                async for event in events:
                    tokens = tokens_in(event) or tokens
                    piece = piece_of(event)
                    now = time.monotonic()
                    if piece:
                        first, pieces = first or now - begun, pieces + 1
                        waiting += piece
                    if waiting and now - told > MOMENT:
                        self._more(place, waiting)
                        waiting, told = "", now
            self._more(place, waiting)
            ended = _ended(first, tokens or pieces, time.monotonic() - begun)
        except NotTold as error:
            self._more(place, waiting)
            ended = f"No answer: {error}"
            if "template" in str(error) and question.kind == "chat":
                ended += " Ask it as a completion."
            self.run(f"document.getElementById('answer-{place}')?.closest('.card').classList.add('failed')")
        except asyncio.CancelledError:
            self._tell(place, "end", "stopped")
            raise
        self._tell(place, "end", ended)

    def _more(self, place: int, piece: str) -> None:
        if piece:
            self.run(f"lorakit.more('answer-{place}', {json.dumps(piece)})")

    def _tell(self, place: int, what: str, said: str) -> None:
        if not self.client.is_deleted:
            self.run(f"lorakit.put('{what}-{place}', {json.dumps(said)})")


_USUAL = Question("", "chat", 128, 0.0)


def question_of(said: Said) -> Question:
    kind: Kind = "completion" if text(said, "kind") == "completion" else "chat"
    most, temperature = number(said, "most", 1, 32768, 128), number(said, "temperature", 0, 2, 0)
    return Question(text(said, "question")[:LONGEST], kind, int(most), temperature)


def mix_text(names: Sequence[str], weights: Sequence[str]) -> str:
    """`mix(sql=0.7,chat=0.3)`: as a `model` is written; what has no weight is left out."""
    sums: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=False):
        with contextlib.suppress(ValueError):
            if name and float(weight):
                sums[name] = round(sums.get(name, 0.0) + float(weight), 4)
    return f"mix({','.join(f'{name}={weight:g}' for name, weight in sums.items())})"


def piece_of(event: Mapping[str, Any]) -> str:
    """What an event of a stream adds to its answer."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    said = choice.get("text") if not isinstance(delta, dict) else delta.get("content") or delta.get("reasoning_content")
    return said if isinstance(said, str) else ""


def tokens_in(event: Mapping[str, Any]) -> int | None:
    usage = event.get("usage")
    found = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return found if isinstance(found, int) else None


def _ended(first: float | None, tokens: int, took: float) -> str:
    return f"{count(tokens)} tokens · first after {seconds(first)} · all in {seconds(took)}"


def _models(adapters: Sequence[Mapping[str, Any]], mixes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a request may name, as far as a list may be long: aliases first, then the newest revisions, then mixes."""
    aliases = [
        alias if alias == one["name"] else f"{one['name']}@{alias}" for one in adapters for alias in one["aliases"]
    ]
    revisions = [
        each["id"] for one in adapters for each in reversed(one["revisions"]) if each["id"] and each["state"] == "ready"
    ]
    return list(dict.fromkeys([*aliases, *revisions, *(mix["name"] for mix in mixes if mix["name"])]))


def form_card(question: Question, columns: Sequence[str], models: Sequence[str], names: Sequence[str]) -> Markup:
    """Native fields: nothing is sent before somebody asks."""
    fields = joined(
        Markup(
            '<div><label for="model-{n}">Ask</label><input id="model-{n}" name="model" value="{model}" list="models" '
            'data-key="model-{n}" autocomplete="off" spellcheck="false"></div>'
        ).format(n=place, model=model)
        for place, model in enumerate(columns, 1)
    )
    kinds = options((("chat", "chat"), ("completion", "completion")), question.kind)
    more = button("Add another", "add") if len(columns) < MOST else NOTHING
    less = button("One less", "less") if len(columns) > 1 else NOTHING
    return card("Question", Markup(
        '<form class="stack" data-act="ask"><div><label class="unseen" for="question">Question</label>'
        '<textarea id="question" name="question" data-key="question" maxlength="{longest}" required>{text}'
        "</textarea></div>"
        '<div class="fields">{fields}</div><datalist id="models">{offered}</datalist>'
        '<div class="row">{more}{less}</div>{mix}'
        '<div class="fields">'
        '<div><label for="kind">As</label><select id="kind" name="kind" data-key="kind">{kinds}</select></div>'
        '<div><label for="most">Tokens at most</label><input id="most" name="most" type="number" min="1" max="32768" '
        'value="{most}" data-key="most"></div>'
        '<div><label for="temperature">Temperature</label><input id="temperature" name="temperature" type="number" '
        'min="0" max="2" step="0.1" value="{temperature:g}" data-key="temperature"></div>'
        '<div class="row"><button class="main" data-key="ask">Ask</button>{stop}'
        '<span class="quiet"><kbd>Ctrl</kbd> <kbd>Enter</kbd></span></div>'
        "</div></form>"
    ).format(
        longest=LONGEST, text=question.text, fields=fields, offered=options((one, one) for one in models), more=more,
        less=less, mix=_mix_fields(names), kinds=kinds, most=question.most, temperature=question.temperature,
        stop=button("Stop", "stop"),
    ))  # fmt: skip


def _mix_fields(names: Sequence[str]) -> Markup:
    """Sliders for a mix of two to three adapters."""
    if len(names) < 2:
        return NOTHING
    weights = ("0.70", "0.30", "0.00")
    slides = joined(
        Markup(
            '<div class="slide"><select name="part" aria-label="Adapter {n} of the mix" data-key="part-{n}">{options}'
            '</select><input type="range" name="weight" min="-1" max="1.5" step="0.05" value="{weight}" '
            'aria-label="Weight {n}" data-key="weight-{n}"><output>{weight}</output></div>'
        ).format(n=place, options=options(((one, one) for one in names), name), weight=weight)
        for place, (name, weight) in enumerate(zip(names, weights, strict=False), 1)
    )
    return Markup(
        '<details data-key="mix"><summary>A mix beside them</summary><fieldset><legend class="unseen">Mix</legend>'
        '<div class="choices"><label><input type="checkbox" name="with-mix" value="yes" data-key="with-mix">'
        "ask it as well</label></div>{}</fieldset></details>"
    ).format(slides)


def answers_cards(models: Sequence[str]) -> Markup:
    cards = joined(
        Markup(
            '<section class="card" aria-label="{model}"><header><h2>{model}</h2><code class="quiet" id="by-{n}"></code>'
            '</header><div class="text" id="answer-{n}" tabindex="0" aria-live="polite"></div>'
            '<footer id="end-{n}">asking …</footer></section>'
        ).format(model=model, n=place)
        for place, model in enumerate(models)
    )
    return Markup('<div class="answers">{}</div>').format(cards)
