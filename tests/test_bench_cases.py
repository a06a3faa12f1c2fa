"""The cases of the bench: their arithmetic is right, and a tiny run of each gives figures of the right shape."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import create_async_engine

from bench import shop
from bench.arrivals import Arrived
from bench.cases import (
    distance,
    fairness,
    growth,
    hold_time,
    imports,
    instruments,
    overload,
    restart,
    waiting,
)
from bench.cases.case import Ground, Scale
from bench.cases.rounds import Gathered, Lane, lanes, rotated
from bench.goals import GOALS
from bench.load import Answer, Load
from bench.shop import Kind
from bench.subjects import SUBJECTS, Setting

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable
    from pathlib import Path

    from bench.cases.case import Case
    from bench.results import Figure
    from stanch.embedded import EmbeddedPostgres
    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

CASES = (distance, fairness, growth, hold_time, imports, instruments, overload, restart, waiting)
COMPARED = ("article", "stanch")
LONGER = (0.4, 1.2, 3.6)
"""Seconds of a load, until they were enough: the machine may have other work."""
ARTICLE = Lane(SUBJECTS["article"], "asyncpg")


class Nowhere:
    """A server that is never asked."""

    def __init__(self, database: FreshDatabase | None = None) -> None:
        self._database = database

    def url(self, driver: str = "asyncpg") -> str:
        return (
            self._database.url(driver) if self._database else f"postgresql+{driver}://nobody@127.0.0.1/none"
        )


def ground_of(
    *names: str,
    scale: Scale = Scale.QUICK,
    database: FreshDatabase | None = None,
    steps: list[str] | None = None,
) -> Ground:
    server = cast("EmbeddedPostgres", Nowhere(database))
    told: list[str] = [] if steps is None else steps
    return Ground(server, [SUBJECTS[name] for name in names], scale, told.append)


def named(figures: Iterable[Figure], subject: str) -> dict[str, tuple[float, ...]]:
    return {figure.quantity: figure.rounds for figure in figures if figure.subject == subject}


# What all of them stand on -----------------------------------------------------------------------------------


def test_every_case_can_be_told_and_asked_how_long_it_takes() -> None:
    for module in CASES:
        case: Case = module.CASE
        assert module.__name__ == f"bench.cases.{case.name}"
        assert case.title
        assert case.method.count("`") % 2 == 0
        quick, full = (case.seconds(ground_of("article", "stanch", scale=scale)) for scale in Scale)
        assert 0 < quick < full, case.name


def test_in_rotation_everybody_is_everywhere_as_often() -> None:
    orders = [rotated("abcd", number) for number in range(8)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert [sum(order[place] == "a" for order in orders) for place in range(4)] == [2, 2, 2, 2]
    assert rotated([], 3) == []


def test_a_quick_run_takes_few_subjects_and_a_full_one_all_and_both_drivers() -> None:
    some = ("bare", "article", "article-ping", "stanch", "stanch-reader")
    quick = lanes(ground_of(*some), Kind.READ, quick={"article", "stanch"})
    assert [str(lane) for lane in quick] == ["article, asyncpg", "stanch, asyncpg"]
    assert [lane.subject.name for lane in lanes(ground_of("article-ping"), Kind.READ, quick={"stanch"})] == [
        "article-ping"
    ], "who is asked for by name is measured"
    pair = lanes(ground_of("article", "core"), Kind.READ, quick={"article", "stanch"})
    assert [lane.subject.name for lane in pair] == ["article", "core"], "so are they all, where they are few"
    full = [str(lane) for lane in lanes(ground_of(*some, scale=Scale.FULL), Kind.READ, quick={"article"})]
    assert sorted(full) == sorted(
        [f"{name}, asyncpg" for name in some[1:]]
        + [f"{name}, psycopg" for name in ("article", "stanch", "stanch-reader")]
    )


def test_what_lacks_in_one_round_is_no_figure_for_rounds_are_compared_by_position() -> None:
    gathered = Gathered("overload")
    for told in (0.01, None, 0.03):
        of = gathered.of("stanch", load=2)
        of.less("told", "ms", told)
        of.more("good", "1/s", 90.0)
    assert [(figure.quantity, figure.rounds) for figure in gathered.figures()] == [
        ("good", (90.0, 90.0, 90.0))
    ]


# Each one's arithmetic ---------------------------------------------------------------------------------------


def test_fairness_counts_good_answers_and_measures_all() -> None:
    gathered = Gathered("fairness")
    answers = [Answer(200, 0.010)] * 98 + [Answer(200, 0.200), Answer(500, 0.300)]
    fairness._add_load(gathered, ARTICLE, Load(answers, 2.0))
    figures = list(gathered.figures())
    assert figures[0].where == {"driver": "asyncpg", "clients": 32, "pool": 10}
    told = named(figures, "article")
    assert told["requests"] == (49.5,)
    assert told["failed"] == (1.0,)
    assert told["p50"] == pytest.approx((10.0,))
    assert told["p99"] == pytest.approx((200.0,))
    assert told["p99/p50"] == pytest.approx((20.0,))


def test_a_loop_that_got_nothing_is_no_fairness_at_all() -> None:
    assert fairness.Turns([5000, 3000, 1, 0], [], 0).evenness == 0.0
    assert fairness.Turns([0, 0], [], 0).evenness == 0.0
    assert fairness.Turns([40, 50], [], 0).evenness == 0.8


def arrived(at: float, status: int = 200, took: float = 0.0, told: float | None = None) -> Arrived:
    return Arrived(at, Answer(status, took, told))


def test_overload_tells_the_good_from_the_refused_and_the_gone() -> None:
    those = [
        *(arrived(1 + number, took=0.1) for number in range(4)),
        *(arrived(1 + number, 503, 0.01, told=0.002) for number in range(2)),
        arrived(2, 0, 1.0),
        arrived(2, 500),
    ]
    outcome = overload.Outcome.of(those, capacity=4.0, seconds=2.0)
    assert (outcome.good, outcome.part, outcome.p99) == (2.0, 0.5, 0.1)
    assert (outcome.refused, outcome.gone, outcome.failed) == (0.25, 0.125, 0.125)
    assert outcome.told == 0.002


def test_overload_without_one_good_answer_is_not_told_as_a_quick_one() -> None:
    outcome = overload.Outcome.of([arrived(1, 0, 1.0)], capacity=4.0, seconds=2.0)
    assert (outcome.part, outcome.p99, outcome.told) == (0.0, overload.PATIENCE, None)


def outage(*those: Arrived) -> restart.Outage:
    return restart.Outage(those, shut_down=1.0, returned=2.0)


def test_a_restart_is_told_from_the_return_of_the_server() -> None:
    every = 1 / restart.RATE
    before = [arrived(number * every) for number in range(100)]
    away = [arrived(1 + number * every, 503, 0.3) for number in range(100)]
    failing = [arrived(2 + number * every, 500) for number in range(20)]
    back = [arrived(2.2 + number * every, took=0.005) for number in range(100)]
    told = outage(*before, *away, *failing, *back)
    assert told.good[0] == pytest.approx(0.205)
    assert told.back == pytest.approx(0.205)
    assert told.longest == 0.3
    assert told.statuses == {503: 100, 500: 20, 200: 100}


def test_who_answers_now_and_then_is_not_back() -> None:
    now_and_then = [arrived(2.1 + 0.1 * number) for number in range(2 * round(restart.RATE))]
    told = outage(*now_and_then)
    assert told.good[0] == pytest.approx(0.1)
    assert told.back is None
    assert (outage().good, outage().back, outage().longest) == ([], None, 0.0)


async def test_what_is_done_after_the_reply_belongs_to_the_end_and_not_to_the_reply() -> None:
    done: list[str] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200 if len(done) < 20 else 500})
        await send({"type": "http.response.body", "body": b"{}"})
        done.extend("after the reply" for _ in range(10))

    told = await distance.call_after_call(cast("Any", app), 0.0)
    assert 0 < told.reply <= told.end
    assert told.rate > 0
    assert len(done) == 10
    with pytest.raises(RuntimeError, match="answered \\[500\\]"):
        await distance.call_after_call(cast("Any", app), 60.0)


async def test_growth_sees_what_each_request_leaves_behind() -> None:
    kept: list[bytearray] = []
    app = FastAPI()

    @app.get("/items/{number}")
    async def leaks(number: int) -> dict[str, int]:
        kept.append(bytearray(b"x" * 20_000))
        return {"id": number}

    if growth.CASE.needs():
        pytest.skip(f"no {growth.CASE.needs()}")
    grown = await growth.grow(app, 100, 1000)
    assert len(kept) == 1100
    assert 15_000 < grown.slope < 25_000
    assert grown.by == sorted(grown.by)
    assert grown.failed == 0


async def test_a_request_that_fails_is_counted_and_stops_nobody() -> None:
    app = FastAPI()

    @app.get("/items/{number}")
    async def fails(number: int) -> dict[str, int]:
        if number % 2:
            raise ValueError(number)
        return {"id": number}

    grown = await growth.grow(app, 10, 100)
    assert grown.failed == 55, "those of the warm-up, too"


def test_imports_measures_the_process_and_not_its_parent(tmp_path: Path) -> None:
    ballast = bytearray(b"x" * 200_000_000)
    python = imports._Python(tmp_path)
    nothing, something = python.used("pass"), python.used("import decimal, sqlalchemy")
    assert nothing.memory < something.memory < len(ballast) / 2
    assert 0 < nothing.cpu < something.cpu
    assert any("sqlalchemy" in file.parts for file in tmp_path.rglob("*.pyc")), "its bytecode is kept"
    with pytest.raises(RuntimeError, match="no_such_module"):
        python.used("import no_such_module")


def test_imports_compares_with_the_baseline_also_where_it_was_not_asked_for() -> None:
    assert imports._names(ground_of("bare", "stanch", "stanch-reader")) == ["article", "stanch"]
    assert imports._code("article") == imports.ALONE


# Goals -------------------------------------------------------------------------------------------------------


def test_every_goal_has_a_bound_and_is_about_somebody() -> None:
    for goal in GOALS:
        assert (goal.ratio_at_least is None) != (goal.ratio_at_most is None), goal
        assert goal.case == "instruments" or goal.subject in SUBJECTS, goal
        assert goal.than is None or goal.than in SUBJECTS, goal


# Tiny runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def shop_database(fresh_database: FreshDatabase) -> FreshDatabase:
    engine = create_async_engine(fresh_database.url())
    async with engine.begin() as connection:
        await shop.prepare(connection)
    await engine.dispose()
    return fresh_database


@asynccontextmanager
async def app_of(subject: str, database: FreshDatabase, **setting: Any) -> AsyncGenerator[FastAPI]:
    app = SUBJECTS[subject].build(Setting(database.url(), **setting))
    async with app.router.lifespan_context(app):
        yield app


@pytest.mark.parametrize("subject", COMPARED)
async def test_six_loops_have_turns_and_the_client_beside_them_is_served(
    subject: str, shop_database: FreshDatabase
) -> None:
    async with app_of(subject, shop_database, pool_size=fairness.LOOPS_POOL) as app:
        turns = await fairness.turns(app, 0.1)  # warm
        for seconds in LONGER:
            turns = await fairness.turns(app, seconds)
            if sum(turns.of_each) > 30 * fairness.LOOPS:
                break
    print(f"{subject}: {turns}")
    assert len(turns.of_each) == fairness.LOOPS
    assert sum(turns.of_each) > fairness.LOOPS
    assert turns.waits
    assert turns.failed == 0
    if subject == "stanch":
        assert turns.evenness > 0.4
    else:
        assert turns.evenness < 0.4, "SQLAlchemy's pool lets newcomers overtake: this is what the case shows"


async def test_who_holds_no_connection_elsewhere_serves_more(shop_database: FreshDatabase) -> None:
    async def rate_of(subject: str, seconds: float) -> float:
        async with app_of(subject, shop_database, pool_size=hold_time.POOL) as app:
            driven = await hold_time.drive(app, seconds)
        print(f"{subject}: {driven}")
        assert driven.failed == 0
        return driven.rate

    for seconds in LONGER:
        article, reader = [await rate_of(subject, seconds) for subject in ("article", "stanch-reader")]
        assert article <= hold_time.POOL / shop.ELSEWHERE
        if reader > article:
            break
    else:
        pytest.fail("it served no more")


@pytest.mark.parametrize("subject", COMPARED)
async def test_waiting_requests_take_memory_and_can_be_cancelled(
    subject: str, shop_database: FreshDatabase
) -> None:
    if waiting.CASE.needs():
        pytest.skip(f"no {waiting.CASE.needs()}")
    setting = {"pool_size": waiting.POOL, "pool_timeout": 60.0, "options": waiting.PATIENT}
    async with app_of(subject, shop_database, **setting) as app:
        waited = await waiting.wait(app, shop_database.url(), 300)
    print(f"{subject}: {waited}")
    assert 2_000 < waited.memory < 200_000
    assert waited.cancelled is not None
    assert 0 < waited.cancelled < 0.1


async def test_instruments_are_beside_themselves_switched_off(
    shop_database: FreshDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruments, "ROUNDS", {Scale.QUICK: 3})
    monkeypatch.setattr(instruments, "TIMES", 5)
    ground = ground_of(*COMPARED, database=shop_database)
    figures = await asyncio.to_thread(list, instruments.CASE.run(ground))
    assert {(figure.subject, figure.where["what"]) for figure in figures} == {
        (subject, what) for subject in instruments.WITH for what in ("checkout", "read")
    }
    assert {figure.quantity for figure in figures if figure.subject == "everything off"} == {"time"}
    assert {figure.quantity for figure in figures if figure.subject == "as it is"} == {"time", "more"}
    assert all(len(figure.rounds) == 3 for figure in figures)
    assert import_module("stanch.events").context_providers == [], "OpenTelemetry is told nothing more"


@pytest.mark.long
async def test_a_tiny_run_of_fairness(shop_database: FreshDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = fairness.Length(2, 0.2)
    monkeypatch.setattr(fairness, "LENGTHS", {Scale.QUICK: (tiny, tiny)})
    monkeypatch.setattr(fairness, "CLIENTS", 8)
    steps: list[str] = []
    ground = ground_of("stanch", database=shop_database, steps=steps)
    told = named(await asyncio.to_thread(list, fairness.CASE.run(ground)), "stanch")
    assert steps == [
        f"{load}, round {number} of 2: stanch, asyncpg"
        for load in ("8 clients", f"{fairness.LOOPS} loops")
        for number in (1, 2)
    ]
    assert told.keys() > {"requests", "p50", "p99", "p99/p50", "least turns / most turns", "failed"}
    assert all(len(rounds) == 2 for rounds in told.values())
    assert min(told["requests"]) > 10
    assert told["failed"] == (0, 0)


@pytest.mark.long
async def test_a_tiny_run_of_overload(shop_database: FreshDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "LENGTHS", {Scale.QUICK: overload.Length(1, 0.5, 0.5)})
    monkeypatch.setattr(overload, "LOADS", (4,))
    ground = ground_of("stanch", database=shop_database)
    told = named(await asyncio.to_thread(list, overload.CASE.run(ground)), "stanch")
    print(told)
    assert 0 < told["capacity"][0] <= overload.POOL / shop.ELSEWHERE * 1.5
    assert told["refused"][0] > 25
    assert 0 < told["told (p99)"][0] < 1000
    assert told["good answers"][0] > 0
    assert told["failed"] == (0,)


@pytest.mark.long
async def test_a_tiny_run_of_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "LENGTHS", {Scale.QUICK: restart.Length(1, 0.2, 2.5)})
    monkeypatch.setattr(restart, "AWAY", 1.5)  # stanch tells nobody of what is over within a moment
    told = named(await asyncio.to_thread(list, restart.CASE.run(ground_of("stanch"))), "stanch")
    print(told)
    assert told["requests that failed"][0] > 0
    assert told["requests that failed"] == told["answered 503"], "that the database is away is a 503"
    assert told["answered 200"][0] > 0
    assert 0 <= told["first good answer after"][0] <= told["90% of the rate after"][0] < 2.5
    assert told["longest answer"][0] > 0
