"""Law 7: a lost COMMIT is unknown, or with ``verify_commits`` the truth; never a guess."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from stanch import CommitLost, CommitRefused, CommitUnknown, Database, Kind, classify
from stanch.embedded import EmbeddedPostgres
from stanch.embedded.loopback import free_port
from stanch.events import CommitSettled, CommitsUnverified
from stanch.unverified import CLEAN_KEY
from stanch.verdict import WITNESS_KEY
from tests.faults.served import serving
from tests.faults.subject import Subject, prepare
from tests.support import cleaned
from tests.support.judge import ACTIVITY, FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy, Mode, Verdict, at_commit, at_statement, statement_of

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncSession

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

WRITE = text("INSERT INTO entries VALUES (:key)")
WRITERS = 8
CARDS = {
    Verdict.CUT: 42, Verdict.CUT_ANSWER: 42, Verdict.LOSE: 8, Verdict.LOSE_ANSWER: 8, Verdict.FORWARD: 20,
}  # fmt: skip
"""What happens to so many COMMITs: a hundred are lost."""
UNKNOWN = b"commit-outcome-unknown"
both = pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
NOBODY_ELSE = """
    SELECT 1 WHERE NOT EXISTS (
        SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend' AND state <> 'idle'
    )
"""


@contextlib.asynccontextmanager
async def proxied(
    judged: FreshDatabase, driver: str, *, credentials: str = "", **settings: Any
) -> AsyncGenerator[tuple[FaultProxy, Database[Any], list[Any]]]:
    """A proxy, a database behind it whose pool is full with one unit, and the events it tells."""
    chosen: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "verify_commits": True, **settings}
    async with FaultProxy(judged.server.port) as proxy:
        events: list[Any] = []
        url = proxy.through(judged.url(driver)) + "?sslmode=disable"
        if credentials:
            scheme, _, rest = url.partition("://")
            url = f"{scheme}://{credentials}@{rest.rpartition('@')[2]}"
        db = Database(url, **chosen)
        db.observe(events.append)
        async with db:
            yield proxy, db, events


async def write(db: Database[Any], key: str) -> None:
    async with db.transaction() as session:
        await session.execute(WRITE, {"key": key})


async def stored(judged: FreshDatabase, key: str) -> bool:
    await until(judged, NOBODY_ELSE)  # what was given up may still be at it
    return bool(await judged.fetchval("SELECT count(*) FROM entries WHERE key = $1", key))


async def happened(condition: Callable[[], bool]) -> None:
    """Wait for what the proxy only counts."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # it tells nobody
            await asyncio.sleep(0.005)


def seen(proxy: FaultProxy) -> list[str]:
    return [*proxy.queries, *proxy.parsed]


# At random --------------------------------------------------------------------------------------------------


class Faults:
    """A hook: every COMMIT draws a card, and five in six are lost; now and then something else is cut."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._deck = [verdict for verdict, count in CARDS.items() for _ in range(count)]
        chance.shuffle(self._deck)
        self.drawn: Counter[Verdict] = Counter()

    @property
    def to_come(self) -> bool:
        return bool(self._deck)

    def __call__(self, kind: str, payload: bytes) -> Verdict:
        if not self._deck:
            return Verdict.FORWARD
        if not is_commit(kind, payload):
            return self._chance.choices([Verdict.FORWARD, Verdict.CUT], weights=[60, 1])[0]
        verdict = self._deck.pop()
        self.drawn[verdict] += 1
        return verdict


def is_commit(kind: str, payload: bytes) -> bool:
    return (statement_of(kind, payload) or "").upper().startswith("COMMIT")


@dataclass
class Told:
    """What was said of each key."""

    acknowledged: list[str] = field(default_factory=list[str])
    unknown: list[str] = field(default_factory=list[str])
    failed: list[str] = field(default_factory=list[str])
    kinds: Counter[str] = field(default_factory=Counter[str])

    async def compare(
        self, judged: FreshDatabase, proxy: FaultProxy, faults: Faults, *, verify: bool
    ) -> None:
        """The table has every acknowledged row and no failed one; the faults happened."""
        await until(judged, NOBODY_ELSE)
        rows = {row["key"] for row in await judged.fetch("SELECT key FROM entries")}
        print(
            f"verify={verify}: {proxy.verdicts}; {dict(self.kinds)};"
            f" {sum(key in rows for key in self.unknown)} of {len(self.unknown)} unknown are stored"
        )
        assert faults.drawn == CARDS
        for verdict in set(CARDS) - {Verdict.FORWARD}:
            assert proxy.verdicts[verdict] >= CARDS[verdict]
        assert [key for key in self.acknowledged if key not in rows] == []
        assert [key for key in self.failed if key in rows] == []
        if verify:
            assert self.unknown == []
        else:
            assert {key in rows for key in self.unknown} == {True, False}, "so unknown is the only true word"


@both
async def test_a_hundred_random_cuts_around_commit_are_told_truly(
    judged: FreshDatabase, driver: str, chance: random.Random, verify: bool
) -> None:
    """Acknowledged is stored, failed is not; and verified, nothing is unknown while the server can be reached."""
    told = Told()
    settings: dict[str, Any] = {"pool_size": WRITERS, "commit_timeout": 0.4, "verify_commits": verify}
    async with proxied(judged, driver, **settings) as (proxy, db, events):
        proxy.on_client_message = faults = Faults(chance)

        async def writer(name: int) -> None:
            number = 0
            while faults.to_come:
                number += 1
                key = f"{name}-{number}"
                try:
                    await write(db, key)
                except CommitUnknown:
                    told.unknown.append(key)
                    told.kinds["CommitUnknown"] += 1
                except Exception as error:
                    told.failed.append(key)
                    told.kinds[type(error).__name__] += 1
                else:
                    told.acknowledged.append(key)
                    told.kinds["acknowledged"] += 1

        async with asyncio.timeout(60):
            await asyncio.gather(*map(writer, range(WRITERS)))
        await told.compare(judged, proxy, faults, verify=verify)
        assert (told.kinds["CommitLost"] > 0) == verify
        await write(db, "afterwards")
        await assert_nothing_left(judged, db)
        stats = db.stats()
        assert (stats.in_use, stats.waiting) == (0, 0)
        assert stats.idle <= WRITERS
    settled = Counter(each.verdict for each in events if isinstance(each, CommitSettled))
    assert (settled["committed"] > 0 and settled["aborted"] > 0) == verify


@pytest.mark.parametrize("verify", [pytest.param(False, marks=pytest.mark.long), True])
async def test_a_hundred_random_cuts_around_commit_are_answered_truly(
    judged: FreshDatabase, driver: str, chance: random.Random, tmp_path: Path, verify: bool
) -> None:
    """The same over HTTP, from another process."""
    told = Told()
    settings = {"pool_size": WRITERS, "commit_timeout": 0.4, "verify_commits": verify}
    async with FaultProxy(judged.server.port) as proxy:
        subject = Subject(url=proxy.through(judged.url(driver)) + "?sslmode=disable", settings=settings)
        async with serving(subject, tmp_path) as served:
            proxy.on_client_message = faults = Faults(chance)

            async def client(name: int) -> None:
                number = 0
                async with served.wire() as wire:
                    while faults.to_come:
                        number += 1
                        key = f"{name}-{number}"
                        reply = await wire.request("POST", f"/entries/{key}")
                        told.kinds[f"{reply.status} {'unknown' if UNKNOWN in reply.body else ''}"] += 1
                        if reply.is_success:
                            told.acknowledged.append(key)
                        elif UNKNOWN in reply.body:
                            assert (reply.status, "retry-after" in reply.headers) == (503, False)
                            told.unknown.append(key)
                        else:
                            assert reply.status in {503, 504}, served.log[-5000:]
                            told.failed.append(key)

            async with asyncio.timeout(60):
                await asyncio.gather(*map(client, range(WRITERS)))
            await told.compare(judged, proxy, faults, verify=verify)
            await assert_nothing_left(judged)
            stats = await served.stats()
            assert (stats["in_use"], stats["waiting"]) == (0, 0)
            assert served.complaints == []


async def test_a_lost_commit_that_is_known_to_be_none_may_be_repeated_by_the_client(
    judged: FreshDatabase, driver: str, tmp_path: Path
) -> None:
    """503 both times; only the reply that is sure that nothing is stored has Retry-After."""
    async with FaultProxy(judged.server.port) as proxy:
        url = proxy.through(judged.url(driver)) + "?sslmode=disable"
        async with serving(Subject(url=url, settings={"verify_commits": True}), tmp_path) as served:
            proxy.on_client_message = at_commit(Verdict.CUT)
            reply = await served.request("POST", "/entries/lost")
            assert (reply.status, reply.headers.get("retry-after")) == (503, "2")
            assert UNKNOWN not in reply.body
            assert not await stored(judged, "lost")
            proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
            assert (await served.request("POST", "/entries/lost")).status == 201
            assert await stored(judged, "lost")
            assert served.complaints == []


# One by one -------------------------------------------------------------------------------------------------


async def test_a_commit_found_stored_is_a_success_like_any_other(
    judged: FreshDatabase, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Listeners hear of it, the pool drops the dead connection in silence, and the session goes on with another."""
    heard: list[str] = []

    def note(_session: object) -> None:
        heard.append("commit")

    async with proxied(judged, driver) as (proxy, db, events):
        async with db.session() as session:
            event.listen(session.sync_session, "after_commit", note)
            proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
            await session.execute(WRITE, {"key": "one"})
            await session.commit()
            assert heard == ["commit"]
            assert db.stats().in_use == 0
            await session.execute(WRITE, {"key": "two"})
            await session.commit()
        async with db.connect() as connection:
            proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
            await connection.execute(WRITE, {"key": "three"})
            await connection.commit()
            with pytest.raises(
                DBAPIError
            ) as caught:  # this one is dead; whoever holds on to it is told, truly
                await connection.execute(WRITE, {"key": "four"})
            assert caught.value.connection_invalidated
            await connection.rollback()
            await connection.execute(WRITE, {"key": "four"})
            await connection.commit()
        assert proxy.verdicts[Verdict.CUT_ANSWER] == 2
        assert [type(each) for each in events] == [CommitSettled, CommitSettled]
        assert [await stored(judged, key) for key in ("one", "two", "three", "four")] == [True] * 4
        await assert_nothing_left(judged, db)
        assert db.stats().idle == 1
        await until(
            judged, f"SELECT 1 FROM ({ACTIVITY}) others HAVING count(*) = 1"
        )  # who was asked is gone, too
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_commit_that_never_arrives_is_lost_for_certain(judged: FreshDatabase, driver: str) -> None:
    """The link stays open and silent until we sever it; what is asked afterwards is certain."""
    async with proxied(judged, driver, commit_timeout=0.3) as (proxy, db, _):
        proxy.on_client_message = at_commit(Verdict.LOSE)
        begun = time.monotonic()
        with pytest.raises(CommitLost) as caught:
            await write(db, "x")
        assert 0.3 <= time.monotonic() - begun < 3
        failure = classify(caught.value)
        assert failure is not None
        assert (failure.kind, failure.retryable, failure.disconnect) == (Kind.UNAVAILABLE, True, True)
        assert not await stored(judged, "x")
        await write(db, "x")
        await assert_nothing_left(judged, db)


async def test_a_commit_that_the_server_is_still_at_is_ended_before_it_is_called_lost(
    judged: FreshDatabase, driver: str
) -> None:
    """A deferred trigger sleeps in COMMIT: left alone it would be stored a moment after we said that it is not."""
    async with proxied(judged, driver, commit_timeout=0.3) as (_, db, _events):
        with pytest.raises(CommitLost):
            async with db.transaction() as session:
                await session.execute(WRITE, {"key": "x"})
                await session.execute(text("INSERT INTO slow VALUES ('x', 1.0)"))
        assert not await stored(judged, "x")


async def test_a_question_that_is_never_answered_ends_before_any_commit(
    judged: FreshDatabase, driver: str
) -> None:
    """COMMIT was not written, so nothing is unknown: an ordinary failure, in bounded time."""
    async with proxied(judged, driver, connect_timeout=0.4) as (proxy, db, events):
        proxy.on_client_message = at_statement("SELECT pg_current_xact_id_if_assigned", Verdict.LOSE)
        with pytest.raises(DBAPIError) as caught:
            await write(db, "x")
        assert not isinstance(caught.value, CommitLost | CommitUnknown)
        assert proxy.verdicts[Verdict.LOSE] == 1
        assert not any(query.upper().startswith("COMMIT") for query in proxy.queries)
        assert events == []
        assert not await stored(judged, "x")
        await write(db, "x")
        await assert_nothing_left(judged, db)


async def test_a_black_hole_that_closes_ends_in_the_truth(
    judged: FreshDatabase, driver: str, chance: random.Random
) -> None:
    """When it closes, the COMMIT that was held back arrives together with our question, or never."""
    told: Counter[str] = Counter()
    async with proxied(judged, driver, commit_timeout=0.15, close_timeout=0.3) as (proxy, db, _):

        def swallow(kind: str, payload: bytes) -> Verdict:
            if is_commit(kind, payload):
                proxy.blackhole()
                asyncio.get_running_loop().call_later(chance.uniform(0.1, 0.3), close)
            return Verdict.FORWARD

        def close() -> None:
            if number % 2:
                proxy.cut()
            proxy.pass_through()

        for number in range(10):
            key = f"hole-{number}"
            proxy.on_client_message = swallow
            try:
                await write(db, key)
            except CommitLost:
                told["lost"] += 1
                assert not await stored(judged, key)
            else:
                told["stored"] += 1
                assert await stored(judged, key)
            await assert_nothing_left(judged, db)
    assert told["lost"] > 0
    assert told["stored"] > 0


async def test_nothing_to_be_reached_is_unknown_in_bounded_time(judged: FreshDatabase, driver: str) -> None:
    settings: dict[str, Any] = {"commit_timeout": 0.2, "connect_timeout": 0.3, "close_timeout": 0.3}
    async with proxied(judged, driver, **settings) as (proxy, db, _):

        def swallow(kind: str, payload: bytes) -> Verdict:
            if is_commit(kind, payload):
                proxy.blackhole()
            return Verdict.FORWARD

        proxy.on_client_message = swallow
        begun = time.monotonic()
        with proxy.blackholed():
            proxy.pass_through()
            with pytest.raises(CommitUnknown, match=r"no primary could be asked within 0\.60 s"):
                await write(db, "x")
            assert time.monotonic() - begun < 2.5


async def test_a_cancelled_waiter_still_hears_the_verdict_in_the_chain(
    judged: FreshDatabase, driver: str
) -> None:
    async with proxied(judged, driver, commit_timeout=0.3) as (proxy, db, events):
        proxy.on_client_message = at_commit(Verdict.LOSE)
        task = asyncio.create_task(write(db, "x"))
        await happened(lambda: proxy.verdicts[Verdict.LOSE] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        chain: list[BaseException] = [caught.value]
        while (link := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(link)
        assert any(isinstance(each, CommitLost) for each in chain), chain
        assert [each.verdict for each in events if isinstance(each, CommitSettled)] == ["aborted"]
        assert not await stored(judged, "x")
        await assert_nothing_left(judged, db)


async def test_an_aborted_transaction_is_refused_as_ever(judged: FreshDatabase, driver: str) -> None:
    async with proxied(judged, driver) as (_, db, _events):
        with pytest.raises(CommitRefused):
            async with db.session() as session:
                await session.execute(WRITE, {"key": "x"})
                with contextlib.suppress(Exception):
                    await (await session.connection()).execute(text("SELECT 1 / 0"))
                await session.commit()
        await assert_nothing_left(judged, db)


async def test_a_commit_that_fails_by_itself_is_not_asked_about(judged: FreshDatabase, driver: str) -> None:
    """The connection lives, and the server has said what was wrong: a deferred constraint."""
    async with proxied(judged, driver) as (_, db, events):
        with pytest.raises(IntegrityError):
            async with db.transaction() as session:
                await session.execute(text("INSERT INTO children VALUES ('orphan', 1)"))
        assert events == []


async def test_a_lost_commit_of_nothing_written_is_a_success(judged: FreshDatabase, driver: str) -> None:
    async with proxied(judged, driver) as (proxy, db, events):
        proxy.on_client_message = at_commit(Verdict.CUT)
        async with db.transaction() as session:
            assert await session.scalar(text("SELECT count(*) FROM entries")) == 1
        assert proxy.verdicts[Verdict.CUT] == 1
        assert [each.verdict for each in events] == ["committed"]


async def test_a_lost_commit_of_serializable_reads_is_lost(judged: FreshDatabase, driver: str) -> None:
    """What a serializable transaction read may be relied on only once it has committed (PostgreSQL manual)."""
    async with proxied(judged, driver) as (proxy, db, _):
        proxy.on_client_message = at_commit(Verdict.CUT)
        with pytest.raises(CommitLost, match="serializable"):
            async with db.transaction(isolation_level="SERIALIZABLE") as session:
                await session.scalar(text("SELECT count(*) FROM entries"))


async def test_an_engine_that_was_taken_over_is_verified_as_well(judged: FreshDatabase, driver: str) -> None:
    async with FaultProxy(judged.server.port) as proxy:
        tls: dict[str, Any] = {"ssl": False} if driver == "asyncpg" else {"sslmode": "disable"}
        engine = create_async_engine(proxy.through(judged.url(driver)), connect_args=tls)
        async with Database(engine, verify_commits=True) as db:
            proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
            await write(db, "x")
            assert proxy.verdicts[Verdict.CUT_ANSWER] == 1
            assert await stored(judged, "x")


async def test_the_mark_of_a_clean_transaction_holds_for_that_one_alone(
    judged: FreshDatabase, driver: str
) -> None:
    """On the same connection, a lost COMMIT of the next transaction is not taken for one of nothing written."""
    async with proxied(judged, driver) as (proxy, db, _):
        for ending in ("commit", "rollback"):
            async with db.session() as session:
                await clean(session)
                await getattr(session, ending)()
            proxy.on_client_message = at_commit(Verdict.CUT)
            with pytest.raises(CommitLost):
                await write(db, "x")
        assert proxy.verdicts[Verdict.CUT] == 2


# Where it cannot be known -----------------------------------------------------------------------------------


async def test_a_server_that_does_not_let_us_see_is_told_once_and_never_an_error(
    judged: FreshDatabase, driver: str
) -> None:
    """A plain role may read everything needed; here it was forbidden."""
    await judged.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    await judged.execute("GRANT ALL ON entries TO PUBLIC")
    async with (
        role(judged) as plain,
        proxied(judged, driver, credentials=plain, pool_size=2) as (proxy, db, events),
    ):
        async with db.connect() as one, db.connect() as other:
            await one.execute(text("SELECT 1"))
            await other.execute(text("SELECT 1"))
        assert [type(each) for each in events] == [CommitsUnverified]
        assert "SQLSTATE 42501" in str(events[0])
        proxy.on_client_message = at_commit(Verdict.CUT)
        with pytest.raises(CommitUnknown, match="does not let us see"):
            await write(db, "x")
    await judged.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")


async def test_a_plain_role_learns_the_truth(judged: FreshDatabase, driver: str) -> None:
    """Also where its own backend has to be ended."""
    await judged.execute("GRANT ALL ON entries TO PUBLIC")
    async with (
        role(judged) as plain,
        proxied(judged, driver, credentials=plain, commit_timeout=0.3) as (proxy, db, _),
    ):
        proxy.on_client_message = at_commit(Verdict.LOSE)
        with pytest.raises(CommitLost):
            await write(db, "lost")
        proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
        await write(db, "kept")
        assert [await stored(judged, key) for key in ("lost", "kept")] == [False, True]


@contextlib.asynccontextmanager
async def role(judged: FreshDatabase) -> AsyncGenerator[str]:
    """The credentials of a role without any rights of its own."""
    name = f"plain_{judged.name}"
    await judged.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'plain'")
    await judged.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
    try:
        yield f"{name}:plain"
    finally:
        await judged.fetch(cleaned.SEND_AWAY)
        await judged.execute(f"DROP ROLE {name}")


async def test_a_pooler_in_between_is_noticed(judged: FreshDatabase, driver: str) -> None:
    """A server process that is not the one of the connect: here the witness is exchanged."""
    async with proxied(judged, driver) as (proxy, db, events):
        async with db.connect() as connection:
            info = (await connection.get_raw_connection()).info
            other = info[WITNESS_KEY]
            info[WITNESS_KEY] = type(other)(other.incarnation, other.pid + 1, other.started, False)
        proxy.on_client_message = at_commit(Verdict.CUT)
        with pytest.raises(CommitUnknown, match="pooler between"):
            await write(db, "x")
        assert [type(each) for each in events] == [CommitsUnverified, CommitSettled]


async def test_a_backend_that_began_at_another_time_is_not_ended(judged: FreshDatabase, driver: str) -> None:
    """The pid may be somebody else's by now; here the time is wrong, and the backend the right one."""
    settings: dict[str, Any] = {"commit_timeout": 0.2, "connect_timeout": 1.0}
    async with proxied(judged, driver, **settings) as (_, db, _events):
        async with db.connect() as connection:
            info = (await connection.get_raw_connection()).info
            other = info[WITNESS_KEY]
            assert other.started is not None
            info[WITNESS_KEY] = type(other)(other.incarnation, other.pid, other.started + 1, False)
        try:
            with pytest.raises(CommitUnknown, match=r"still at it|could be asked"):
                async with db.transaction() as session:
                    await session.execute(text("INSERT INTO slow VALUES ('x', 20)"))
            assert await judged.fetch("SELECT FROM pg_stat_activity WHERE pid = $1", other.pid)
        finally:
            await judged.fetch(f"SELECT pg_terminate_backend({other.pid}, 5000)")


# What it costs ----------------------------------------------------------------------------------------------


async def clean(session: AsyncSession) -> None:
    raw = await (await session.connection()).get_raw_connection()
    raw.info[CLEAN_KEY] = True


@pytest.mark.parametrize("kind", ["write", "read", "read, marked clean", "nothing"])
async def test_verifying_costs_one_round_trip_where_something_may_have_been_written(
    judged: FreshDatabase, driver: str, kind: str
) -> None:
    counted: dict[bool, float] = {}
    for verify in (False, True):
        async with proxied(judged, driver, verify_commits=verify) as (proxy, db, _):
            for number in range(12):
                if number == 7:  # psycopg prepares a statement at the sixth time
                    proxy.forget()
                async with db.transaction() as session:
                    if kind == "write":
                        await session.execute(WRITE, {"key": f"{verify} {number}"})
                    elif kind != "nothing":
                        await session.scalar(text("SELECT count(*) FROM entries"))
                    if kind == "read, marked clean":
                        await clean(session)
            counted[verify] = proxy.round_trips / 5
            assert proxy.connections == 0
    extra = 1 if kind in {"write", "read"} else 0
    assert counted == {False: 0 if kind == "nothing" else 3, True: (0 if kind == "nothing" else 3) + extra}


async def test_where_no_transaction_is_open_nothing_is_asked(judged: FreshDatabase, driver: str) -> None:
    """In autocommit mode SQLAlchemy commits all the same, in Python."""
    async with proxied(judged, driver) as (proxy, db, _):
        for number in range(12):
            if number == 7:
                proxy.forget()
            async with db.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(WRITE, {"key": f"{number}"})
                await connection.commit()
        assert proxy.round_trips == 5, "the statement itself, and nothing else"


# Crashes and standbys ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal() -> Iterator[EmbeddedPostgres]:
    """A server that is there to be killed; it writes its log to disk only when it has to, as a busy one does not."""
    settings: dict[str, str | int] = {"fsync": "off", "wal_writer_delay": "10s"}
    with EmbeddedPostgres(durable=True, settings=settings) as server:
        yield server


@contextlib.asynccontextmanager
async def database_on(server: EmbeddedPostgres) -> AsyncGenerator[FreshDatabase]:
    database = await FreshDatabase.create(server)
    await prepare(database)
    try:
        yield database
    finally:
        await database.drop()


@dataclass
class Crashes:
    """What was said after each crash, by us and by whoever believes ``pg_xact_status`` alone."""

    naive_lies: int = 0
    wrong: list[str] = field(default_factory=list[str])
    verdicts: Counter[str] = field(default_factory=Counter[str])


async def crash_at_commit(
    server: EmbeddedPostgres, driver: str, crashes: int, *, answered: bool = False
) -> Crashes:
    """SIGKILL of the committing backend; others then take the numbers after the crash, before we ask."""
    found = Crashes()
    settings: dict[str, Any] = {"connect_timeout": 10.0, "pool_size": 1}
    async with database_on(server) as judged, proxied(judged, driver, **settings) as (proxy, db, _):
        for number in range(crashes):
            key = f"crash-{number}"
            killed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            numbers: list[int] = []

            def kill(
                kind: str, payload: bytes, numbers: list[int] = numbers, killed: asyncio.Future[int] = killed
            ) -> Verdict:
                if killed.done() or not is_commit(kind, payload):
                    return Verdict.FORWARD
                proxy.deafen()  # the question waits until others have written
                if answered:
                    killed.set_result(0)
                    return Verdict.CUT_ANSWER
                os.kill(numbers[1], signal.SIGKILL)
                killed.set_result(numbers[1])
                return Verdict.CUT

            async def work(key: str = key, numbers: list[int] = numbers) -> None:
                async with db.transaction() as session:
                    await session.execute(WRITE, {"key": key})
                    asked = text("SELECT pg_current_xact_id()::text::bigint, pg_backend_pid()")
                    numbers += (await session.execute(asked)).one()

            proxy.on_client_message = kill
            task = asyncio.create_task(work())
            async with asyncio.timeout(20):
                await killed
            if answered:
                await until(judged, "SELECT FROM entries WHERE key = $1", key)
                server.kill_backend((await asyncio.to_thread(server.backend_pids))[0])
            await asyncio.sleep(0.05)  # the postmaster has to notice, before it is asked whether it is ready
            await asyncio.to_thread(server.wait_until_ready)
            naive = await reuse(judged, numbers[0], prefix=key)
            there = bool(await judged.fetchval("SELECT count(*) FROM entries WHERE key = $1", key))
            found.naive_lies += naive == "committed" and not there
            proxy.pass_through()
            try:
                await task
            except CommitUnknown:
                found.verdicts["unknown"] += 1
            except CommitLost:
                found.verdicts["lost"] += 1
                if there:
                    found.wrong.append(key)
            else:
                found.verdicts["stored"] += 1
                if not there:
                    found.wrong.append(key)
            assert killed.done()
        await assert_nothing_left(judged, db)
    print(f"{driver}: {crashes} crashes, {found}")
    return found


async def reuse(judged: FreshDatabase, xid: int, *, prefix: str) -> Any:
    """Write until the number has been handed out again; what ``pg_xact_status`` alone then says of it."""
    for number in range(1000):
        for attempt in range(50):
            try:
                latest = await judged.fetchval(
                    "INSERT INTO entries VALUES ($1) RETURNING pg_current_xact_id()::text::bigint",
                    f"{prefix}-reuse-{number}-{attempt}",
                )
                break
            except Exception:  # it is still recovering
                await asyncio.sleep(0.05)
        else:
            raise AssertionError("the server did not come back")
        if latest > xid:
            return await judged.fetchval(f"SELECT pg_xact_status('{xid}'::xid8)")
    raise AssertionError(f"number {xid} was not reached")


async def test_committed_is_not_believed_after_a_crash(mortal: EmbeddedPostgres, driver: str) -> None:
    """A backend is killed before COMMIT arrives, others take its number: the naive question says *committed*."""
    found = await crash_at_commit(mortal, driver, 5)
    assert found.wrong == []
    assert found.naive_lies == 5, "the run is void: no number was handed out again"
    assert found.verdicts["stored"] == 0


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_committed_is_not_believed_after_twenty_crashes(mortal: EmbeddedPostgres, driver: str) -> None:
    found = await crash_at_commit(mortal, driver, 20)
    assert found.wrong == []
    assert found.naive_lies >= 16
    assert found.verdicts["stored"] == 0


async def test_what_was_stored_before_a_crash_is_never_called_lost(
    mortal: EmbeddedPostgres, driver: str
) -> None:
    found = await crash_at_commit(mortal, driver, 1, answered=True)
    assert found.wrong == []
    assert found.verdicts["unknown"] == 1


@pytest.mark.parametrize(
    ("driver", "answered"), [("asyncpg", False), pytest.param("psycopg", True, marks=pytest.mark.psycopg)]
)
async def test_a_standby_proves_nothing_until_it_is_promoted(
    driver: str, answered: bool, tmp_path: Path
) -> None:
    """The server comes back as a standby of nobody: it answers, but not to this; promoted, it is another life."""
    server = EmbeddedPostgres(durable=True, settings={"fsync": "off"}, port=free_port())
    with server:
        judged = await FreshDatabase.create(server)
        await prepare(judged)
        async with proxied(judged, driver, connect_timeout=10.0) as (proxy, db, events):

            def cut(kind: str, payload: bytes) -> Verdict:
                if not is_commit(kind, payload) or proxy.mode is not Mode.PASS:
                    return Verdict.FORWARD
                proxy.deafen()
                return Verdict.CUT_ANSWER if answered else Verdict.CUT

            proxy.on_client_message = cut
            task = asyncio.create_task(write(db, "x"))
            await happened(lambda: proxy.verdicts[Verdict.CUT] + proxy.verdicts[Verdict.CUT_ANSWER] == 1)
            await asyncio.to_thread(server.crash)
            (server.data_dir / "standby.signal").touch()
            await asyncio.to_thread(server.start)
            assert await judged.fetchval("SELECT pg_is_in_recovery()")
            proxy.forget()
            proxy.pass_through()
            await happened(lambda: seen(proxy).count("SELECT pg_is_in_recovery()") > 2)
            assert not task.done()
            assert events == []
            assert await judged.fetchval("SELECT pg_promote()")
            with pytest.raises(CommitUnknown if answered else CommitLost):
                await task
            assert await stored(judged, "x") == answered
        await judged.drop()


@both
async def test_a_commit_without_its_synchronous_standby_is_unknown_in_bounded_time(
    mortal: EmbeddedPostgres, driver: str, verify: bool
) -> None:
    """It is on this server's disk, but not where the operator wants it to be; its backend is left to wait."""
    async with (
        database_on(mortal) as judged,
        proxied(judged, driver, verify_commits=verify, commit_timeout=0.4) as (_, db, events),
    ):
        try:
            await judged.execute("ALTER SYSTEM SET synchronous_standby_names = 'ghost'")
            await judged.fetch("SELECT pg_reload_conf()")
            await until(judged, "SELECT 1 WHERE current_setting('synchronous_standby_names') = 'ghost'")
            begun = time.monotonic()
            with pytest.raises(CommitUnknown) as caught:
                await write(db, "x")
            assert 0.35 < time.monotonic() - begun < 3
            assert ("waits for a synchronous standby" in str(caught.value)) == verify
            assert await judged.fetch("SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            assert db.stats().in_use == 0
        finally:
            await judged.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await judged.fetch("SELECT pg_reload_conf()")
        assert await stored(judged, "x")
        assert len(events) == verify


# Teeth ------------------------------------------------------------------------------------------------------


async def test_the_plain_stack_calls_a_stored_commit_a_failure(judged: FreshDatabase, driver: str) -> None:
    """The runs above have teeth: without stanch, the error of a lost answer is that of any lost connection."""
    async with FaultProxy(judged.server.port) as proxy:
        engine = create_async_engine(
            proxy.through(judged.url(driver)) + "?ssl=disable" * (driver == "asyncpg")
        )
        proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
        with pytest.raises(Exception, match=r"closed") as caught:
            async with engine.connect() as connection:
                await connection.run_sync(lambda sync: Session(sync).execute(WRITE, {"key": "x"}))
                await connection.commit()
        failure = classify(caught.value)
        assert failure is not None
        assert (failure.kind, failure.retryable) == (Kind.UNAVAILABLE, True)
        assert await stored(judged, "x")
        await engine.dispose()
