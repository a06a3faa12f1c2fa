"""Law 1 under SIGKILL: what was acknowledged is stored, although the server dies again and again in mid-sentence."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from stanch.embedded import EmbeddedError, EmbeddedPostgres
from tests.faults.served import serving
from tests.faults.subject import Subject, prepare
from tests.support.judge import OTHERS, FreshDatabase, assert_nothing_left, until

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from tests.faults.served import Served
    from tests.faults.subject import Wiring
    from tests.faults.wire import Reply

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

CLIENTS = 16
POSTMASTER_EVERY = 4
"""Of so many kills one takes the whole server, the others one backend; PostgreSQL then ends all the rest itself."""

BREATH = 0.05
"""Seconds a client waits after an error, so that it does not spin while the server recovers."""

LINGER = 20
"""Seconds that a statement and a COMMIT last which are to be under way when the server is killed."""

LINGERING = (
    f"SELECT FROM {OTHERS} AND state = 'active' AND wait_event = 'PgSleep' GROUP BY () HAVING count(*) = 2"
)

UNKNOWN = b"commit-outcome-unknown"
SETTINGS = {"pool_size": CLIENTS + 2, "max_overflow": 0, "pool_pre_ping": True}


@pytest.fixture(scope="module")
def mortal() -> Iterator[EmbeddedPostgres]:
    """A server that is there to be killed.

    SIGKILL takes processes, not the operating system's memory: what was written is there also without fsync, and
    recovery, which has to sync everything, takes a tenth of the time.
    """
    with EmbeddedPostgres(durable=True, settings={"fsync": "off"}) as server:
        yield server


@pytest.fixture(scope="module")
def durable() -> Iterator[EmbeddedPostgres]:
    """As `mortal`, with fsync: nothing is spared in the run that counts."""
    with EmbeddedPostgres(durable=True) as server:
        yield server


@contextlib.asynccontextmanager
async def _database_on(server: EmbeddedPostgres) -> AsyncGenerator[FreshDatabase]:
    database = await FreshDatabase.create(server)
    await prepare(database)
    try:
        yield database
    finally:
        if not server.is_running:
            server.start()
        server.wait_until_ready()
        await database.drop()


@dataclass
class Load:
    """Writers that never stop, whoever kills them, and what they were told of each of their keys."""

    served: Served
    acknowledged: list[str] = field(default_factory=list[str])
    unknown: list[str] = field(default_factory=list[str])
    refused: list[str] = field(default_factory=list[str])
    statuses: Counter[int] = field(default_factory=Counter[int])
    _stopped: bool = False

    async def run(self) -> None:
        await asyncio.gather(*(self._client(name) for name in range(CLIENTS)))

    def stop(self) -> None:
        self._stopped = True

    async def _client(self, name: int) -> None:
        number = 0
        async with self.served.wire() as wire:
            while not self._stopped:
                number += 1
                key = f"{name}-{number}"
                if not self._told(key, await wire.request("POST", f"/entries/{key}")):
                    await asyncio.sleep(BREATH)

    async def linger(self, key: str, path: str) -> bool:
        """One write more that takes its time; whether it was acknowledged."""
        return self._told(key, await self.served.request("POST", path))

    def _told(self, key: str, reply: Reply) -> bool:
        """Note what the writer of *key* was told; whether it was acknowledged."""
        self.statuses[reply.status] += 1
        if reply.is_success:
            self.acknowledged.append(key)
        elif reply.status == 0 or UNKNOWN in reply.body:
            self.unknown.append(key)
        else:
            self.refused.append(key)
        return reply.is_success


@contextlib.asynccontextmanager
async def _amid_two_writers(load: Load, judged: FreshDatabase, number: int) -> AsyncGenerator[None]:
    """In the block one statement and one COMMIT are under way on the server, which is to be killed in it.

    All the others are nearly always between two statements, and a pool that asks its connections before it lends them
    shows a dead one to nobody: three kills could pass unnoticed.
    """
    statement, commit = f"statement-{number}", f"commit-{number}"
    async with asyncio.TaskGroup() as group:
        in_statement = group.create_task(load.linger(statement, f"/naps/{LINGER}/{statement}"))
        group.create_task(load.linger(commit, f"/slow/{commit}/{LINGER}"))
        await until(judged, LINGERING, timeout=LINGER / 2)
        yield
    assert not in_statement.result(), "the kill was not noticed: the run is void"


async def _kill(server: EmbeddedPostgres, whole: bool, chance: random.Random) -> None:
    if whole:
        await asyncio.to_thread(server.crash)
        await asyncio.to_thread(server.start)
        return
    while True:
        victims = await asyncio.to_thread(server.backend_pids)
        try:
            server.kill_backend(chance.choice(victims))
        except (IndexError, EmbeddedError):  # nobody is connected yet, or the victim has just ended by itself
            await asyncio.sleep(BREATH)
        else:
            # The postmaster ends all the others once it has noticed; until then it takes connections as before.
            while {*victims} & {*await asyncio.to_thread(server.backend_pids)}:  # noqa: ASYNC110  # of another process
                await asyncio.sleep(BREATH)
            await asyncio.to_thread(server.wait_until_ready)
            return


async def _kill_under(
    load: Load, doomed: FreshDatabase, chance: random.Random, *, kills: int, writes: int, seconds: float
) -> int:
    """Kill *kills* times, evenly over *writes* acknowledged writes; how often it was done."""
    done = 0
    running = asyncio.create_task(load.run())
    try:
        async with asyncio.timeout(seconds):
            while len(load.acknowledged) < writes or done < kills:
                if done < kills and len(load.acknowledged) >= writes * (done + 0.5) / kills:
                    async with _amid_two_writers(load, doomed, done):
                        await asyncio.sleep(
                            chance.uniform(0, 0.05)
                        )  # anywhere in somebody else's transaction
                        await _kill(doomed.server, done % POSTMASTER_EVERY == 0, chance)
                    done += 1
                else:
                    await asyncio.sleep(BREATH)
    finally:
        load.stop()
        await running
    return done


async def _run(
    wiring: Wiring,
    driver: str,
    server: EmbeddedPostgres,
    chance: random.Random,
    folder: Path,
    *,
    kills: int,
    writes: int,
    seconds: float,
) -> list[str]:
    """The keys that were acknowledged and are missing."""
    began = time.monotonic()
    async with _database_on(server) as doomed:
        subject = Subject(url=doomed.url(driver), wiring=wiring, settings=dict(SETTINGS))
        async with serving(subject, folder) as served:
            load = Load(served)
            done = await _kill_under(load, doomed, chance, kills=kills, writes=writes, seconds=seconds)
            await assert_nothing_left(doomed)
            if wiring == "stanch":
                stats = await served.stats()
                assert (stats["in_use"], stats["waiting"]) == (0, 0)
                assert served.complaints == []
        stored = {row["key"] for row in await doomed.fetch("SELECT key FROM entries")}
    missing = [key for key in load.acknowledged if key not in stored]
    denied = [key for key in load.refused if key in stored]
    print(
        f"{wiring} on {driver}: {done} kills, {len(load.acknowledged)} acknowledged, {len(missing)} missing;"
        f" {len(load.unknown)} unknown, of which {sum(key in stored for key in load.unknown)} stored;"
        f" {len(load.refused)} refused, of which {len(denied)} stored;"
        f" {dict(load.statuses)}; {time.monotonic() - began:.0f} s"
    )
    assert done >= kills
    assert len(load.acknowledged) >= writes
    if wiring == "stanch":
        assert len(load.refused) + len(load.unknown) >= 2 * kills, "a COMMIT that was killed was acknowledged"
        assert denied == [], "stored, although the reply said that it was not"
    return missing


async def test_no_acknowledged_write_is_lost_when_the_server_is_killed(
    driver: str, mortal: EmbeddedPostgres, chance: random.Random, tmp_path: Path
) -> None:
    assert await _run("stanch", driver, mortal, chance, tmp_path, kills=3, writes=750, seconds=100) == []


@pytest.mark.long
@pytest.mark.timeout(1300)
async def test_no_acknowledged_write_of_twenty_thousand_is_lost_in_twenty_kills(
    driver: str, durable: EmbeddedPostgres, chance: random.Random, tmp_path: Path
) -> None:
    """Both drivers, so twice ten kills and ten thousand writes, and a few more."""
    assert await _run("stanch", driver, durable, chance, tmp_path, kills=12, writes=10_500, seconds=600) == []


async def test_the_commit_after_yield_dependency_loses_acknowledged_writes(
    mortal: EmbeddedPostgres, chance: random.Random, tmp_path: Path
) -> None:
    """The runs above have teeth: the reply leaves before COMMIT, and some never commit."""
    missing = await _run(
        "commit after yield", "asyncpg", mortal, chance, tmp_path, kills=2, writes=200, seconds=100
    )
    assert missing != []
