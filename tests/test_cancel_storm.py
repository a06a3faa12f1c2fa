"""Units of every kind, cancelled at random moments, all at once: nothing is lost, mixed up or left behind.

``STANCH_SEED=…`` repeats the choices of a run; the interleaving is the machine's own.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from stanch import CommitUnknown, Database
from stanch.sqlstate import sqlstate_of
from tests.support import cleaned
from tests.support.judge import OTHERS, FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy
from tests.support.suspensions import watched

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database
forgetful_driver = cleaned.forgetful_driver

POOL_SIZE: Final = 8
AT_ONCE: Final = 16
"""Half of the units wait for the pool."""

ENDS: Final = 20.0
"""Seconds within which a unit ends that needs milliseconds; the longest statement lasts 30."""

WRITE = text("INSERT INTO rows VALUES (:id)")
NONCE = text("SELECT CAST(:nonce AS int)")
NAP = text("SELECT CAST(:nonce AS int) FROM pg_sleep(:nap)")
ERROR = text("SELECT 1 / CAST(:zero AS int)")
SERIES = text("SELECT n + CAST(:nonce AS int) FROM generate_series(1, 6) n")
NOBODY_WORKS = f"SELECT 1 WHERE NOT EXISTS (SELECT FROM {OTHERS} AND state = 'active')"


class Mine(Exception):
    """The app's own error."""


@dataclass
class Storm:
    """What happened, by number of the unit."""

    db: Database[Any]
    chance: random.Random
    outcomes: dict[int, str] = field(default_factory=dict[int, str])
    cancelled_statements: int = 0
    cuts: Counter[str] = field(default_factory=Counter[str])
    strangers: list[str] = field(default_factory=list[str])
    """Answers that were somebody else's."""

    # What a unit does -------------------------------------------------------------------------------------

    async def say(self, statement: Awaitable[Any]) -> Any:
        """Await one statement, and count it if it is cancelled."""
        try:
            return await statement
        except asyncio.CancelledError:
            self.cancelled_statements += 1
            raise

    async def step(self, on: AsyncSession | AsyncConnection, number: int, gate: str) -> None:
        nonce = self.chance.randrange(2**31 - 10)
        match gate:
            case "ok":
                self.compare(number, nonce, await self.say(on.scalar(NONCE, {"nonce": nonce})))
            case "slow":
                nap = self.chance.uniform(0.001, 0.02)
                self.compare(number, nonce, await self.say(on.scalar(NAP, {"nonce": nonce, "nap": nap})))
            case "never":
                await self.say(on.scalar(NAP, {"nonce": nonce, "nap": 30}))
            case "error":
                await self.say(on.execute(ERROR, {"zero": 0}))
            case "own error":
                raise Mine
            case "stream":
                result = await self.say(
                    on.stream(SERIES, {"nonce": nonce}, execution_options={"yield_per": 2})
                )
                got = [value async for value in result.scalars()]
                self.compare(number, [nonce + n for n in range(1, 7)], got)
            case _:
                await asyncio.sleep(0)

    def compare(self, number: int, mine: object, got: object) -> None:
        if mine != got:
            self.strangers.append(f"unit {number} got {got!r} instead of {mine!r}")

    async def in_transaction(self, number: int, gates: list[str]) -> None:
        async with self.db.transaction() as session:
            await self.say(session.execute(WRITE, {"id": number}))
            for gate in gates:
                await self.step(session, number, gate)

    async def in_savepoints(self, number: int, gates: list[str]) -> None:
        async with self.db.transaction() as session:
            await self.step(session, number, gates[0])
            async with session.begin_nested():
                await self.say(session.execute(WRITE, {"id": number}))
                for gate in gates[1:]:
                    await self.step(session, number, gate)

    async def going_on(self, number: int, gates: list[str]) -> None:
        """A savepoint that is given up after a timeout; what it wrote must not be there."""
        async with self.db.transaction() as session:
            await self.say(session.execute(WRITE, {"id": number}))
            with suppress(TimeoutError):
                async with asyncio.timeout(self.chance.uniform(0, 0.02)), session.begin_nested():
                    await self.say(session.execute(WRITE, {"id": -number}))
                    for gate in gates:
                        await self.step(session, number, gate)
                    await self.step(session, number, "never")
            await self.step(session, number, "ok")

    async def by_core(self, number: int, gates: list[str]) -> None:
        async with self.db.begin() as connection:
            for gate in gates:
                await self.step(connection, number, gate)
            await self.say(connection.execute(WRITE, {"id": number}))

    async def in_autocommit(self, number: int, gates: list[str]) -> None:
        async with self.db.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            for gate in gates:
                await self.step(connection, number, "ok" if gate == "stream" else gate)

    # How it is cut ----------------------------------------------------------------------------------------

    async def unit(self, number: int) -> None:
        """One unit, its gates and its cut as chance has them."""
        chance = self.chance
        shape = chance.choice(
            [self.in_transaction, self.in_savepoints, self.going_on, self.by_core, self.in_autocommit]
        )
        gates = chance.choices(
            ["ok", "slow", "never", "error", "own error", "stream"], weights=[6, 6, 2, 1, 1, 2], k=3
        )
        how = chance.choice(["at a point", "after a time", "by a scope", "twice", "not at all"])
        if "never" in gates and how == "not at all":
            how = "after a time"
        work = self.judged(number, shape, gates)
        await self.cut(how, work)

    async def judged(
        self, number: int, shape: Callable[[int, list[str]], Coroutine[Any, Any, None]], gates: list[str]
    ) -> None:
        self.outcomes[number] = "cut"
        try:
            await shape(number, gates)
        except CommitUnknown:
            self.outcomes[number] = "unknown"
        except Mine:
            self.outcomes[number] = "failed"
        except (DBAPIError, InvalidRequestError) as error:
            # 25P02: SAVEPOINT itself was cancelled, so that there was none to go back to. InvalidRequestError: the
            # connection was lost, and with it what the transaction had done.
            if isinstance(error, DBAPIError) and sqlstate_of(error) not in {"22012", "25P02"}:
                raise
            self.outcomes[number] = "failed"
        else:
            self.outcomes[number] = "read" if shape == self.in_autocommit else "done"

    async def cut(self, how: str, work: Coroutine[Any, Any, None]) -> None:
        moment = self.chance.uniform(0, 0.05)
        point = self.chance.randint(1, 14)

        def at(number: int) -> None:
            if how in {"at a point", "twice"} and number == point:
                task.cancel()
            if how == "twice" and number == point + 1:
                task.cancel()

        async def run() -> None:
            if how == "by a scope":
                with anyio.move_on_after(moment) as scope:
                    await work
                self.cuts[how] += scope.cancelled_caught
            else:
                await watched(work, at)

        task = asyncio.create_task(run())
        # A unit that meets its cut too late, and never ends by itself, is cut by time as well.
        patience = {"after a time": moment, "not at all": ENDS}.get(how, 1.0)
        done, _ = await asyncio.wait((task,), timeout=patience)
        if not done:
            assert how != "not at all", f"a unit that nobody cuts ends within {ENDS} s"
            task.cancel()
            done, _ = await asyncio.wait((task,), timeout=ENDS)
            assert done, "a cancelled unit ends"
        if task.cancelled():
            self.cuts[how] += 1
        else:
            task.result()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(400, marks=pytest.mark.slow),
        pytest.param(5000, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
@pytest.mark.usefixtures("forgetful_driver")
async def test_a_storm_of_cancellations_loses_mixes_up_and_leaves_nothing(
    fresh_database: FreshDatabase, driver: str, number: int
) -> None:
    seed = int(os.environ.get("STANCH_SEED", "20261122"))
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    async with FaultProxy(fresh_database.server.port) as proxy, AsyncExitStack() as stack:
        url = proxy.through(fresh_database.url(driver)) + "?sslmode=disable"
        db: Database[Any] = Database(url, pool_size=POOL_SIZE, max_overflow=0, pool_timeout=20)
        await stack.enter_async_context(db)
        await everybody(db)
        proxy.forget()
        storm = Storm(db, random.Random(seed))
        numbers = iter(range(1, number + 1))

        async def worker() -> None:
            for each in numbers:
                await storm.unit(each)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))

        lost = proxy.connections - proxy.cancel_requests
        kinds = Counter(storm.outcomes.values())
        print(
            f"{driver}, STANCH_SEED={seed}: {dict(kinds)}; cut {dict(storm.cuts)};"
            f" {storm.cancelled_statements} statements cancelled, {proxy.cancel_requests} of them on the server,"
            f" {lost} connections lost"
        )
        await until(fresh_database, NOBODY_WORKS, timeout=ENDS / 2)
        await assert_nothing_left(fresh_database, db)
        await everybody(db)
        assert storm.strangers == []
        assert storm.cancelled_statements > number / 4, "the cancellations hit statements"
        assert proxy.cancel_requests > number / 10, "and many of them while the server worked"
        assert set(storm.cuts) == {"at a point", "after a time", "by a scope", "twice"}
        assert lost <= storm.cancelled_statements / 10
    stored = {row["id"] for row in await fresh_database.fetch("SELECT id FROM rows")}
    assert not {row for row in stored if row < 0}, "rows of a savepoint that was given up"
    for outcome, there in (("done", True), ("failed", False), ("read", False)):
        units = {each for each, said in storm.outcomes.items() if said == outcome}
        assert units, f"no unit was {outcome}"
        assert (units <= stored) if there else not (units & stored), outcome


async def everybody(db: Database[Any]) -> None:
    """The pool lends its full size, and each connection answers for itself."""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(db.connect()) for _ in range(POOL_SIZE)]
        for nonce, connection in enumerate(connections):
            assert await connection.scalar(NONCE, {"nonce": nonce}) == nonce
