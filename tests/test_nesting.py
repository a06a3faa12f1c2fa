"""Random nestings of blocks, callbacks and errors do what a small model says: rows, callbacks, errors, in order."""

from __future__ import annotations

import os
import random
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import SQLAlchemyError

from stanch import after_rollback, atomic, on_commit, rollback_only
from tests.support import cleaned
from tests.support.numbers import Number, Numbers, put

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncSession

    from tests.support.judge import FreshDatabase

pytestmark = [
    pytest.mark.anyio,
    # Programs add to a session whose flush has failed; SQLAlchemy says at its rollback that this is lost.
    pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active transaction"),
]

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

USUAL, LONG = 400, 10_000
"""Programs for each driver: in every run, and in the long one."""
SEED: Final = int(os.environ.get("STANCH_NESTING_SEED", "1"))
"""Of the first program; the others count on. A failure names the seed of its program: run one from there."""
SPAN = 100
"""A program has fewer numbers than that; what a callback writes has its own, as far again."""

# Programs ---------------------------------------------------------------------------------------------------

UNITS = ("db.transaction()", "session.begin()", "db.session()", "db.session() and commit()")
BLOCKS = ("savepoint", "join", "durable", "begin_nested")
STEPS: Final = {
    "text": 8, "core": 4, "flush": 8, "bad text": 2, "bad flush": 2, "caught text": 2, "caught flush": 2,
    "on_commit": 8, "after_rollback": 6,
    "rollback_only": 1, "error": 2, "block": 16,
}  # fmt: skip
"""What a program is made of, by weight."""


@dataclass(frozen=True)
class Block:
    """A unit of work, or a block in it, that catches what comes out of it or does not."""

    how: str
    catches: bool
    body: tuple[Step, ...]


@dataclass(frozen=True)
class Do:
    """A single step; *number* is the row, the callback or the error."""

    what: str
    number: int


Step: TypeAlias = "Block | Do"


def make_program(seed: int) -> Block:
    """The program of *seed*."""
    chance, numbers = random.Random(seed), iter(range(SPAN))

    def make_block(how: str, depth: int) -> Block:
        body = (make_step(depth) for _ in range(chance.randint(1, 5)))
        return Block(how, chance.random() < 0.6, tuple(body))

    def make_step(depth: int) -> Step:
        what = chance.choices([*STEPS], [*STEPS.values()])[0]
        if what == "block" and depth < 4:
            return make_block(chance.choice(BLOCKS), depth + 1)
        return Do("text" if what == "block" else what, next(numbers, SPAN - 1))

    while True:
        with suppress(StopIteration):
            program = make_block(chance.choice(UNITS), 0)
            if next(numbers, None) is not None:
                return program
        numbers = iter(range(SPAN))


class Error(Exception):
    """What a program raises by itself."""


class Raised(Exception):
    """An error of the model, by its name."""


@dataclass
class Outcome:
    """All that can be seen of a program that has run."""

    stored: list[int]
    ran: list[int]
    caught: list[str]
    raised: str | None
    failed_callbacks: int


@contextmanager
def catching(kind: type[Exception], outcome: Outcome) -> Generator[None]:
    """Whoever catches an error right where it is, and goes on, writes it down."""
    try:
        yield
    except kind as error:
        outcome.caught.append(name_of(error))


def name_of(error: Exception) -> str:
    """What an error is called in an outcome."""
    return str(error) if isinstance(error, Error | Raised) else type(error).__name__


def fails(callback: int) -> bool:
    """Whether this one raises."""
    return callback % 7 == 0


def writes(callback: int) -> bool:
    """Whether this one stores a row, in a unit of its own."""
    return callback % 7 == 1


# The model --------------------------------------------------------------------------------------------------


class Layer:
    """A transaction or savepoint: what it has gathered, and what stands against its commit."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.callbacks: list[tuple[str, int]] = []
        self.doomed = False
        self.aborted = ""


class Model:
    """What a program must do, without a database."""

    def __init__(self) -> None:
        self.layers, self.owners, self.marked = [Layer()], 0, False
        self.seen = Outcome([], [], [], None, 0)

    def run(self, unit: Block) -> Outcome:
        self.owners += unit.how in ("db.transaction()", "session.begin()")
        try:
            self.body(unit)
            if unit.how != "db.session()" and not (unit.how == "db.transaction()" and self.marked):
                self.commit()
        except Raised as error:
            self.seen.raised = str(error)
        self.end(committed=False)
        return self.seen

    def body(self, block: Block) -> None:
        for step in block.body:
            if isinstance(step, Do):
                self.do(step.what, step.number)
                continue
            try:
                self.enter(step)
            except Raised as error:
                self.seen.caught.append(str(error))
                if not step.catches:
                    raise

    def do(self, what: str, number: int) -> None:
        layer = self.layers[-1]
        match what:
            case "on_commit" | "after_rollback":
                layer.callbacks.append((what, number))
            case "rollback_only":
                self.marked = True
            case "error":
                raise Raised(f"error {number}")
            case "caught text" | "caught flush":
                with catching(Raised, self.seen):
                    self.do(what.replace("caught", "bad"), number)
            case _ if any(each.aborted for each in self.layers):
                layer.aborted = "flush" if "flush" in what else layer.aborted
                raise Raised("TransactionAborted")
            case "bad text" | "bad flush":
                layer.aborted = what.removeprefix("bad ")
                raise Raised("IntegrityError")
            case _:
                layer.rows.append(number)

    def enter(self, block: Block) -> None:
        owned = self.owners or len(self.layers) > 1
        if block.how == "durable" and owned:
            raise Raised("UnitConflict")
        if block.how == "begin_nested" or (block.how == "savepoint" and owned):
            self.nest(block)
        elif owned:
            self.join(block)
        else:
            self.be_the_owner(block)

    def nest(self, block: Block) -> None:
        outer, inner = self.layers[-1], Layer()
        if outer.aborted == "flush":
            raise Raised("TransactionAborted")
        self.layers.append(inner)
        try:
            self.body(block)
            if inner.doomed or inner.aborted:
                raise Raised("CommitRefused")
            outer.rows += inner.rows
            outer.callbacks += inner.callbacks
        except Raised:
            outer.callbacks += [("either", number) for when, number in inner.callbacks if when != "on_commit"]
            raise
        finally:
            self.layers.pop()

    def join(self, block: Block) -> None:
        try:
            self.body(block)
        except Raised:
            self.layers[-1].doomed = True
            raise

    def be_the_owner(self, block: Block) -> None:
        self.owners += 1
        try:
            self.body(block)
            if not self.marked:
                self.commit()
        finally:
            self.owners, self.marked = self.owners - 1, False
            self.end(committed=False)

    def commit(self) -> None:
        if self.layers[0].doomed or self.layers[0].aborted:
            raise Raised("CommitRefused")
        self.end(committed=True)

    def end(self, *, committed: bool) -> None:
        (layer,) = self.layers
        self.layers = [Layer()]
        self.seen.stored += layer.rows if committed else []
        for when, number in layer.callbacks:
            if when in ("either", "on_commit" if committed else "after_rollback"):
                self.seen.ran.append(number)
                self.seen.failed_callbacks += fails(number)
                self.seen.stored += [number + SPAN] if writes(number) else []


# The real thing ---------------------------------------------------------------------------------------------


class Reality:
    """Runs a program; *base* is added to every number that is stored."""

    def __init__(self, numbers: Numbers, base: int) -> None:
        self._numbers = numbers
        self._base = base
        self._told_before = len(numbers.told)
        self._seen = Outcome([], [], [], None, 0)

    async def run(self, unit: Block) -> Outcome:
        try:
            async with self._unit(unit.how) as session:
                await self._body(session, unit)
        except Exception as error:
            self._seen.raised = name_of(error)
        told = self._numbers.kinds[self._told_before :]
        self._seen.failed_callbacks = told.count("HookFailed")
        if "TeardownFailed" in told:
            self._seen.raised = (
                f"after {self._seen.raised}: {self._numbers.told[told.index('TeardownFailed')]}"
            )
        rows = await self._numbers.judge.fetch(
            "SELECT id FROM numbers WHERE id >= $1 AND id < $2", self._base, self._base + 2 * SPAN
        )
        self._seen.stored = [row["id"] - self._base for row in rows]
        stats = self._numbers.db.stats()
        assert (stats.in_use, stats.waiting) == (0, 0)
        return self._seen

    @asynccontextmanager
    async def _unit(self, how: str) -> AsyncGenerator[AsyncSession]:
        db = self._numbers.db
        match how:
            case "db.transaction()":
                async with db.transaction() as session:
                    yield session
            case "session.begin()":
                async with db.session() as session, session.begin():
                    yield session
            case _:
                async with db.session() as session:
                    yield session
                    if how == "db.session() and commit()":
                        await session.commit()

    async def _body(self, session: AsyncSession, block: Block) -> None:
        for step in block.body:
            if isinstance(step, Do):
                await self._do(session, step.what, step.number)
                continue
            try:
                async with _block(session, step.how):
                    await self._body(session, step)
            except Exception as error:
                self._seen.caught.append(name_of(error))
                if not step.catches:
                    raise

    async def _do(self, session: AsyncSession, what: str, number: int) -> None:
        row = -1 if what.startswith("bad") else self._base + number
        match what.removeprefix("bad "):
            case "on_commit":
                on_commit(session, self._callback, number)
            case "after_rollback":
                after_rollback(session, self._callback, number)
            case "rollback_only":
                rollback_only(session)
            case "error":
                raise Error(f"error {number}")
            case "caught text" | "caught flush":
                with catching(SQLAlchemyError, self._seen):
                    await self._do(session, what.replace("caught", "bad"), number)
            case "text":
                await put(session, row)
            case "core":
                await session.execute(insert(Number), [{"id": row}])
            case _:
                session.add(Number(id=row))
                await session.flush()

    async def _callback(self, number: int) -> None:
        self._seen.ran.append(number)
        if writes(number):
            async with self._numbers.db.transaction() as own:
                await put(own, self._base + number + SPAN)
        if fails(number):
            raise Error


def _block(session: AsyncSession, how: str) -> AbstractAsyncContextManager[Any]:
    match how:
        case "begin_nested":
            return session.begin_nested()
        case "join":
            return atomic(session, savepoint=False)
        case _:
            return atomic(session, durable=how == "durable")


# Compared ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def numbers(fresh_database: FreshDatabase, tmp_path: Path, driver: str) -> AsyncGenerator[Numbers]:
    numbers = Numbers(fresh_database, tmp_path / "unused", driver)
    numbers.db = numbers.database(pool_size=1)
    await numbers.create()
    async with numbers.db:
        yield numbers
        await numbers.assert_clean()


async def _compare(numbers: Numbers, count: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")  # thousands of callbacks fail on purpose
    met: set[str] = set()
    for index in range(count):
        program = make_program(SEED + index)
        expected = Model().run(program)
        seen = await Reality(numbers, index * 2 * SPAN).run(program)
        for outcome in (expected, seen):
            outcome.stored.sort()
        assert seen == expected, f"seed {SEED + index}: {program}"
        met |= {*expected.caught, expected.raised or "no error"}
        numbers.told.clear()
    assert met >= {"no error", "CommitRefused", "IntegrityError", "TransactionAborted", "UnitConflict"}


async def test_random_nestings_agree_with_the_model(
    numbers: Numbers, caplog: pytest.LogCaptureFixture
) -> None:
    await _compare(numbers, USUAL, caplog)


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_ten_thousand_random_nestings_agree_with_the_model(
    numbers: Numbers, caplog: pytest.LogCaptureFixture
) -> None:
    await _compare(numbers, LONG, caplog)


def test_programs_are_the_same_for_the_same_seed_and_deep_enough() -> None:
    def depth(block: Block) -> int:
        return 1 + max((depth(step) for step in block.body if isinstance(step, Block)), default=0)

    assert make_program(7) == make_program(7)
    assert {depth(make_program(seed)) for seed in range(USUAL)} == {1, 2, 3, 4, 5}
