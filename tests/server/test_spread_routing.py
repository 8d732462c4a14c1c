"""Which of several engines answers a request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.server.spread.routing import Asked, Capacity, Choice, Nowhere, Router

RANKS = (16, 64)
AT_ONCE = 256


def capacity(max_rank: int = 64, *, slots: int = 4, memory: int = 8, at_once: int = AT_ONCE) -> Capacity:
    return Capacity(slots, memory, max_rank, at_once)


def asked(name: str, rank: int = 16) -> Asked:
    return Asked(f"{name}@step-1", rank, name)


def router_of(count: int, max_rank: int = 64) -> Router:
    router = Router()
    for number in range(count):
        router.join(f"e{number}", capacity(max_rank))
    return router


def chosen(router: Router, what: Asked | None) -> Choice:
    choice = router.choose(what)
    assert isinstance(choice, Choice), choice
    return choice


def put(router: Router, engine: str, name: str, requests: int = 0) -> None:
    """An adapter into an engine, with so many requests in flight."""
    router.loaded(engine, asked(name).adapter)
    for _ in range(requests):
        router.begun(engine, asked(name).adapter)


def serve(router: Router, what: Asked) -> Choice:
    """As a gateway does: what is not there is loaded first, and so is the copy, and the request is in flight."""
    choice = chosen(router, what)
    for engine in (choice.engine, choice.copy_to):
        if engine is not None:
            router.loading(engine, what.adapter)
            router.loaded(engine, what.adapter)
    router.begun(choice.engine, what.adapter)
    return choice


# whatever happened


@dataclass
class Told:
    """What a router was told, as plainly as can be."""

    router: Router = field(default_factory=Router)
    capacities: dict[str, Capacity] = field(default_factory=dict)
    healthy: set[str] = field(default_factory=set)
    inside: set[tuple[str, str]] = field(default_factory=set)
    in_flight: list[tuple[str, str]] = field(default_factory=list)

    def requests(self, engine: str) -> int:
        return sum(where == engine for where, _ in self.in_flight)

    def is_busy(self, engine: str, times: float = 1.25) -> bool:
        """Above so many times the mean, and a sixty-fourth of what it answers at once."""
        total = sum(self.requests(one) for one in self.healthy)
        mean = total / sum(self.capacities[one].at_once for one in self.healthy)
        return self.requests(engine) / self.capacities[engine].at_once > max(1 / 64, times * mean)

    def has_slot(self, engine: str, adapter: str) -> bool:
        answering = {inside for where, inside in self.in_flight if where == engine}
        return adapter in answering or len(answering) < self.capacities[engine].slots


ENGINES, NAMES = [f"e{number}" for number in range(5)], [f"a{number}" for number in range(6)]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "leave", "sick", "well", "load", "remove", "begin", "many", "end"]),
        st.sampled_from(ENGINES), st.sampled_from(NAMES), st.sampled_from(RANKS),
    ),
    max_size=60,
)  # fmt: skip


@st.composite
def tellings(draw: st.DrawFn) -> Told:
    told = Told()
    for kind, engine, name, rank in [*((("join", engine, "", 64)) for engine in ENGINES[:2]), *draw(STEPS)]:
        adapter = asked(name).adapter
        if kind == "join":
            told.router.join(engine, capacity(rank))
            told.capacities[engine] = capacity(rank)
            told.healthy.add(engine)
        elif engine not in told.capacities:
            continue
        if kind in ("join", "leave"):
            told.inside = {pair for pair in told.inside if pair[0] != engine}
            told.in_flight = [pair for pair in told.in_flight if pair[0] != engine]
        if kind == "leave":
            told.router.leave(engine)
            del told.capacities[engine]
            told.healthy.discard(engine)
        elif kind in ("sick", "well"):
            told.router.set_health(engine, kind == "well")
            (told.healthy.add if kind == "well" else told.healthy.discard)(engine)
        elif kind == "load":
            told.router.loaded(engine, adapter)
            told.inside.add((engine, adapter))
        elif kind == "remove":
            told.router.removed(engine, adapter)
            told.inside.discard((engine, adapter))
        elif kind in ("begin", "many"):
            for _ in range(1 if kind == "begin" else 20):
                told.router.begun(engine, adapter)
                told.in_flight.append((engine, adapter))
        elif kind == "end" and told.in_flight:
            pair = told.in_flight.pop()
            told.router.ended(*pair)
    return told


@given(tellings(), st.sampled_from(NAMES), st.sampled_from([8, 64, 128]))
def test_a_request_gets_a_healthy_engine_that_takes_its_rank_whenever_there_is_one(
    told: Told, name: str, rank: int
) -> None:
    fit = {engine for engine in told.healthy if told.capacities[engine].max_rank >= rank}
    choice = told.router.choose(asked(name, rank))
    if fit:
        assert isinstance(choice, Choice)
        assert {choice.engine, choice.copy_to} <= {*fit, None}
    else:
        assert isinstance(choice, Nowhere)
        assert ("answers takes more than" in choice.reason) == bool(told.healthy)


@given(tellings(), st.sampled_from(NAMES))
def test_it_stays_where_its_adapter_is_while_that_engine_is_not_busy_and_has_a_slot(told: Told, name: str) -> None:
    what = asked(name).adapter
    holders = {engine for engine, adapter in told.inside if adapter == what} & told.healthy
    choice = told.router.choose(asked(name))
    if free := {engine for engine in holders if told.has_slot(engine, what) and not told.is_busy(engine)}:
        assert isinstance(choice, Choice)
        assert choice.is_there
        assert choice.engine in free
        assert choice.copy_to is None or told.is_busy(choice.engine, times=1)
    elif isinstance(choice, Choice):
        assert choice.is_there == (choice.engine in holders)


@given(tellings(), st.sampled_from(NAMES))
def test_a_copy_goes_only_to_an_engine_that_has_none_and_is_not_busy(told: Told, name: str) -> None:
    choice = told.router.choose(asked(name))
    if isinstance(choice, Choice) and choice.copy_to is not None:
        assert (choice.copy_to, asked(name).adapter) not in told.inside
        assert not told.is_busy(choice.copy_to)
        assert told.is_busy(choice.engine, times=1)


@given(tellings(), st.sampled_from(NAMES))
def test_to_ask_changes_nothing(told: Told, name: str) -> None:
    assert told.router.choose(asked(name)) == told.router.choose(asked(name))


@given(tellings())
def test_a_request_for_the_base_gets_a_healthy_engine(told: Told) -> None:
    choice = told.router.choose(None)
    assert isinstance(choice, Choice) == bool(told.healthy)
    if isinstance(choice, Choice):
        assert choice.engine in told.healthy


# busy engines


def test_requests_spill_over_once_a_copy_is_there() -> None:
    router = router_of(3)
    put(router, "e0", "sql", requests=12)
    first = chosen(router, asked("sql"))
    assert (first.engine, first.is_there) == ("e0", True)
    assert first.copy_to in ("e1", "e2")
    router.loading(first.copy_to, asked("sql").adapter)
    second = chosen(router, asked("sql"))
    assert second.engine == "e0"
    assert {first.copy_to, second.copy_to} == {"e1", "e2"}
    router.loaded(first.copy_to, asked("sql").adapter)
    assert chosen(router, asked("sql")).engine == first.copy_to


def test_an_engine_that_loads_something_gets_no_copy_meanwhile() -> None:
    router = router_of(2)
    put(router, "e0", "sql", requests=12)
    router.loading("e1", asked("chat").adapter)
    assert chosen(router, asked("sql")) == Choice("e0")
    router.loaded("e1", asked("chat").adapter)
    assert chosen(router, asked("sql")) == Choice("e0", copy_to="e1")


def test_where_it_would_wait_in_a_queue_it_spills_over_at_once() -> None:
    router = router_of(3)
    put(router, "e0", "sql", requests=AT_ONCE)
    choice = chosen(router, asked("sql"))
    assert choice.engine in ("e1", "e2")
    assert not choice.is_there


def test_where_it_would_wait_for_a_slot_it_goes_to_an_engine_that_has_one_and_is_far_less_busy() -> None:
    router = router_of(2)
    for number in range(4):
        put(router, "e0", f"a{number}", requests=1)
    put(router, "e0", "sql")
    assert chosen(router, asked("sql")) == Choice("e1", is_there=False)
    put(router, "e1", "chat", requests=3)
    assert chosen(router, asked("sql")) == Choice("e0")


def test_no_copy_is_made_of_an_adapter_that_is_not_what_keeps_an_engine_busy() -> None:
    router = router_of(3)
    put(router, "e0", "hot", requests=40)
    put(router, "e0", "cold", requests=1)
    assert chosen(router, asked("cold")) == Choice("e0")
    assert chosen(router, asked("hot")).copy_to is not None


def test_when_all_are_busy_alike_nothing_is_moved() -> None:
    router = router_of(3)
    for number in range(3):
        put(router, f"e{number}", f"a{number}", requests=50)
    for number in range(3):
        assert chosen(router, asked(f"a{number}")) == Choice(f"e{number}")


def test_of_several_that_have_it_the_least_busy_answers() -> None:
    router = router_of(3)
    put(router, "e0", "sql", requests=10)
    put(router, "e1", "sql", requests=9)
    assert chosen(router, asked("sql")).engine == "e1"


def test_an_engine_with_a_slot_for_it_comes_first() -> None:
    router = router_of(2)
    for number in range(4):
        put(router, "e0", f"a{number}", requests=1)
    put(router, "e0", "sql")
    put(router, "e1", "sql")
    put(router, "e1", "other", requests=20)
    put(router, "e0", "a0", requests=15)
    assert chosen(router, asked("sql")).engine == "e1"


def test_the_first_request_for_a_new_adapter_waits_where_it_is_being_loaded() -> None:
    router = router_of(4)
    first = chosen(router, asked("sql"))
    assert not first.is_there
    router.loading(first.engine, asked("sql").adapter)
    assert chosen(router, asked("sql")) == Choice(first.engine, is_there=False)
    router.removed(first.engine, asked("sql").adapter)  # it was refused there, and is nowhere again
    assert not chosen(router, asked("sql")).is_there


# hot and cold


def test_a_hot_adapter_is_on_as_many_engines_as_it_needs_and_each_cold_one_on_one() -> None:
    router = Router()
    for number in range(8):
        router.join(f"e{number}", capacity(slots=100, memory=100, at_once=256))
    engines: dict[str, list[str]] = {}
    for number in range(640):
        name = "hot" if number % 2 else f"cold-{number % 80}"
        engines.setdefault(name, []).append(serve(router, asked(name)).engine)
    hot = engines.pop("hot")
    assert len(set(hot)) == 8
    assert max(Counter(hot[160:]).values()) < 2 * 160 / 8
    assert all(len(set(one)) == 1 for one in engines.values())
    assert len({one[0] for one in engines.values()}) == 8


def test_a_copy_that_is_not_needed_any_more_gets_no_requests() -> None:
    router = router_of(4)
    for engine in ("e0", "e1", "e2"):
        put(router, engine, "sql")
    for _ in range(10):
        choice = serve(router, asked("sql"))
        router.ended(choice.engine, asked("sql").adapter)
        assert choice == Choice("e0")


# ranks


def test_a_small_adapter_goes_among_small_ranks_and_a_large_one_where_it_fits() -> None:
    router = Router()
    for number in range(3):
        router.join(f"small-{number}", capacity(16))
        router.join(f"large-{number}", capacity(128))
    for number in range(20):
        assert chosen(router, asked(f"a{number}", 8)).engine.startswith("small")
        assert chosen(router, asked(f"b{number}", 32)).engine.startswith("large")


def test_a_small_adapter_goes_among_large_ranks_when_the_small_are_busy() -> None:
    router = Router()
    router.join("small", capacity(16))
    router.join("large", capacity(128))
    put(router, "small", "other", requests=40)
    assert chosen(router, asked("sql", 8)).engine == "large"


def test_a_rank_that_no_engine_takes_is_said_with_the_cure() -> None:
    router = router_of(2, max_rank=16)
    choice = router.choose(asked("sql", 64))
    assert choice == Nowhere(
        "its rank is 64, and no engine that answers takes more than 16: shrink it, or start an engine with "
        "--max-lora-rank 64"
    )


def test_without_an_engine_that_answers_there_is_none() -> None:
    router = router_of(1)
    router.set_health("e0", False)
    assert router.choose(asked("sql")) == router.choose(None) == Nowhere("none of 1 engines answers")


# engines that come and go

MANY = [asked(f"run-{number}") for number in range(200)]


@pytest.fixture
def settled() -> Router:
    """Ten engines that have room, with two hundred cold adapters."""
    router = Router()
    for number in range(10):
        router.join(f"e{number}", capacity(memory=100))
    for what in MANY:
        engine = serve(router, what).engine
        router.ended(engine, what.adapter)
    return router


def where(router: Router) -> dict[str, str]:
    return {what.run: chosen(router, what).engine for what in MANY}


def test_when_an_engine_dies_only_what_was_on_it_moves_and_not_all_to_one(settled: Router) -> None:
    before = where(settled)
    settled.leave("e3")
    after = where(settled)
    moved = {run for run in before if before[run] != after[run]}
    assert moved == {run for run, engine in before.items() if engine == "e3"}
    assert len({after[run] for run in moved}) > 1


def test_when_an_engine_comes_nothing_moves_and_what_is_new_goes_there_too(settled: Router) -> None:
    before = where(settled)
    settled.join("e10", capacity(memory=100))
    assert where(settled) == before
    assert "e10" in {chosen(settled, asked(f"new-{number}")).engine for number in range(50)}


def test_an_engine_that_is_well_again_still_has_what_it_had(settled: Router) -> None:
    before = where(settled)
    settled.set_health("e3", False)
    assert "e3" not in where(settled).values()
    settled.set_health("e3", True)
    assert where(settled) == before


def test_two_gateways_that_know_nothing_of_each_other_bring_an_adapter_to_the_same_place() -> None:
    one, other = router_of(10), router_of(10)
    assert where(one) == where(other)


def test_the_end_of_a_request_that_began_before_its_engine_died_is_not_counted() -> None:
    router = router_of(2)
    put(router, "e0", "sql", requests=1)
    router.leave("e0")
    router.ended("e0", asked("sql").adapter)
    router.join("e0", capacity())
    router.ended("e0", asked("sql").adapter)
    put(router, "e0", "sql", requests=5)
    assert chosen(router, asked("sql")).copy_to is not None  # five, and not four, with which none is busy


# new revisions


def test_a_new_revision_goes_where_the_one_before_is_answering() -> None:
    router = router_of(4)
    put(router, "e1", "sql", requests=3)
    put(router, "e2", "sql", requests=2)
    put(router, "e3", "sql")
    new = Asked("sql@step-2", 16, "sql")
    assert set(router.places(new, asked("sql").adapter)) == {"e1", "e2"}


def test_a_new_revision_of_a_run_that_nobody_asks_for_goes_to_one_place() -> None:
    router = router_of(4)
    new = Asked("sql@step-2", 16, "sql")
    assert router.places(new) == router.places(new, "sql@step-1") == (chosen(router, new).engine,)
    put(router, "e1", "sql")
    assert router.places(new, asked("sql").adapter) == ("e1",)


def test_a_new_revision_has_no_place_where_no_engine_answers() -> None:
    assert Router().places(asked("sql")) == ()
