"""Load beyond capacity, in virtual time, on the real pool with its default settings: who is served in time, who not.

What is overload must be refused; what only looks like it (a burst, a crowd of constant size, slow work) must not be.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest
from sqlalchemy.util import greenlet_spawn

from stanch.accounts import Account, paying
from stanch.admission import Everybody
from stanch.errors import DatabaseUnavailable, PoolExhausted, PoolOverloaded
from stanch.ledger import Ledger, Waiter
from tests.support.simulation import Server, make_pool, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from stanch.pool import Pool

PATIENCE: Final = 1.0
"""Seconds after which a client has gone; the work is done all the same, for nobody."""
FOR: Final = 10.0


@dataclass
class Served:
    """What became of the callers."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    good: list[float] = field(default_factory=list[float])
    waits_of_refused: list[float] = field(default_factory=list[float])
    most_waiting: int = 0

    def p99(self) -> float:
        return sorted(self.good)[round(len(self.good) * 0.99) - 1]


async def call(pool: Pool, held: float, served: Served) -> bool:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        fairy: Any = await greenlet_spawn(pool.connect)
    except (PoolExhausted, DatabaseUnavailable) as error:
        served.outcomes[type(error).__name__] += 1
        if isinstance(error, PoolOverloaded):
            served.waits_of_refused.append(loop.time() - begun)
        return False
    await asyncio.sleep(held)
    fairy.close()
    took = loop.time() - begun
    served.outcomes["in time" if took <= PATIENCE else "too late"] += 1
    if took <= PATIENCE:
        served.good.append(took)
    return True


def played(
    scene: Callable[[Pool, Served, random.Random], Coroutine[Any, Any, None]], seed: int = 1, **settings: Any
) -> Served:
    served = Served()

    async def staged(chance: random.Random) -> None:
        server = Server(chance)
        server.slowness = 0.001
        terms: dict[str, Any] = {"pool_size": 10, "max_overflow": 0, **settings}
        await scene(make_pool(server, **terms), served, chance)

    simulate(seed, staged)
    return served


def open_loop(load: float, held: float, seconds: float = FOR) -> Callable[..., Coroutine[Any, Any, None]]:
    """Callers who come at *load* times what ten connections, each *held* so long, can serve."""

    async def scene(pool: Pool, served: Served, chance: random.Random) -> None:
        loop = asyncio.get_running_loop()
        over, tasks = loop.time() + seconds, list[asyncio.Task[bool]]()
        while loop.time() < over:
            await asyncio.sleep(chance.expovariate(load * 10 / held))
            tasks.append(asyncio.create_task(call(pool, held, served)))
            served.most_waiting = max(served.most_waiting, pool.stats().waiting)
        await asyncio.wait(tasks)
        assert (pool.stats().in_use, pool.stats().waiting) == (0, 0)

    return scene


@pytest.mark.parametrize("held", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("load", [1.2, 2.0, 4.0, 10.0])
def test_overload_is_served_at_capacity_and_in_time(load: float, held: float) -> None:
    served = played(open_loop(load, held))
    share = len(served.good) / (FOR * 10 / held)
    print(
        f"{load}x of {10 / held:.0f}/s: {share:.1%} good, p99 {served.p99() * 1000:.0f} ms, {dict(served.outcomes)}"
    )
    assert share >= 0.95
    assert served.p99() <= (0.25 if load >= 2 else 0.4), "a slow growth is seen late, and is less of a harm"
    assert served.outcomes["too late"] == 0
    at_once = sum(wait == 0.0 for wait in served.waits_of_refused)
    assert at_once >= 0.8 * len(served.waits_of_refused) or load < 2, "most are told before they have waited"
    assert served.most_waiting <= load * 10 / held * 0.4, "no more than came until it was noticed"


def test_without_refusals_overload_serves_hardly_anybody_in_time() -> None:
    """The bad subject: the same pool as SQLAlchemy's has it, fair but patient."""
    served = played(open_loop(2.0, 0.05), queue_target=None, pool_timeout=30.0)
    share = len(served.good) / (FOR * 10 / 0.05)
    print(f"2x, nobody refused: {share:.1%} good, {dict(served.outcomes)}")
    assert share < 0.35


def test_load_that_can_be_served_is_not_refused() -> None:
    for load in (0.5, 0.8, 0.95):
        served = played(open_loop(load, 0.05, seconds=60.0))
        offered = served.outcomes.total()
        print(f"{load}x: {dict(served.outcomes)}")
        assert served.outcomes["PoolOverloaded"] <= 0.01 * offered
        assert served.outcomes["in time"] >= 0.99 * offered


def test_it_ends_when_the_load_does() -> None:
    async def scene(pool: Pool, served: Served, chance: random.Random) -> None:
        await open_loop(4.0, 0.05, seconds=3.0)(pool, served, chance)
        assert served.outcomes["PoolOverloaded"] > 100
        served.outcomes.clear()
        await asyncio.sleep(0.2)
        await open_loop(0.8, 0.05, seconds=10.0)(pool, served, chance)

    served = played(scene)
    print(dict(served.outcomes))
    assert served.outcomes.keys() == {"in time"}


@pytest.mark.parametrize("callers", [50, 400])
def test_burst_that_can_be_served_is_waited_for(callers: int) -> None:
    """As ``asyncio.gather`` over a list makes one: all come at once, and nobody after them."""

    async def scene(pool: Pool, served: Served, _chance: random.Random) -> None:
        await asyncio.gather(*(call(pool, 0.1, served) for _ in range(callers)))

    assert played(scene).outcomes.total() == callers
    assert played(scene).outcomes.keys() <= {"in time", "too late"}


@pytest.mark.parametrize("held", [0.02, 0.2, 1.0])
def test_crowd_of_constant_size_is_waited_for(held: float) -> None:
    """Keep-alive clients who come back at once: their wait is their number's doing, and no refusal would shorten it."""

    async def scene(pool: Pool, served: Served, chance: random.Random) -> None:
        async def client() -> None:
            for _ in range(20):
                assert await call(pool, held * chance.uniform(0.5, 1.5), served)

        await asyncio.gather(*(client() for _ in range(32)))

    assert played(scene).outcomes.total() == 32 * 20


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clients", [16, 24])
def test_crowd_that_pauses_and_comes_back_is_waited_for(clients: int, seed: int) -> None:
    """As workers do that repeat a transaction after a conflict: their number in the queue goes up and down."""

    async def scene(pool: Pool, served: Served, chance: random.Random) -> None:
        async def client() -> None:
            for _ in range(60):
                assert await call(pool, 0.1 * chance.uniform(0.2, 1.8), served)
                await asyncio.sleep(chance.choice((0.0, 0.6)) * chance.random())

        await asyncio.gather(*(client() for _ in range(clients)))

    assert played(scene, seed, pool_size=5).outcomes.total() == clients * 60


def test_slow_work_of_a_few_is_waited_for() -> None:
    """Three connections for twelve reports of half a second, which come one after the other."""

    async def scene(pool: Pool, served: Served, chance: random.Random) -> None:
        async def report(number: int) -> None:
            await asyncio.sleep(number * 0.05)
            assert await call(pool, 0.5, served)

        await asyncio.gather(*(report(number) for number in range(12)))

    assert played(scene, pool_size=3).outcomes.total() == 12


async def connected(pool: Pool) -> Any:
    """By whoever has no connection yet: in a task of its own."""
    return await greenlet_spawn(pool.connect)


async def queue_of_four(pool: Pool, served: Served) -> tuple[list[Any], list[asyncio.Task[bool]]]:
    held = [await asyncio.create_task(connected(pool)) for _ in range(10 - pool.stats().in_use)]
    waiting = [asyncio.create_task(call(pool, 0.0, served)) for _ in range(4)]
    while pool.stats().waiting < 4:  # noqa: ASYNC110  # time costs nothing here
        await asyncio.sleep(0)
    return held, waiting


async def released(held: list[Any], waiting: list[asyncio.Task[bool]]) -> None:
    for fairy in held:
        fairy.close()
    await asyncio.wait(waiting)


def test_a_unit_that_has_had_a_connection_is_not_refused_its_next() -> None:
    """It has released it, or reads statement by statement: to refuse it would be to throw its work away."""

    async def scene(pool: Pool, served: Served, _chance: random.Random) -> None:
        paying.set(Account("GET /report"))
        fairy = await connected(pool)
        await asyncio.sleep(0.01)
        fairy.close()
        queue = await queue_of_four(pool, served)
        again = asyncio.create_task(connected(pool))
        while pool.stats().waiting < 5:  # noqa: ASYNC110  # likewise
            await asyncio.sleep(0)
        with pytest.raises(PoolOverloaded):  # who has done nothing yet
            pool.refuse_early()
        await released(*queue)
        (await again).close()

    assert played(scene, max_waiting=4).outcomes == {"in time": 4}


def test_whose_task_holds_a_connection_is_not_refused_another() -> None:
    async def scene(pool: Pool, served: Served, _chance: random.Random) -> None:
        mine: list[Any] = []

        async def unit() -> None:
            mine.append(await connected(pool))
            queue = await queue_of_four(pool, served)
            asyncio.get_running_loop().call_later(0.01, queue[0].pop().close)
            mine.append(await connected(pool))
            await released(*queue)

        await asyncio.create_task(unit())
        for fairy in mine:
            fairy.close()

    assert played(scene, max_waiting=4).outcomes == {"in time": 4}


def test_who_has_begun_is_served_in_his_turn_also_while_others_are_refused_as_too_late() -> None:
    """Whoever comes first in a queue that is late is refused; the one who has done half of his work is not."""
    ledger = Ledger[list[str]](pool_size=1, max_overflow=0, clock=lambda: 10.0, admission=EverybodyIsLate())
    slot = ledger.take(None, new=lambda: ["connection"])
    assert slot is not None
    ledger.open_up(new=list)
    newcomer, begun, last = (
        Waiter[list[str]](None, lambda: None, has_begun=each) for each in (False, True, False)
    )
    for waiter in newcomer, begun, last:
        ledger.enqueue(waiter)
    ledger.give_back(slot, usable=True)
    assert newcomer.refusal is not None
    assert (begun.slot, begun.refusal) == (slot, None)
    assert not last.is_over


class EverybodyIsLate(Everybody):
    """Whoever is first is too late, while there is somebody behind him."""

    def is_too_late(self, *, waited: float, waiting: int, out: int, now: float) -> bool:
        return waiting > 1


def test_who_would_be_one_more_than_max_waiting_is_refused_at_once() -> None:
    async def scene(pool: Pool, served: Served, _chance: random.Random) -> None:
        held: list[Any] = [await greenlet_spawn(pool.connect) for _ in range(10)]
        waiting = [asyncio.create_task(call(pool, 0.0, served)) for _ in range(4)]
        while pool.stats().waiting < 4:  # noqa: ASYNC110  # time costs nothing here
            await asyncio.sleep(0)
        with pytest.raises(PoolOverloaded) as refused:
            await asyncio.create_task(connected(pool))
        assert str(refused.value).startswith(
            "refused, for others wait already (in_use 10 of 10, waiting 4, the first for 0.00 s): max_waiting is 4"
        )
        with pytest.raises(PoolOverloaded):
            pool.refuse_early()
        for fairy in held:
            fairy.close()
        await asyncio.wait(waiting)
        pool.refuse_early()

    assert played(scene, max_waiting=4).outcomes == {"in time": 4}


def test_who_waited_on_another_loop_is_no_reason_to_refuse() -> None:
    """As where a test client left a request behind: its loop is closed, and its place in the queue with it."""
    pools: list[Pool] = []

    async def leave_somebody(pool: Pool, _served: Served, _chance: random.Random) -> None:
        pools.append(pool)
        fairy: Any = await greenlet_spawn(pool.connect)
        pool._ledger.enqueue(Waiter(None, wake=lambda: None))
        with pytest.raises(PoolOverloaded):
            pool.refuse_early()
        fairy.detach()

    async def ask_anew(_pool: Pool, _served: Served, _chance: random.Random) -> None:
        pools[0].refuse_early()
        fairy: Any = await greenlet_spawn(pools[0].connect)
        fairy.close()

    played(leave_somebody, pool_size=1, max_waiting=1)
    played(ask_anew)
    assert (pools[0].stats().in_use, pools[0].stats().waiting) == (0, 0)
