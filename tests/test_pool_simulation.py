"""The pool under a seeded scheduler and a virtual clock: whatever the order of things, nothing is lost.

A seed is a whole run and is printed with what it breaks: ``STANCH_SEED=4711`` plays that one alone.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import os
import random
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import pytest
from sqlalchemy.util import greenlet_spawn

from stanch.deadlines import Deadline, under
from stanch.errors import DatabaseUnavailable, PoolExhausted
from stanch.ledger import Ledger, Stats, Waiter
from stanch.pool import Pool, Slot
from tests.support.simulation import Server, make_pool, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FEW: Final = 400
MANY: Final = 100_000
TICK: Final = 0.005
PARTS: Final = 4
"""So many tests share the seeds, so that several processes can."""


@pytest.fixture(autouse=True)
def _few_are_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stanch.admission.FEW", 1)


class Witness(Ledger[Slot]):
    """The ledger, with somebody beside the queue who knows in what order they came."""

    def __init__(self, **terms: Any) -> None:
        super().__init__(**terms)
        self.line: list[Waiter[Slot]] = []

    def enqueue(self, waiter: Waiter[Slot]) -> None:
        super().enqueue(waiter)
        self.line.append(waiter)

    def _put_back(self, waiter: Waiter[Slot]) -> None:
        if waiter not in self.line:
            self.line.append(waiter)  # one who had not waited before
        super()._put_back(waiter)

    def _serve_next(self, slot: Slot, *, usable: bool = False) -> None:
        waiting = [each for each in self.line if each in self._queue]
        super()._serve_next(slot, usable=usable)
        over = [each.since for each in waiting if each.is_over]
        assert max(over) <= min((each.since for each in self._queue), default=math.inf), "one came earlier"
        assert sum(each.slot is not None for each in waiting) == 1, "not one, but several or none were served"
        self.line = [each for each in self.line if each in self._queue or each.slot is not None]


def some(chance: random.Random, most: float) -> float:
    """Seconds, on a coarse clock: what happens in the same moment is what breaks things."""
    return chance.randrange(round(most / TICK) + 1) * TICK


@dataclass
class Crowd:
    """Callers of one pool, what they do, and what must be true of it."""

    chance: random.Random
    server: Server = field(init=False)
    pool: Pool = field(init=False)
    kind: type[Pool] = Pool
    outcomes: list[str] = field(default_factory=list[str])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        chance = self.chance
        self.settings = {
            "pool_size": chance.randint(1, 3),
            "max_overflow": chance.choice((0, 0, 1)),
            "pool_timeout": chance.choice((0.05, 0.5, 5.0)),
            "pool_use_lifo": chance.random() < 0.3,
            "max_waiting": chance.choice((None, None, 3)),
            "queue_target": chance.choice((None, 0.01)),
            "queue_interval": 0.02,
            **self.settings,
        }
        self.server = Server(chance)
        self.pool = make_pool(self.server, self.kind, **self.settings)
        self.server.failures = chance.choice((0.0, 0.0, 0.2))
        self.bound = self.settings["pool_size"] + self.settings["max_overflow"]
        if chance.random() < 0.2:
            self.server.room = chance.randint(1, self.bound)

    async def one(self) -> None:
        """A caller: comes, waits, uses what it got, gives it back; or is cancelled, or has a deadline, or breaks it."""
        chance = self.chance
        await asyncio.sleep(some(chance, 0.05))
        begun = asyncio.get_running_loop().time()
        deadline = Deadline.after(some(chance, 0.2), "a test") if chance.random() < 0.1 else None
        patience = self.settings["pool_timeout"] if deadline is None else deadline.timeout
        try:
            with under(deadline):
                fairy: Any = await greenlet_spawn(self.pool.connect)
        except BaseException as error:
            self.outcomes.append(type(error).__name__)
            if not isinstance(
                error, asyncio.CancelledError | PoolExhausted | DatabaseUnavailable | RuntimeError
            ):
                raise
            waited = asyncio.get_running_loop().time() - begun
            # a connect that was begun in time may end a little later
            assert waited <= patience + self.server.slowness + 0.002, f"waited {waited} of {patience}"
            return
        try:
            wire = fairy.dbapi_connection
            assert wire.is_open
            assert not wire.is_busy, "two have the same connection"
            wire.is_busy = True
            await asyncio.sleep(some(chance, 0.03))
            fate = chance.random()
            wire.is_busy = fate < 0.05  # left in the middle of an operation
            if fate > 0.95:
                wire.close()  # the server has closed it
            elif fate > 0.92:
                fairy.invalidate()
        finally:
            fairy.close()
        self.outcomes.append("served")

    async def watch(self) -> None:
        """What must be true at any moment."""
        while True:
            self.check()
            await asyncio.sleep(0.003)

    def check(self) -> None:
        stats = self.pool.stats()
        assert stats.size <= self.bound
        assert len(self.server.connections) <= self.bound, "more are open than may be"
        if stats.waiting and self.pool._ledger.is_open:
            assert stats.idle == 0, "somebody waits beside an idle connection"
            assert stats.in_use == self.bound, "somebody waits although there is room"

    async def play(self, callers: int = 8) -> None:
        tasks = [asyncio.create_task(self.one()) for _ in range(callers)]
        watch = asyncio.create_task(self.watch())
        others = [self.later(task.cancel) for task in tasks if self.chance.random() < 0.3]
        if self.chance.random() < 0.15:
            self.server.is_away = True
            others.append(self.later(self.come_back))
        if self.chance.random() < 0.1:
            others.append(self.later(self.forget_idle))
        pending = {watch, *tasks}
        while pending != {watch}:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled():
                    task.result()
        watch.cancel()
        await asyncio.wait(others or {watch})
        self.quiet()
        await self.lend_all()

    def later(self, act: Callable[[], object]) -> asyncio.Task[None]:
        """A task that does it, for a task may come between any two steps of the others."""

        async def wait_and_act() -> None:
            await asyncio.sleep(some(self.chance, 0.1))
            act()

        return asyncio.create_task(wait_and_act())

    def come_back(self) -> None:
        self.server.is_away = False

    def forget_idle(self) -> None:
        """As ``dispose(close=False)`` does."""
        for slot in self.pool._ledger.clear_idle():
            if slot.dbapi_connection is not None:
                self.pool._drop(slot)
        self.pool.generation += 1

    def quiet(self) -> None:
        """Nobody is there any more: nothing is held, and the books and the server agree."""
        stats = self.pool.stats()
        assert (stats.in_use, stats.waiting) == (0, 0), stats
        assert len(self.server.connections) == stats.idle, "the books and the server disagree"
        assert stats.idle <= self.settings["pool_size"]

    async def lend_all(self) -> None:
        """The whole pool can still be lent."""
        self.server.is_away, self.server.room, self.server.failures = False, None, 0.0
        await asyncio.sleep(1.5)  # by then an outage is looked at again
        fairies: list[Any] = [await greenlet_spawn(self.pool.connect) for _ in range(self.bound)]
        assert self.pool.stats() == Stats(
            pool_size=self.settings["pool_size"],
            max_overflow=self.settings["max_overflow"],
            in_use=self.bound,
            idle=0,
            waiting=0,
        )
        for fairy in fairies:
            fairy.close()
        self.quiet()


EVERYTHING: Final = {
    "served",
    "CancelledError",
    "PoolExhausted",
    "PoolOverloaded",
    "DatabaseUnavailable",
    "RuntimeError",
}


def play(seed: int, *, pool: type[Pool] = Pool, ledger: type[Ledger[Any]] = Witness) -> Crowd:
    crowds: list[Crowd] = []

    async def scene(chance: random.Random) -> None:
        crowds.append(Crowd(chance, kind=pool))
        await crowds[0].play()

    with patch("stanch.pool.Ledger", ledger):
        simulate(seed, scene)
    return crowds[0]


def play_all(seeds: Iterable[int]) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        outcomes.update(play(seed).outcomes)
    return outcomes


def test_nothing_is_lost_whatever_the_order() -> None:
    if chosen := os.environ.get("STANCH_SEED"):
        print(play(int(chosen)).outcomes)
        return
    outcomes = play_all(range(FEW))
    print(outcomes)
    assert outcomes.keys() == EVERYTHING, "everything that may happen has happened"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_is_lost_in_a_hundred_thousand_orders(part: int) -> None:
    outcomes = play_all(range(FEW + part, FEW + MANY, PARTS))
    print(f"{MANY // PARTS} seeds, 0 violations: {dict(outcomes)}")
    assert outcomes.keys() == EVERYTHING


# Teeth ------------------------------------------------------------------------------------------------------


class LosesWhatACancelledWaiterWasHanded(Pool):
    """What psycopg_pool did until its #1275: the turn comes in the moment of the cancellation, and nobody has it."""

    def _give_up(self, ledger: Ledger[Slot], waiter: Waiter[Slot]) -> None:
        if waiter.slot is None:
            super()._give_up(ledger, waiter)


class KeepsThePlaceOfAFailedConnect(Pool):
    def _do_return_conn(self, record: Any) -> None:
        if record.dbapi_connection is not None:
            super()._do_return_conn(record)


class HandsOnOnlyWhatIsOpen(Witness):
    """A connection that was severed is not replaced while others wait for it."""

    def give_back(self, slot: Slot, *, usable: bool) -> bool:
        if usable:
            return super().give_back(slot, usable=True)
        del self._out[id(slot)]
        self._door.give_up(slot)
        return False


class ServesTheLastFirst(Witness):
    def _next_in_time(self) -> Waiter[Slot]:
        return self._queue.popitem(last=True)[0]


class PutsBackBehindAllOthers(Witness):
    """Whom a server without room turned away begins to wait anew."""

    def _put_back(self, waiter: Waiter[Slot]) -> None:
        super()._put_back(waiter)
        self._queue.move_to_end(waiter)


class ForgetsTheBound(Witness):
    def open_up(self, *, new: Callable[[], Slot]) -> None:
        self._door.succeed()
        while self._queue:
            self._serve_next(new())


MUTANTS: Final[dict[str, dict[str, Any]]] = {
    "loses what a cancelled waiter was handed": {"pool": LosesWhatACancelledWaiterWasHanded},
    "keeps the place of a failed connect": {"pool": KeepsThePlaceOfAFailedConnect},
    "hands on only what is open": {"ledger": HandsOnOnlyWhatIsOpen},
    "serves the last first": {"ledger": ServesTheLastFirst},
    "puts back behind all others": {"ledger": PutsBackBehindAllOthers},
    "forgets the bound": {"ledger": ForgetsTheBound},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_found_and_found_again(mutant: str) -> None:
    for seed in range(FEW):
        found = broken_by(seed, mutant)
        if found:
            break
    else:
        pytest.fail(f"not found in {FEW} seeds")
    print(f"found by seed {seed}: {found}")
    assert broken_by(seed, mutant) == found, "the same seed is the same run"


def broken_by(seed: int, mutant: str) -> str | None:
    try:
        play(seed, **MUTANTS[mutant])
    except (AssertionError, PoolExhausted, DatabaseUnavailable) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


# In large numbers -------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def settled() -> int:
    gc.collect()
    return resident()


class Mill:
    """Callers who come again and again, with random failures and cancellations."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.server = Server(chance)
        self.server.failures = 0.05
        self.pool = make_pool(self.server, pool_size=5, max_overflow=2, pool_timeout=0.5)
        self.outcomes: Counter[str] = Counter()
        self.done = 0

    async def caller(self, times: int) -> None:
        for _ in range(times):
            self.done += 1
            try:
                fairy: Any = await greenlet_spawn(self.pool.connect)
            except (asyncio.CancelledError, PoolExhausted, DatabaseUnavailable, RuntimeError) as error:
                self.outcomes[type(error).__name__] += 1
                continue
            try:
                await asyncio.sleep(self.chance.randrange(3) / 1000)
                if self.chance.random() < 0.02:
                    fairy.dbapi_connection.is_busy = True
                self.outcomes["served"] += 1
            except asyncio.CancelledError:
                self.outcomes["CancelledError"] += 1
            finally:
                fairy.close()

    async def cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        while True:
            await asyncio.sleep(self.chance.randrange(5) / 1000)
            self.chance.choice(tasks).cancel()

    async def turn(self, checkouts: int, callers: int = 20) -> None:
        tasks = [asyncio.create_task(self.caller(checkouts // callers)) for _ in range(callers)]
        canceller = asyncio.create_task(self.cancel(tasks))
        await asyncio.wait(tasks)
        canceller.cancel()
        for task in tasks:
            if not task.cancelled():
                task.result()
        stats = self.pool.stats()
        assert (stats.in_use, stats.waiting) == (0, 0), stats
        assert len(self.server.connections) == stats.idle
        assert self.server.most <= 7


def mill(turns: int, checkouts: int) -> tuple[Mill, list[int]]:
    """So many checkouts in each of so many turns; and the memory in use after each."""
    memory: list[int] = []
    mills: list[Mill] = []

    async def scene(chance: random.Random) -> None:
        mills.append(Mill(chance))
        for _ in range(turns):
            await mills[0].turn(checkouts)
            memory.append(settled())

    simulate(1, scene)
    return mills[0], memory


def test_counts_agree_at_every_quiet_point() -> None:
    worked, _ = mill(turns=5, checkouts=1000)
    print(dict(worked.outcomes))
    assert worked.done <= worked.outcomes.total() + 20 * 5, (
        "a caller that is cancelled between two tries has none"
    )
    assert {"served", "CancelledError", "RuntimeError"} <= worked.outcomes.keys()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_million_checkouts_lose_nothing_and_leave_nothing() -> None:
    worked, memory = mill(turns=20, checkouts=50_000)
    grown = (memory[-1] - memory[3]) / 2**20
    print(
        f"{worked.done} checkouts, {dict(worked.outcomes)}; memory after 200 000 to the end {grown:+.2f} MiB"
    )
    assert worked.done == 1_000_000
    assert grown < 4.0


async def _wait_and_give_up(pool: Pool, callers: int) -> None:
    tasks = [asyncio.create_task(greenlet_spawn(pool.connect)) for _ in range(callers)]
    while pool.stats().waiting < callers:  # noqa: ASYNC110  # time costs nothing here
        await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert pool.stats().waiting == 0


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param(20, id="20 000"),
        pytest.param(1000, id="1 000 000", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_waiters_that_are_cancelled_leave_no_residue(batches: int) -> None:
    memory: list[int] = []

    async def scene(chance: random.Random) -> None:
        server = Server(chance)
        pool = make_pool(server, pool_size=1, max_overflow=0, queue_target=None)
        held: Any = await greenlet_spawn(pool.connect)
        for batch in range(batches):
            await _wait_and_give_up(pool, 1000)
            if batch % (batches // 10) == 0:
                memory.append(settled())
        assert len(pool._ledger._queue) == 0
        assert sys.getsizeof(pool._ledger._queue) < 200_000
        held.close()
        again: Any = await greenlet_spawn(pool.connect)
        again.close()
        assert len(server.attempts) == 1

    simulate(1, scene)
    grown = (memory[-1] - memory[2]) / 2**20
    print(f"{batches * 1000} waiters; memory after a fifth of them to the end {grown:+.2f} MiB")
    assert grown < 4.0, "a waiter that stays is a kilobyte"


def test_giving_up_costs_the_same_however_many_wait() -> None:
    """A hundred thousand in a list would take minutes, each looking for itself."""
    ledger: Ledger[object] = Ledger(pool_size=1, max_overflow=0, clock=time.monotonic)
    ledger.take(None, new=object)
    waiters = [Waiter[object](None, wake=lambda: None) for _ in range(100_000)]
    for waiter in waiters:
        ledger.enqueue(waiter)
    random.Random(1).shuffle(waiters)
    begun = time.process_time()
    for waiter in waiters:
        assert ledger.give_up(waiter, usable=lambda _slot: True) is None
    assert time.process_time() - begun < 5.0
    assert ledger.stats().waiting == 0


# Outages ----------------------------------------------------------------------------------------------------

SOONER = 5
"""Attempts that come sooner than a second after the one before: 50, 100, 200, 400 and 800 ms."""


@pytest.mark.parametrize("warm", [False, True])
def test_a_server_that_stays_away_is_asked_once_a_second_and_nobody_waits_longer(warm: bool) -> None:
    """Forty clients who come back at once after each failure; then the server is there again."""
    waits: list[float] = []
    served: list[float] = []
    asked: list[float] = []

    async def client(pool: Pool, until: float, chance: random.Random) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            begun = loop.time()
            try:
                fairy: Any = await greenlet_spawn(pool.connect)
            except DatabaseUnavailable:
                waits.append(loop.time() - begun)
                await asyncio.sleep(chance.random() * 0.05)
            else:
                served.append(loop.time())
                await asyncio.sleep(0.01)
                fairy.close()

    async def scene(chance: random.Random) -> None:
        server = Server(chance)
        pool = make_pool(server, pool_size=5, max_overflow=5)
        loop = asyncio.get_running_loop()
        if warm:
            await asyncio.gather(*(client(pool, loop.time() + 0.1, chance) for _ in range(40)))
            for wire in [*server.connections]:
                wire.close()
        begun = loop.time()
        server.attempts.clear()
        served.clear()
        server.is_away = True
        back = begun + 10.25
        loop.call_at(back, setattr, server, "is_away", False)
        await asyncio.gather(*(client(pool, back + 2, chance) for _ in range(40)))
        asked.extend(each - begun for each in server.attempts)
        during = [each for each in asked if each < 10.25]
        first = [each for each in during if each < server.slowness]
        later = [each for each in during if each >= server.slowness]
        print(
            f"attempts: {len(first)} before it was known, {len(later)} in 10 s, {len(asked) - len(during)} after"
        )
        assert len(first) <= (10 if warm else 1), "whoever had begun before it was known"
        assert len(later) <= 10 + SOONER
        gaps = [two - one for one, two in itertools.pairwise(later)]
        assert all(gap >= min(1.0, 0.1 * 2**number) - 0.001 for number, gap in enumerate(gaps)), gaps
        assert max(waits) <= 1.0 + 2 * server.slowness + 0.01
        assert len(asked) - len(during) <= 10 + 1, (
            "when it is back, the queue is served at once, and nobody pushes"
        )
        assert min(served) - back <= 1.0 + 2 * server.slowness + 0.01
        assert pool.stats().in_use == 0

    simulate(3, scene)


@pytest.mark.parametrize("outage", [0.1, 0.3, 0.7])
def test_a_server_that_is_soon_back_is_found_soon_and_fails_none_who_came_meanwhile(outage: float) -> None:
    """As a restart is: only those are told of it whose connections it cost, and whoever is there as it is noticed."""
    came: list[float] = []
    served: list[float] = []

    async def client(pool: Pool) -> None:
        came.append(time.monotonic())
        fairy: Any = await greenlet_spawn(pool.connect)
        served.append(time.monotonic())
        await asyncio.sleep(0.01)
        fairy.close()

    async def scene(chance: random.Random) -> None:
        server = Server(chance)
        pool = make_pool(server, pool_size=5, max_overflow=5)
        server.is_away = True
        begun = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await client(pool)
        asyncio.get_running_loop().call_at(begun + outage, setattr, server, "is_away", False)
        clients: list[asyncio.Task[None]] = []
        while time.monotonic() < begun + outage:
            clients.append(asyncio.create_task(client(pool)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*clients)
        assert len(clients) > 5
        slack = SOONER * server.slowness
        assert max(served) - begun <= 2 * outage + 0.05 + slack, "as long again as it was away, at most"
        assert len(server.attempts) <= SOONER + 10

    simulate(11, scene)


def test_a_probe_that_hangs_keeps_nobody_longer_than_a_second() -> None:
    waits: list[float] = []

    async def client(pool: Pool) -> None:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(DatabaseUnavailable, match="could not be reached"):
            await greenlet_spawn(pool.connect)
        waits.append(asyncio.get_running_loop().time() - begun)

    async def scene(chance: random.Random) -> None:
        server = Server(chance)
        pool = make_pool(server, pool_size=5, max_overflow=5)
        server.is_away = True
        await client(pool)
        await asyncio.sleep(1.5)
        server.slowness = 10.0
        probe = asyncio.create_task(client(pool))
        await asyncio.sleep(0.01)
        waits.clear()
        await asyncio.gather(*(client(pool) for _ in range(5)))
        assert max(waits) <= 1.001
        await probe

    simulate(5, scene)


def test_callers_in_a_hurry_do_not_ask_a_silent_server_more_often() -> None:
    """Each gives up before it is known what comes of his attempt; that it was made counts."""

    async def hurried(pool: Pool) -> None:
        with pytest.raises((TimeoutError, DatabaseUnavailable)):
            async with asyncio.timeout(0.03):
                await greenlet_spawn(pool.connect)

    async def scene(chance: random.Random) -> None:
        server = Server(chance)
        pool = make_pool(server, pool_size=5, max_overflow=5)
        server.is_away = True
        with pytest.raises(DatabaseUnavailable):
            await greenlet_spawn(pool.connect)
        server.slowness = 1000.0
        server.attempts.clear()
        begun = time.monotonic()
        while time.monotonic() < begun + 10:
            await hurried(pool)
            await asyncio.sleep(0.001)
        print(f"{len(server.attempts)} attempts in 10 s")
        assert 10 <= len(server.attempts) <= 10 + SOONER

    simulate(13, scene)


class NeverLooksAgain(Witness):
    """Whoever waits before a shut door sleeps until somebody wakes him."""

    def _let_first_look(self) -> None:
        pass

    def look(self, waiter: Waiter[Slot], *, new: Callable[[], Slot]) -> float | None:
        return None


def test_a_server_without_room_is_asked_again_although_nothing_comes_back() -> None:
    async def scene(chance: random.Random) -> None:
        server = Server(chance)
        server.room = 0
        pool = make_pool(server, pool_size=10, max_overflow=0)
        asyncio.get_running_loop().call_later(2.0, setattr, server, "room", 10)
        fairy: Any = await greenlet_spawn(pool.connect)
        fairy.close()

    simulate(9, scene)
    with patch("stanch.pool.Ledger", NeverLooksAgain), pytest.raises(PoolExhausted):
        simulate(9, scene)


def test_a_server_without_room_makes_callers_wait_and_fails_none() -> None:
    """Three connections for a pool of ten, and thirty who want one at once; the rest of the room is somebody else's."""
    served: list[int] = []

    async def one(pool: Pool, number: int) -> None:
        fairy: Any = await greenlet_spawn(pool.connect)
        await asyncio.sleep(0.02)
        fairy.close()
        served.append(number)

    async def scene(chance: random.Random) -> None:
        server = Server(chance)
        server.room = 3
        pool = make_pool(server, pool_size=10, max_overflow=0)
        await asyncio.gather(*(one(pool, number) for number in range(30)))
        print(f"{len(server.attempts)} attempts to open a connection, {server.most} were open at most")
        assert server.most == 3
        assert len(server.attempts) < 30
        server.room = 0
        for wire in [*server.connections]:
            wire.close()
        asyncio.get_running_loop().call_later(2.0, setattr, server, "room", 10)
        server.attempts.clear()
        await asyncio.gather(*(one(pool, number) for number in range(30)))
        print(f"nothing of ours out, and no room for 2 s: {len(server.attempts)} attempts")
        assert len(server.attempts) < 10 + 2 * 10
        server.room = 0
        for wire in [*server.connections]:
            wire.close()
        begun = asyncio.get_running_loop().time()
        with pytest.raises(PoolExhausted, match="no room for another connection") as caught:
            await greenlet_spawn(pool.connect)
        assert asyncio.get_running_loop().time() - begun == pytest.approx(5.0, abs=0.05)
        assert "SQLSTATE 53300" in str(caught.value)

    simulate(7, scene)
    assert len(served) == 60
