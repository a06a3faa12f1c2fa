"""stanch does not become more costly unseen: round trips and instructions are compared with a stored baseline."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import create_async_engine

from bench import shop
from bench.cases.counts import Counting, Wire, of_opening, of_subject
from bench.cases.instructions import Instructions, Valgrinds
from bench.guard import ELSEWHERE_TOLERANCE, TOLERANCE, Measured, judge, measure
from bench.shop import Kind, Reply
from bench.subjects import OURS, SUBJECTS, Setting, Subject
from tests.support.optional import needs

if TYPE_CHECKING:
    from pathlib import Path

    from bench.cases.case import Case
    from stanch.embedded import EmbeddedPostgres
    from tests.support.judge import FreshDatabase

GUARD_TIMEOUT = 1800
"""Seconds; it takes one minute on a machine that does nothing else."""


@needs("valgrind")
@pytest.mark.long
@pytest.mark.timeout(GUARD_TIMEOUT)
def test_nothing_has_become_more_costly_than_the_baseline() -> None:
    """Where that is meant, or where it has become cheaper: ``python -m bench.guard --store``."""
    measured = measure()
    told = judge(measured, Measured.read())
    print(measured, told)
    assert told.worse == []


@needs("valgrind")
@pytest.mark.long
@pytest.mark.timeout(GUARD_TIMEOUT)
def test_a_subject_that_does_not_answer_is_not_counted() -> None:
    with (
        Valgrinds("postgresql+asyncpg://nobody@127.0.0.1:1/nothing") as valgrinds,
        pytest.raises(RuntimeError, match=r"(?s)was answered \[404\].*bare READ could not be counted"),
    ):
        dict(valgrinds.count({"bare": [Kind.READ]}))


def test_without_valgrind_the_case_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    case: Case = Instructions()
    assert case.needs() == "valgrind and vgdb not installed (apt install valgrind)"


# The judgement ------------------------------------------------------------------------------------------------

STORED = Measured("3.11", {"stanch": {"READ": 3}}, {"stanch": {"READ": 1.5}})


def test_one_round_trip_more_is_worse_and_one_less_better() -> None:
    more = judge(STORED._replace(round_trips={"stanch": {"READ": 4}}), STORED)
    assert (more.worse, more.better) == (["stanch READ: 4 round trips, was 3"], [])
    less = judge(STORED._replace(round_trips={"stanch": {"READ": 2}}), STORED)
    assert (less.worse, less.better) == ([], ["stanch READ: 2 round trips, was 3"])
    assert judge(STORED, STORED) == ([], [])


@pytest.mark.parametrize(
    ("python", "tolerance"), [("3.11", TOLERANCE), ("3.13", ELSEWHERE_TOLERANCE)], ids=["same", "another"]
)
def test_instructions_may_differ_by_the_tolerance_and_no_more(python: str, tolerance: float) -> None:
    def judged(times: float) -> tuple[int, int]:
        told = judge(Measured(python, STORED.round_trips, {"stanch": {"READ": 1.5 * times}}), STORED)
        return len(told.worse), len(told.better)

    assert judged(1 + tolerance - 0.001) == judged(1 - tolerance + 0.001) == (0, 0)
    assert judged(1 + tolerance + 0.001) == (1, 0)
    assert judged(1 - tolerance - 0.001) == (0, 1)


def test_what_has_no_baseline_is_worse() -> None:
    now = STORED._replace(round_trips={"stanch": {"READ": 3, "NEW": 0}, "another": {"READ": 1}})
    assert judge(now, STORED).worse == [
        "stanch NEW: 0 round trips, with no baseline",
        "another READ: 1 round trips, with no baseline",
    ]


def test_the_stored_is_read_as_it_was_written(tmp_path: Path) -> None:
    STORED.write(tmp_path / "stored.json")
    assert Measured.read(tmp_path / "stored.json") == STORED


def test_the_baseline_names_every_kind_of_request() -> None:
    stored = Measured.read()
    assert {name: set(kinds) for name, kinds in stored.round_trips.items()} == {
        name: {kind.name for kind in Kind} for name in OURS
    }


# What the proxy counts ----------------------------------------------------------------------------------------


@pytest.fixture
async def prepared(fresh_database: FreshDatabase) -> FreshDatabase:
    engine = create_async_engine(fresh_database.url("asyncpg"))
    async with engine.begin() as connection:
        await shop.prepare(connection)
    await engine.dispose()
    return fresh_database


@pytest.fixture
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shop, "ELSEWHERE", 0.0)


BY_HAND = {
    Kind.BARE: 0,
    Kind.UNUSED: 0,
    Kind.READ: 3,
    Kind.WRITE: 3,
    Kind.SLOW: 3,
    Kind.FIVE: 7,
    Kind.ORDER: 4,
}
"""BEGIN, the statements, and COMMIT or ROLLBACK."""


@pytest.mark.anyio
@pytest.mark.slow
@pytest.mark.parametrize("name", ["article", "sqlmodel"], ids=["asyncpg", "psycopg, in threads"])
async def test_a_transaction_by_hand_costs_what_is_known(
    name: str, prepared: FreshDatabase, postgres: EmbeddedPostgres, in_no_time: None
) -> None:
    with Counting(postgres.port) as wire:
        counted = await of_subject(SUBJECTS[name], wire.through(prepared.url("asyncpg")), wire)
    assert counted == {kind: Wire(trips, trips, 0) for kind, trips in BY_HAND.items()}


@pytest.mark.anyio
@pytest.mark.slow
async def test_opening_is_counted_apart(prepared: FreshDatabase, postgres: EmbeddedPostgres) -> None:
    with Counting(postgres.port) as wire:
        first, another = await of_opening(SUBJECTS["asyncpg"], wire.through(prepared.url("asyncpg")), wire)
    # asyncpg asks nothing of a new connection; it prepares the statement, and executes it
    assert first == another == Wire(round_trips=2, statements=1, connections=1)


@pytest.mark.anyio
async def test_what_a_request_does_not_wait_for_is_no_round_trip_of_it(
    prepared: FreshDatabase, postgres: EmbeddedPostgres
) -> None:
    with Counting(postgres.port) as wire:
        asyncpg: Any = importlib.import_module("asyncpg")
        connection = await asyncpg.connect(wire.through(prepared.url(None)))
        left: list[asyncio.Task[str]] = []

        def build(setting: Setting) -> FastAPI:
            app = FastAPI()

            @app.get("/items/{number}")
            async def read(number: int) -> Reply:
                if left:
                    await left.pop()  # the wire is free again
                await connection.execute("SELECT 1")
                left.append(asyncio.create_task(connection.execute("SELECT 2")))
                await asyncio.sleep(0)  # it is written now
                return {"id": number, "name": "read"}

            return app

        planted = Subject("planted", "planted", build, frozenset({Kind.READ}))
        counted = await of_subject(planted, "", wire)
        await left.pop()
        await connection.close()
    assert counted == {Kind.READ: Wire(round_trips=1, statements=2, connections=0)}
