"""Law 1: a commit that fails is never answered with success, however it fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.faults.served import serving
from tests.faults.subject import Subject
from tests.support.judge import POLL_INTERVAL, assert_nothing_left, until
from tests.support.proxy import FaultProxy, Verdict, at_commit

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.served import Served
    from tests.faults.subject import Wiring
    from tests.faults.wire import Reply
    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

OF_EACH = 20
DURING_COMMIT = 8
CUT_BEFORE = 6
CUT_AFTER = 6
SWALLOWS = [
    f"{how}{before}"
    for how in ("orm", "orm-query", "core", "connection", "inside-savepoint")
    for before in ("", "+savepoint")
]
SWALLOWS_OF_EACH = 3
HELD = "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND state = 'idle in transaction'"
IN_COMMIT = (
    "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND wait_event = 'PgSleep' AND query ILIKE 'commit%'"
)
GONE = "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)"


class Tally:
    """Replies to commits that failed, by what failed them; what was answered with success is false."""

    def __init__(self) -> None:
        self.replies: Counter[tuple[str, int]] = Counter()
        self.acknowledged: list[str] = []

    def note(self, kind: str, key: str, reply: Reply) -> None:
        self.replies[kind, reply.status] += 1
        if reply.is_success:
            self.acknowledged.append(key)

    @property
    def total(self) -> int:
        return self.replies.total()


async def _fail_sixty_commits(served: Served, proxy: FaultProxy, judged: FreshDatabase) -> Tally:
    tally = Tally()

    for number in range(OF_EACH):
        key = f"orphan-{number}"
        tally.note("deferred constraint", key, await served.request("POST", f"/orphans/{key}"))
    for number in range(OF_EACH):
        key = f"held-{number}"
        reply = asyncio.create_task(served.request("POST", f"/held/{key}"))
        await _terminate(judged, HELD, key)
        await served.ask("POST", f"/_/open/{key}")
        tally.note("backend terminated before COMMIT", key, await reply)
    for number in range(DURING_COMMIT):
        key = f"committing-{number}"
        reply = asyncio.create_task(served.request("POST", f"/slow/{key}/20"))
        await _terminate(judged, IN_COMMIT, judged.name)
        tally.note("backend killed at COMMIT", key, await reply)
    for verdict, count in ((Verdict.CUT, CUT_BEFORE), (Verdict.CUT_ANSWER, CUT_AFTER)):
        for number in range(count):
            key = f"{verdict.value}-{number}".replace(" ", "-")
            proxy.on_client_message = at_commit(verdict)
            tally.note(f"{verdict.value} at COMMIT", key, await served.request("POST", f"/entries/{key}"))
            await _happened(proxy, verdict, number + 1)
    return tally


async def _happened(proxy: FaultProxy, verdict: Verdict, times: int) -> None:
    """Where the reply does not wait for COMMIT, neither must the count of what was done to it."""
    async with asyncio.timeout(5):
        while proxy.verdicts[verdict] < times:  # noqa: ASYNC110  # the proxy counts, it tells nobody
            await asyncio.sleep(POLL_INTERVAL)


async def _terminate(judged: FreshDatabase, found_by: str, of: str) -> None:
    pid = (await until(judged, found_by, of))[0]["pid"]
    assert await judged.fetchval("SELECT pg_terminate_backend($1)", pid)
    await until(judged, GONE, pid)


async def _missing(judged: FreshDatabase, keys: list[str]) -> list[str]:
    stored = {row["key"] for row in await judged.fetch("SELECT key FROM entries")}
    return [key for key in keys if key not in stored]


async def _swallow(served: Served, ways: list[str]) -> Tally:
    tally = Tally()
    for way in ways:
        for number in range(SWALLOWS_OF_EACH):
            key = f"{way.replace('+', '-')}-{number}"
            tally.note(way, key, await served.request("POST", f"/swallow/{way}/{key}"))
    return tally


async def _run(wiring: Wiring, driver: str, judged: FreshDatabase, folder: Path) -> tuple[Tally, Tally]:
    """Sixty commits that fail, then the swallowed errors; also proves that nothing is left behind."""
    async with FaultProxy(judged.server.port) as proxy:
        subject = Subject(
            url=proxy.through(judged.url(driver)), wiring=wiring, settings={"pool_pre_ping": True}
        )
        async with serving(subject, folder) as served:
            assert (await served.request("POST", "/entries/control")).status == 201
            failed = await _fail_sixty_commits(served, proxy, judged)
            swallowed = await _swallow(served, SWALLOWS)
            contained = await _swallow(served, ["contained"])
            await assert_nothing_left(judged)
    assert failed.total == 3 * OF_EACH
    assert swallowed.total == len(SWALLOWS) * SWALLOWS_OF_EACH
    assert len(contained.acknowledged) == SWALLOWS_OF_EACH
    for name, tally in (("failing commits", failed), ("swallowed errors", swallowed)):
        print(
            f"{wiring} on {driver}: {name}: {len(tally.acknowledged)} of {tally.total} answered with success"
        )
        print(f"    {dict(tally.replies)}")
    if wiring == "stanch":
        assert served.complaints == []
    return failed, swallowed


async def test_no_failed_commit_and_no_swallowed_error_is_answered_with_success(
    driver: str, judged: FreshDatabase, tmp_path: Path
) -> None:
    """Sixty commits fail: a deferred constraint, a backend gone before COMMIT, a backend or a wire gone at COMMIT.

    Then a handler swallows a database error: ORM and Core, on the session and on its connection, with and without
    a savepoint before.
    """
    failed, swallowed = await _run("stanch", driver, judged, tmp_path)
    assert failed.acknowledged == []
    assert swallowed.acknowledged == []
    stored = {row["key"] for row in await judged.fetch("SELECT key FROM entries")}
    # What was cut off after COMMIT is stored: there the reply says "unknown", which is true.
    known = {"taken", "control", *(f"contained-{number}" for number in range(SWALLOWS_OF_EACH))}
    assert stored == known | {f"cut-answer-{number}" for number in range(CUT_AFTER)}
    assert {status for (kind, status) in failed.replies if kind != "deferred constraint"} == {503}


async def test_the_commit_after_yield_dependency_answers_them_with_success(
    judged: FreshDatabase, tmp_path: Path
) -> None:
    """The run above has teeth: the dependency that people write by hand fails it."""
    failed, swallowed = await _run("commit after yield", "asyncpg", judged, tmp_path)
    for tally in (failed, swallowed):
        missing = await _missing(judged, tally.acknowledged)
        print(f"acknowledged and missing: {len(missing)} of {tally.total}")
        assert len(missing) >= tally.total // 2
