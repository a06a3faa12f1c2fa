"""Under SERIALIZABLE, PostgreSQL may refuse a transaction as late as its COMMIT; that refusal is the reply."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.faults.served import serving
from tests.faults.subject import Subject
from tests.support.judge import assert_nothing_left

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.faults.subject import Wiring
    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

TEAMS = 60
"""Two doctors each; both ask to go off call at the same moment, and each sees the other one on call."""

TRANSFERS = 200
ACCOUNTS = 5
CLIENTS = 8
OPENING_BALANCE = 100


async def _run(
    wiring: Wiring, driver: str, judged: FreshDatabase, chance: random.Random, folder: Path
) -> tuple[Counter[int], list[str]]:
    """The replies by status, and the acknowledged requests of which nothing is stored."""
    await judged.execute(
        f"INSERT INTO shifts SELECT t, d, true FROM generate_series(1, {TEAMS}) t, generate_series(1, 2) d;"
        f"INSERT INTO accounts SELECT id, {OPENING_BALANCE} FROM generate_series(1, {ACCOUNTS}) id"
    )
    requests = [
        *(
            f"/transfers/{source}/{target}/transfer-{number}"
            for number in range(TRANSFERS)
            for source, target in [chance.sample(range(1, ACCOUNTS + 1), 2)]
        ),
    ]
    replies: Counter[int] = Counter()
    acknowledged: list[str] = []
    settings = {} if wiring == "stanch" else {"isolation_level": "SERIALIZABLE"}

    async with serving(Subject(url=judged.url(driver), wiring=wiring, settings=settings), folder) as served:

        async def post(path: str, key: str) -> None:
            reply = await served.request("POST", path)
            replies[reply.status] += 1
            if reply.is_success:
                acknowledged.append(key)

        async def one_by_one(queue: list[tuple[str, ...]]) -> None:
            while queue:
                await asyncio.gather(
                    *(post(path, path.partition("?")[0].rpartition("/")[2]) for path in queue.pop())
                )

        skews = [
            tuple(f"/off-call/{team}/{doctor}/off-{team}-{doctor}?meet=2" for doctor in (1, 2))
            for team in range(1, TEAMS + 1)
        ]
        queue = [*((path,) for path in requests), *skews]
        chance.shuffle(queue)
        await asyncio.gather(*(one_by_one(queue) for _ in range(CLIENTS // 2)))
        await assert_nothing_left(judged)
    stored = {row["key"] for row in await judged.fetch("SELECT key FROM entries")} - {"taken"}
    missing = sorted(set(acknowledged) - stored)
    print(
        f"{wiring} on {driver}: {dict(replies)}, {len(missing)} of {len(acknowledged)} acknowledged are missing"
    )
    assert replies.total() == 2 * TEAMS + TRANSFERS
    abandoned = await judged.fetch("SELECT team FROM shifts GROUP BY team HAVING NOT bool_or(on_call)")
    assert abandoned == [], "PostgreSQL itself let a team go off call"
    assert await judged.fetchval("SELECT sum(balance) FROM accounts") == ACCOUNTS * OPENING_BALANCE
    if wiring == "stanch":
        assert stored <= set(acknowledged), "stored, although the reply said it was not"
    return replies, missing


async def test_no_serialization_failure_is_answered_with_success(
    driver: str, judged: FreshDatabase, chance: random.Random, tmp_path: Path
) -> None:
    replies, missing = await _run("stanch", driver, judged, chance, tmp_path)
    assert missing == []
    assert replies[503] > TEAMS // 2, "there was no contention"
    assert set(replies) == {200, 503}


async def test_the_commit_after_yield_dependency_answers_serialization_failures_with_success(
    judged: FreshDatabase, chance: random.Random, tmp_path: Path
) -> None:
    """The run above has teeth: here the refusal comes after the reply."""
    _, missing = await _run("commit after yield", "asyncpg", judged, chance, tmp_path)
    assert missing != []
