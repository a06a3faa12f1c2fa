"""PgBouncer 1.18 in transaction mode, with fewer server connections than the app has requests under way."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.faults.bouncer import pgbouncer
from tests.faults.served import serving
from tests.faults.subject import Subject
from tests.support.judge import assert_nothing_left
from tests.support.optional import needs

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), needs("pgbouncer")]

REQUESTS = 300
CLIENTS = 20
SERVER_CONNECTIONS = 4
POOL_SIZE = 10
EXPECTED: Final = {"write": 200, "savepoint": 200, "read": 200, "conflict": 409, "raise": 418}
WRITTEN: Final = {"write": ("",), "savepoint": ("", "-inner")}


async def _mixed_requests(
    driver: str, settings: dict[str, Any], judged: FreshDatabase, chance: random.Random, folder: Path
) -> list[str]:
    """Three hundred requests at once through PgBouncer; those that did not end as they must, in words."""
    plan = [(number, chance.choice(list(EXPECTED))) for number in range(REQUESTS)]
    failures: list[str] = []
    replies: Counter[tuple[str, int]] = Counter()
    async with pgbouncer(judged, pool_size=SERVER_CONNECTIONS) as port:
        url = judged.url(driver).replace(f":{judged.server.port}/", f":{port}/")
        subject = Subject(url=url, settings={"pool_size": POOL_SIZE, "max_overflow": 0, **settings})
        async with serving(subject, folder) as served:
            queue = iter(plan)

            async def client() -> None:
                for number, way in queue:
                    reply = await served.request("POST", f"/mixed/{way}/key-{number}")
                    replies[way, reply.status] += 1
                    if reply.status != EXPECTED[way]:
                        failures.append(f"{way} gave {reply.status}: {reply.body[:200]!r}")

            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            await assert_nothing_left(judged)
    assert replies.total() == REQUESTS
    assert {way for way, _ in replies} == set(EXPECTED)
    print(f"{driver} {settings}: {len(failures)} of {REQUESTS} failed: {dict(replies)}")
    if not failures:
        stored = {row["key"] for row in await judged.fetch("SELECT key FROM entries")} - {"taken"}
        assert stored == {f"key-{number}{end}" for number, way in plan for end in WRITTEN.get(way, ())}
        assert served.complaints == []
    return failures


async def test_no_request_fails_behind_pgbouncer(
    driver: str, judged: FreshDatabase, chance: random.Random, tmp_path: Path
) -> None:
    assert await _mixed_requests(driver, {"pooler": "pgbouncer"}, judged, chance, tmp_path) == []


async def test_requests_fail_behind_pgbouncer_when_nobody_says_it_is_there(
    judged: FreshDatabase, chance: random.Random, tmp_path: Path
) -> None:
    """The run above has teeth: prepared statements outlive the transaction they were prepared in."""
    no_server_settings = {
        "statement_timeout": None,
        "lock_timeout": None,
        "idle_in_transaction_session_timeout": None,
    }
    failures = await _mixed_requests("asyncpg", no_server_settings, judged, chance, tmp_path)
    assert failures != []
