"""The same pool under threads: an engine that is not async, whose callers wait as threads do."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from stanch import DatabaseUnavailable, PoolExhausted, PoolOverloaded, Stats
from stanch.drivers.psycopg import DRIVER
from stanch.embedded import EmbeddedPostgres
from stanch.events import Observers
from stanch.meters import Instruments
from stanch.pool import Pool
from stanch.settings import Settings
from stanch.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

pytestmark = pytest.mark.psycopg


@pytest.fixture
def engine_of(postgres: EmbeddedPostgres) -> Iterator[Callable[..., Engine]]:
    """An engine with our pool in it, disposed of at the end."""
    engines: list[Engine] = []

    def made(url: str | None = None, reset: str | None = "rollback", **settings: Any) -> Engine:
        url = url or postgres.url("psycopg")
        engine = create_engine(url, poolclass=NullPool, pool_reset_on_return=reset)
        engine.pool = Pool(
            engine.pool,
            Settings.judge(**settings),
            driver=DRIVER,
            watch=Watch(DRIVER),
            observers=Observers(),
            instruments=Instruments(),
            database="threads",
        )
        engines.append(engine)
        return engine

    yield made
    for engine in engines:
        engine.dispose()
        assert stats_of(engine).size == 0


def stats_of(engine: Engine) -> Stats:
    assert isinstance(engine.pool, Pool)
    return engine.pool.stats()


def wait_until(condition: Callable[[], bool], *, timeout: float = 10.0) -> None:
    over = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < over
        time.sleep(0.002)


def test_threads_take_turns_and_none_starves(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(pool_size=2, max_overflow=0, pool_timeout=20.0)
    turns = Counter(dict.fromkeys(range(6), 0))
    together = threading.Barrier(6)
    # Both are opened before: who opens one waits for his own connect, while the others go round.
    with engine.connect() as one, engine.connect() as other:
        assert one.scalar(text("SELECT 1")) == other.scalar(text("SELECT 1"))

    def loop(number: int) -> None:
        together.wait(30)
        # in what order threads come back is the machine's doing, and it may let one of them wait for long
        while min(turns.values()) < 100 and turns.total() < 30_000:
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT CAST(:n AS int)"), {"n": number}) == number
            turns[number] += 1

    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(loop, number) for number in range(6)]:
            done.result(60)
    assert min(turns.values()) >= 100, f"SQLAlchemy's pool gives some of them next to nothing: {turns}"
    assert stats_of(engine) == Stats(pool_size=2, max_overflow=0, in_use=0, idle=2, waiting=0)


def test_threads_are_served_in_the_order_they_came(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(pool_size=1, max_overflow=0, pool_timeout=20.0)
    served: list[int] = []

    def ask(number: int) -> None:
        with engine.connect():
            served.append(number)

    with ThreadPoolExecutor(8) as threads, ExitStack() as holding:
        holding.enter_context(engine.connect())
        for number in range(8):
            threads.submit(ask, number)
            wait_until(lambda wanted=number + 1: stats_of(engine).waiting == wanted)  # type: ignore[misc]  # mypy cannot infer a lambda's default
        holding.close()
    assert served == list(range(8))


def test_a_thread_that_waits_is_told_in_time_and_leaves_nothing(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(pool_size=1, max_overflow=0, pool_timeout=0.2, max_waiting=1)
    with engine.connect(), ThreadPoolExecutor(1) as threads:
        begun = time.monotonic()
        waiting = threads.submit(engine.connect)
        wait_until(lambda: stats_of(engine).waiting == 1)
        with pytest.raises(PoolOverloaded, match="max_waiting is 1"):
            engine.connect()
        with pytest.raises(PoolExhausted, match=r"within 0\.20 s \(in_use 1 of 1, waiting 1\)"):
            waiting.result(10)
        assert 0.15 < time.monotonic() - begun < 5
        assert stats_of(engine).waiting == 0
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 42")) == 42


def test_a_connection_left_in_a_transaction_or_dead_is_not_handed_to_another_thread(
    engine_of: Callable[..., Engine], postgres: EmbeddedPostgres
) -> None:
    engine = engine_of(pool_size=1, max_overflow=0, reset=None)
    proxied = engine.raw_connection()
    left: Any = proxied.driver_connection
    left.execute("SELECT 1")  # begins a transaction, which nobody ends
    proxied.close()
    assert left.closed
    with engine.connect() as connection:
        first = connection.scalar(text("SELECT pg_backend_pid()"))
        connection.rollback()
    postgres.sql(f"SELECT pg_terminate_backend({first}, 5000)")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT pg_backend_pid()")) != first
        connection.rollback()


def test_a_server_that_is_away_is_asked_by_one_thread_and_all_are_told(
    engine_of: Callable[..., Engine],
) -> None:
    engine = engine_of("postgresql+psycopg://app@127.0.0.1:1/shop", pool_size=5, pool_timeout=10.0)
    attempts = 0
    connect = engine.dialect.connect

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal attempts
        attempts += 1
        return connect(*arguments, **named)

    engine.dialect.connect = counted  # type: ignore[method-assign]

    def ask(_number: int) -> float:
        begun = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="the server"):
            engine.connect()
        return time.monotonic() - begun

    with ThreadPoolExecutor(20) as threads:
        begun = time.monotonic()
        took = [*threads.map(ask, range(40))]
        soon = 5  # those after pauses of 50 to 800 ms
        assert attempts <= 2 + soon + (time.monotonic() - begun), attempts
    assert max(took) < 8.0, "pool_timeout is ten seconds"


def test_hand_overs_between_threads_lose_nothing(engine_of: Callable[..., Engine]) -> None:
    """The pool alone, without a server's round trip in between: as many hand-overs as the machine can do."""
    engine = engine_of(pool_size=3, max_overflow=1, pool_timeout=30.0, queue_target=None)
    held: set[int] = set()
    lock = threading.Lock()

    def loop() -> None:
        for _ in range(250):
            proxied = engine.raw_connection()
            identity = id(proxied.driver_connection)
            with lock:
                assert identity not in held, "two threads have the same connection"
                held.add(identity)
            with lock:
                held.discard(identity)
            proxied.close()

    with ThreadPoolExecutor(12) as threads:
        for done in [threads.submit(loop) for _ in range(12)]:
            done.result(60)
    stats = stats_of(engine)
    assert (stats.in_use, stats.waiting) == (0, 0)
    assert stats.idle <= 3
