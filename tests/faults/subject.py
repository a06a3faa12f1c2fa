"""The app under test, twice: on stanch, and on the dependency that people write by hand and commit in after ``yield``.

The handlers are the same, letter for letter; only what gives them a session differs. No ``from __future__ import
annotations`` here: FastAPI reads the annotations.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from sqlalchemy import insert, literal, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.middleware.base import BaseHTTPMiddleware

from stanch import Database, Stats
from stanch.fastapi import ReaderDep, SessionDep, get_reader, get_session, install, unit
from tests.support.judge import FreshDatabase

TABLES = """
    CREATE TABLE entries (key text PRIMARY KEY, note text NOT NULL DEFAULT '', kind text NOT NULL DEFAULT '');
    CREATE TABLE pairs (unit text, half int, PRIMARY KEY (unit, half));
    CREATE TABLE parents (id int PRIMARY KEY);
    CREATE TABLE children (
        key text PRIMARY KEY, parent int NOT NULL REFERENCES parents DEFERRABLE INITIALLY DEFERRED
    );
    CREATE TABLE slow (key text PRIMARY KEY, seconds float NOT NULL);
    CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_sleep(NEW.seconds); RETURN NEW; END';
    CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION linger();
    CREATE TABLE shifts (team int, doctor int, on_call boolean NOT NULL, PRIMARY KEY (team, doctor));
    CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL);
    INSERT INTO entries VALUES ('taken');
"""
"""``slow`` makes COMMIT itself take its time, as a disk or a synchronous standby does."""

Wiring = Literal["stanch", "commit after yield"]
Outer = Literal["BaseHTTPMiddleware", "asyncio.timeout", "anyio.move_on_after", "double cancel"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Which app to build; travels to the server's process."""

    url: str
    wiring: Wiring = "stanch"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    outer: tuple[str, ...] = ()
    """What stands around the app; the first is innermost."""
    request_timeout: float | None = None
    cold: bool = False
    """Whether the app starts without a connection."""

    def build(self) -> FastAPI:
        app = FastAPI()
        handlers = Handlers()
        handlers.add_to(app)
        if self.wiring == "stanch":
            db = Database(self.url, **self.settings)
            install(app, db, request_timeout=self.request_timeout, lifespan=not self.cold)
            _add_inspection(app, db)
        else:
            _commit_after_yield(app, self.url, self.settings)
        for name in self.outer:
            app.add_middleware(LAYERS[name], handlers.cuts)
        return app


async def prepare(judged: FreshDatabase) -> None:
    """The tables of the app, in the test's own database."""
    await judged.execute(TABLES)


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "entries"
    key: Mapped[str] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(default="")
    kind: Mapped[str] = mapped_column(default="")


class Pair(Base):
    __tablename__ = "pairs"
    unit: Mapped[str] = mapped_column(primary_key=True)
    half: Mapped[int] = mapped_column(primary_key=True)


class Promise(BaseModel):
    """What a reply must look like, for handlers that do not keep to it."""

    key: str
    amount: int


# The bad subject ------------------------------------------------------------------------------------------


def _commit_after_yield(app: FastAPI, url: str, settings: dict[str, Any]) -> None:
    """What is written by hand: a session for the request, committed once the handler has returned."""
    engine = create_async_engine(url, **settings)
    factory = async_sessionmaker(engine, expire_on_commit=False)

    async def session() -> AsyncGenerator[AsyncSession]:
        async with factory() as session:
            try:
                yield session
                await session.commit()
            except BaseException:
                await session.rollback()
                raise

    app.dependency_overrides[get_session] = session
    app.dependency_overrides[get_reader] = session


# Looking inside -------------------------------------------------------------------------------------------


def _add_inspection(app: FastAPI, db: Database[Any]) -> None:
    """Figures that only the process itself has; whether they are true is for the judge to compare."""

    @app.get("/_/stats")
    async def stats() -> Stats:
        return db.stats()

    @app.post("/_/collect")
    async def collect() -> None:
        gc.collect()

    @app.post("/_/lend/{count}")
    async def lend(count: int) -> list[int]:
        """Hold *count* connections at once, each of which must give its own answer; their backends' pids."""
        async with AsyncExitStack() as stack:
            held = [await stack.enter_async_context(db.connect()) for _ in range(count)]

            async def ask(nonce: int) -> int:
                query = select(literal(nonce), text("pg_backend_pid()"))
                answer, pid = (await held[nonce].execute(query)).one()
                assert answer == nonce, f"asked for {nonce}, was told {answer}"
                return int(pid)

            return await asyncio.gather(*(ask(nonce) for nonce in range(count)))


# Handlers -------------------------------------------------------------------------------------------------


class Handlers:
    """All endpoints, and what they share: gates that the test opens, and counts of what was cut off."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.barriers: dict[str, asyncio.Barrier] = {}
        self.cuts: Counter[str] = Counter()

    def add_to(self, app: FastAPI) -> None:
        app.get("/_/cuts")(self.show_cuts)
        app.post("/_/open/{key}")(self.open_gate)
        app.post("/entries/{key}", status_code=201)(write_entry)
        app.get("/entries/{key}")(read_entry)
        app.get("/idle")(idle)
        app.post("/slow/{key}/{seconds}", status_code=201)(commit_slowly)
        app.post("/orphans/{key}", status_code=201)(break_deferred_constraint)
        app.post("/held/{key}", status_code=201)(self.wait_at_gate)
        app.post("/errors/held/{key}")(self.fail_at_gate)
        app.post("/swallow/{way}/{key}", status_code=201)(swallow)
        app.post("/errors/status/{key}")(set_status)
        app.post("/errors/returned/{key}")(return_error)
        app.post("/errors/raised/{key}")(raise_error)
        app.post("/errors/invalid/{key}", response_model=Promise)(break_promise)
        app.post("/pairs/{key}", status_code=201)(self.write_pair)
        app.get("/streams/{key}")(stream_pairs)
        app.get("/nonces/{nonce}")(echo_nonce)
        app.post("/off-call/{team}/{doctor}/{key}")(self.go_off_call)
        app.post("/transfers/{source}/{target}/{key}")(transfer)
        app.post("/mixed/{way}/{key}")(mixed)
        app.post("/naps/{seconds}/{key}", status_code=201)(nap)

    async def show_cuts(self) -> dict[str, int]:
        return dict(self.cuts)

    async def open_gate(self, key: str) -> None:
        self.gates.setdefault(key, asyncio.Event()).set()

    async def wait_at_gate(self, key: str, session: SessionDep) -> None:
        """Written, not committed; the test now does what it wants to the backend of that name."""
        await session.execute(text("SELECT set_config('application_name', :key, true)"), {"key": key})
        session.add(Entry(key=key))
        await session.flush()
        await self.gates.setdefault(key, asyncio.Event()).wait()
        del self.gates[key]

    async def fail_at_gate(self, key: str, session: SessionDep) -> None:
        """As before, and then an error reply: what was written is rolled back."""
        await self.wait_at_gate(key, session)
        raise HTTPException(422, "no")

    async def write_pair(
        self, key: str, session: SessionDep, cut: str = "none", after: float = 60.0, pause: float = 0.004
    ) -> Response:
        """Two rows with a wait on the server and a wait in the app between them, cut off *after* seconds."""
        match cut:
            case "asyncio.timeout in the handler":
                with suppress(TimeoutError):
                    async with asyncio.timeout(after):
                        await _both_halves(session, key, pause)
                        return Response(status_code=201)
            case "anyio.move_on_after in the handler":
                with anyio.move_on_after(after):
                    await _both_halves(session, key, pause)
                    return Response(status_code=201)
            case "asyncio.timeout, unhandled":
                try:
                    async with asyncio.timeout(after):
                        await _both_halves(session, key, pause)
                except TimeoutError:
                    self.cuts[cut] += 1
                    raise
                return Response(status_code=201)
            case _:
                await _both_halves(session, key, pause)
                return Response(status_code=201)
        self.cuts[cut] += 1
        return Response(status_code=504)

    @unit(isolation_level="SERIALIZABLE")
    async def go_off_call(
        self, team: int, doctor: int, key: str, session: SessionDep, meet: int = 0
    ) -> dict[str, bool]:
        """Go off call if another doctor of the team stays on it. With *meet*, that many requests decide at once."""
        on_call = await session.scalar(
            text("SELECT count(*) FROM shifts WHERE team = :team AND on_call"), {"team": team}
        )
        if meet:
            barrier = self.barriers.setdefault(f"{team}", asyncio.Barrier(meet))
            with suppress(TimeoutError, asyncio.BrokenBarrierError):
                async with asyncio.timeout(1.0):
                    await barrier.wait()
        if int(on_call or 0) < 2:
            raise HTTPException(409, "somebody must stay")
        await session.execute(
            text("UPDATE shifts SET on_call = false WHERE team = :team AND doctor = :doctor"),
            {"team": team, "doctor": doctor},
        )
        session.add(Entry(key=key, kind="off call"))
        return {"off": True}


async def _both_halves(session: AsyncSession, unit: str, pause: float) -> None:
    session.add(Pair(unit=unit, half=1))
    await session.flush()
    await session.execute(text("SELECT pg_sleep(:pause)"), {"pause": pause})
    await asyncio.sleep(pause)
    await session.execute(insert(Pair).values(unit=unit, half=2))


async def write_entry(key: str, session: SessionDep, slow: float = 0.0) -> dict[str, str]:
    session.add(Entry(key=key))
    if slow:
        await session.execute(text("INSERT INTO slow VALUES (:key, :slow)"), {"key": key, "slow": slow})
    return {"key": key}


async def read_entry(key: str, session: ReaderDep) -> dict[str, str]:
    if await session.get(Entry, key) is None:
        raise HTTPException(404)
    return {"key": key}


async def idle(session: SessionDep) -> None:
    """A session is asked for and not used."""


async def commit_slowly(key: str, seconds: float, session: SessionDep) -> None:
    session.add(Entry(key=key))
    await session.execute(text("INSERT INTO slow VALUES (:key, :seconds)"), {"key": key, "seconds": seconds})


async def break_deferred_constraint(key: str, session: SessionDep) -> None:
    """Only COMMIT finds out that there is no such parent."""
    session.add(Entry(key=key))
    await session.execute(text("INSERT INTO children VALUES (:key, -1)"), {"key": key})


async def swallow(way: str, key: str, session: SessionDep) -> None:
    """A database error that nobody is told of, then an ordinary return. *way*: how, and after which savepoint."""
    how, _, before = way.partition("+")
    if before == "savepoint":
        async with session.begin_nested():
            session.add(Entry(key=f"{key}-savepoint"))
    session.add(Entry(key=key))
    await session.flush()
    try:
        match how:
            case "orm":
                session.add(Entry(key="taken"))
                await session.flush()
            case "orm-query":
                await session.scalars(select(Entry).where(text("1 / (length(key) - length(key)) = 1")))
            case "core":
                await session.execute(insert(Entry).values(key="taken"))
            case "connection":
                connection = await session.connection()
                await connection.execute(insert(Entry).values(key="taken"))
            case "inside-savepoint":
                async with session.begin_nested():
                    with suppress(DBAPIError):
                        await session.execute(text("SELECT 1 / 0"))
            case "contained":  # the right way: this one must succeed
                async with session.begin_nested():
                    await session.execute(text("SELECT 1 / 0"))
            case _:
                raise AssertionError(way)
    except DBAPIError:
        pass


async def set_status(key: str, session: SessionDep, response: Response) -> None:
    session.add(Entry(key=key))
    response.status_code = 409


async def return_error(key: str, session: SessionDep) -> Response:
    session.add(Entry(key=key))
    await session.flush()
    return JSONResponse({"sorry": True}, 400)


async def raise_error(key: str, session: SessionDep) -> None:
    session.add(Entry(key=key))
    await session.flush()
    raise HTTPException(422, "no")


async def break_promise(key: str, session: SessionDep) -> dict[str, str]:
    session.add(Entry(key=key))
    await session.flush()
    return {"key": key, "amount": "a lot"}


async def stream_pairs(key: str, session: SessionDep, pause: float = 0.003) -> StreamingResponse:
    """A pair in the handler, and another one in the body, chunk by chunk."""
    await _both_halves(session, key, pause)

    async def body() -> AsyncIterator[str]:
        yield "first\n"
        session.add(Pair(unit=f"{key}-body", half=1))
        await session.flush()
        for _ in range(4):
            await asyncio.sleep(pause)
            yield "more\n"
        await session.execute(insert(Pair).values(unit=f"{key}-body", half=2))
        yield "last\n"

    return StreamingResponse(body())


async def echo_nonce(nonce: str, session: ReaderDep) -> dict[str, str | None]:
    return {"nonce": await session.scalar(select(literal(nonce)))}


@unit(isolation_level="SERIALIZABLE")
async def transfer(source: int, target: int, key: str, session: SessionDep) -> None:
    """Read both balances, then write both: under anything weaker than SERIALIZABLE money appears or vanishes."""
    rows = await session.execute(
        text("SELECT id, balance FROM accounts WHERE id IN (:a, :b)"), {"a": source, "b": target}
    )
    balances: dict[int, int] = dict(rows.tuples().all())
    move = text("UPDATE accounts SET balance = :balance WHERE id = :id")
    await session.execute(move, {"id": source, "balance": balances[source] - 1})
    await session.execute(move, {"id": target, "balance": balances[target] + 1})
    session.add(Entry(key=key, kind="transfer"))


async def mixed(way: str, key: str, session: SessionDep) -> dict[str, int]:
    """One of the things an app does all day."""
    match way:
        case "write":
            session.add(Entry(key=key))
        case "savepoint":
            session.add(Entry(key=key))
            with suppress(DBAPIError):
                async with session.begin_nested():
                    await session.execute(insert(Entry).values(key="taken"))
            async with session.begin_nested():
                session.add(Entry(key=f"{key}-inner"))
        case "read":
            rows = (await session.scalars(select(Entry).where(Entry.key < key).limit(3))).all()
            return {"rows": len(rows)}
        case "conflict":
            session.add(Entry(key="taken"))
        case _:
            session.add(Entry(key=key))
            await session.flush()
            raise HTTPException(418)
    await session.flush()
    return {"rows": 1}


async def nap(seconds: float, key: str, session: SessionDep) -> None:
    """Work that lasts, in the database, and is then stored."""
    session.add(Entry(key=key))
    await session.flush()
    await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


# What stands around the app -------------------------------------------------------------------------------

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]


class Cutting:
    """Ends the app's call early, where the request asks for it with ``?cut=…&after=…``, and answers 504."""

    name = ""

    def __init__(self, app: App, cuts: Counter[str]) -> None:
        self.app = app
        self.cuts = cuts

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        query = dict(Request(scope).query_params) if scope["type"] == "http" else {}
        if query.get("cut") != self.name:
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        if not await self.finished(self.app(scope, receive, watched), float(query["after"])):
            self.cuts[self.name] += 1
            if not started:
                await Response(status_code=504)(scope, receive, send)

    async def finished(self, call: Awaitable[None], after: float) -> bool:
        raise NotImplementedError


class AsyncioTimeout(Cutting):
    name = "asyncio.timeout around the app"

    async def finished(self, call: Awaitable[None], after: float) -> bool:
        try:
            async with asyncio.timeout(after):
                await call
        except TimeoutError:
            return False
        return True


class AnyioMoveOn(Cutting):
    name = "anyio.move_on_after around the app"

    async def finished(self, call: Awaitable[None], after: float) -> bool:
        with anyio.move_on_after(after) as scope:
            await call
        return not scope.cancelled_caught


class DoubleCancel(Cutting):
    name = "double cancel around the app"

    async def finished(self, call: Awaitable[None], after: float) -> bool:
        task = asyncio.ensure_future(call)
        await asyncio.wait({task}, timeout=after)
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.wait({task}, timeout=after / 4)  # somewhere inside the tidying up
        task.cancel()
        await asyncio.wait({task})
        return not task.cancelled()


async def _pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    return await call_next(request)


def _base_http(app: App, _cuts: Counter[str]) -> BaseHTTPMiddleware:
    return BaseHTTPMiddleware(app, _pass_on)


LAYERS: dict[str, Any] = {
    "BaseHTTPMiddleware": _base_http,
    "asyncio.timeout": AsyncioTimeout,
    "anyio.move_on_after": AnyioMoveOn,
    "double cancel": DoubleCancel,
}
