"""Sessions as dependencies: one unit for a whole request, overrides, several databases, clear refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from stanch import Database
from stanch.errors import AsyncSessionInSyncEndpoint, ConfigError, NotInstalled, PartialCommit
from stanch.fastapi import (
    DatabaseDep,
    ReaderDep,
    SessionDep,
    get_database,
    get_reader,
    get_session,
    install,
    provide_session,
)
from stanch.sqlmodel import ReaderDep as SQLModelReaderDep, SessionDep as SQLModelSessionDep
from tests.requests.shop import SCHEMA, Order, Shop, User, call, doom, write_order
from tests.support.judge import FreshDatabase, assert_nothing_left

pytestmark = pytest.mark.anyio


async def current_user(session: ReaderDep) -> User:
    """An auth dependency, as every app has one: it reads."""
    user = await session.get(User, 1)
    if user is None:
        raise HTTPException(401)
    return user


UserDep = Annotated[User, Depends(current_user)]
MainDep = Annotated[AsyncSession, Depends(provide_session("main"))]
BillingDep = Annotated[AsyncSession, Depends(provide_session("billing"))]
ManualDep = Annotated[AsyncSession, Depends(provide_session(commit_mode="manual"))]


# One unit -------------------------------------------------------------------------------------------------


async def test_a_dependency_that_reads_and_a_handler_that_writes_share_session_and_connection(
    each_shop: Shop,
) -> None:
    async def backend(session: ReaderDep) -> int:
        pid: int = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        return pid

    @each_shop.app.post("/orders", status_code=201)
    async def place(
        user: UserDep, reader: ReaderDep, session: SessionDep, pid: int = Depends(backend)
    ) -> dict[str, bool]:
        session.add(Order(id=1, item="tea", user=user))
        user.visits += 1
        await session.flush()
        here: int = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        return {"one session": reader is session, "one connection": here == pid}

    await each_shop.judge.execute("INSERT INTO users VALUES (1, 'ada')")
    answer = await each_shop.post("/orders")
    assert (answer.status_code, answer.json()) == (201, {"one session": True, "one connection": True})
    row = (
        await each_shop.judge.fetch("SELECT o.user_id, u.visits FROM orders o JOIN users u ON u.id = user_id")
    )[0]
    assert (row["user_id"], row["visits"]) == (1, 1)
    assert await each_shop.connections() == ["idle"]


async def test_twenty_such_requests_at_once_on_a_pool_of_five_all_succeed(each_shop: Shop) -> None:
    """With two sessions for each request, five of them would hold all connections and wait for one more."""
    await each_shop.judge.execute("INSERT INTO users VALUES (1, 'ada')")
    ready = asyncio.Barrier(20)

    async def together() -> None:
        await ready.wait()

    @each_shop.app.post("/orders/{number}", status_code=201, dependencies=[Depends(together)])
    async def place(number: int, user: UserDep, session: SessionDep) -> dict[str, int]:
        session.add(Order(id=number, item="tea", user=user))
        return {"id": number}

    async with each_shop.client() as client:
        answers = await asyncio.gather(*(client.post(f"/orders/{number}") for number in range(20)))
    assert [answer.status_code for answer in answers] == [201] * 20
    assert await each_shop.orders() == list(range(20))
    assert len(await each_shop.connections()) <= 5


async def test_a_refused_user_stores_nothing(shop: Shop) -> None:
    @shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, user: UserDep) -> dict[str, bool]:
        return {"ok": True}

    assert (await shop.post("/orders")).status_code == 401
    assert await shop.orders() == []


async def test_what_a_yield_dependency_does_in_its_exit_is_never_half_done(shop: Shop) -> None:
    """Its exit runs before the reply or after it, as the FastAPI release has it; both are settled."""

    async def audited(session: SessionDep) -> AsyncIterator[None]:
        yield
        await session.execute(text("INSERT INTO audit (what) VALUES ('done')"))

    @shop.app.post("/orders", status_code=201, dependencies=[Depends(audited)])
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    assert (await call(shop.app, "/orders")).starts == [201]
    assert (await shop.orders(), await shop.audit()) == ([1], ["done"])


async def test_a_router_can_ask_for_the_session_of_all_its_routes(shop: Shop) -> None:
    router = APIRouter(dependencies=[Depends(get_session)])

    @router.post("/orders")
    async def place(session: ReaderDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    shop.app.include_router(router)
    assert (await shop.post("/orders")).status_code == 200
    assert await shop.orders() == [1]


# Overrides and providers ----------------------------------------------------------------------------------


async def test_overriding_get_session_replaces_it_everywhere(shop: Shop) -> None:
    """As a test of an app does: one session of its own, rolled back at the end."""

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    async with shop.db.session() as mine:
        shop.app.dependency_overrides[get_session] = lambda: mine
        assert (await shop.post("/orders")).json() == {"ok": True}
        assert await mine.get(Order, 1) is not None
        await mine.rollback()
    assert await shop.orders() == []


async def test_every_dependency_has_a_key_of_its_own_to_be_overridden_by(shop: Shop) -> None:

    @shop.app.get("/")
    async def read(session: SessionDep, reader: ReaderDep, db: DatabaseDep, other: ManualDep) -> list[Any]:
        return [session, reader, db, other]

    shop.app.dependency_overrides |= {
        get_session: lambda: "session",
        get_reader: lambda: "reader",
        get_database: lambda: "database",
        provide_session(commit_mode="manual"): lambda: "provided",
    }
    assert (await shop.get("/")).json() == ["session", "reader", "database", "provided"]


async def test_providers_of_equal_arguments_are_equal_and_share_the_session(shop: Shop) -> None:
    assert provide_session() == provide_session()
    assert hash(provide_session(shop.db)) == hash(provide_session(shop.db))
    assert provide_session(commit_mode="manual") != provide_session()
    assert provide_session("main") != provide_session("billing")

    @shop.app.post("/orders")
    async def place(
        session: SessionDep,
        by_name: MainDep,
        by_value: Any = Depends(provide_session(shop.db)),  # noqa: B008  # this test's own database
    ) -> dict[str, bool]:
        return {"same": session is by_name is by_value}

    assert (await shop.post("/orders")).json() == {"same": True}


@pytest.mark.parametrize(
    "options", [{"commit_mode": "autocommit"}, {"isolation_level": "CHAOS"}, {"commit_mode": ""}]
)
def test_a_provider_with_a_wrong_option_is_refused_where_it_is_written(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        provide_session(**options)


async def test_the_default_database_opens_units_of_the_handlers_own(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def place(db: DatabaseDep) -> dict[str, bool]:
        async with db.transaction() as session:
            await write_order(session, 1)
        return {"same": db is shop.db}

    assert (await shop.post("/orders")).json() == {"same": True}
    assert await shop.orders() == [1]


# Several databases ----------------------------------------------------------------------------------------


@pytest.fixture
async def second(fresh_database: FreshDatabase) -> AsyncIterator[FreshDatabase]:
    """Another database on the same server, with the same tables."""
    database = await FreshDatabase.create(fresh_database.server)
    await database.execute(SCHEMA)
    try:
        yield database
    finally:
        await database.drop()


@pytest.fixture
async def billing(bare_shop: Shop, second: FreshDatabase) -> AsyncIterator[Database[AsyncSession]]:
    """The shop with two databases, ``main`` and ``billing``; ``POST /orders`` writes to both."""
    database = Database(second.url("asyncpg"), name="billing", pool_size=2, max_overflow=0)
    install(bare_shop.app, bare_shop.db, database)
    yield database
    await assert_nothing_left(second, database)
    await database.close()


def add_order_in_both(shop: Shop, *, then: Any = None, doomed: str = "") -> None:
    @shop.app.post("/orders", status_code=201)
    async def place(
        main: SessionDep,
        billing: BillingDep,
    ) -> dict[str, bool]:
        await write_order(main, 1)
        await write_order(billing, 1)
        if doomed:
            await doom({"main": main, "billing": billing}[doomed])
        if then is not None:
            await then(main, billing)
        return {"different": main is not billing}


async def test_a_unit_over_two_databases_commits_both(
    bare_shop: Shop, second: FreshDatabase, billing: Database[AsyncSession]
) -> None:
    add_order_in_both(bare_shop)
    answer = await bare_shop.post("/orders")
    assert (answer.status_code, answer.json()) == (201, {"different": True})
    assert (await bare_shop.orders(), await _orders(second)) == ([1], [1])


@pytest.mark.parametrize("doomed", ["main", "billing"])
async def test_a_deferred_constraint_of_either_database_stops_both_before_the_first_commit(
    bare_shop: Shop, second: FreshDatabase, billing: Database[AsyncSession], doomed: str
) -> None:
    add_order_in_both(bare_shop, doomed=doomed)
    reply = await call(bare_shop.app, "/orders")
    assert reply.starts == [409]
    assert (await bare_shop.orders(), await _orders(second)) == ([], [])


async def test_a_second_commit_that_fails_is_told_as_partial(
    bare_shop: Shop, second: FreshDatabase, billing: Database[AsyncSession]
) -> None:
    """There is no two-phase commit: here billing's server connection dies between the two COMMITs."""
    told: list[PartialCommit] = []
    killed: list[int] = []

    async def kill_billing_after_main(main: AsyncSession, other: AsyncSession) -> None:
        pid: int = (await other.execute(text("SELECT pg_backend_pid()"))).scalar_one()

        def kill(_session: object) -> None:
            await_only(second.execute(f"SELECT pg_terminate_backend({pid}, 5000)"))
            killed.append(pid)

        event.listen(main.sync_session, "after_commit", kill)

    @bare_shop.app.exception_handler(PartialCommit)
    async def remember(_request: Request, error: Exception) -> Any:
        assert isinstance(error, PartialCommit)
        told.append(error)
        raise error

    add_order_in_both(bare_shop, then=kill_billing_after_main)
    reply = await call(bare_shop.app, "/orders")
    assert reply.starts == [500]
    assert killed
    assert [(error.committed, error.failed) for error in told] == [(("main",), "billing")]
    assert (await bare_shop.orders(), await _orders(second)) == ([1], [])


async def test_a_partial_commit_is_answered_as_one(
    bare_shop: Shop, second: FreshDatabase, billing: Database[AsyncSession]
) -> None:
    async def kill_billing_after_main(main: AsyncSession, other: AsyncSession) -> None:
        pid: int = (await other.execute(text("SELECT pg_backend_pid()"))).scalar_one()

        def kill(_session: object) -> None:
            await_only(second.execute(f"SELECT pg_terminate_backend({pid}, 5000)"))

        event.listen(main.sync_session, "after_commit", kill)

    add_order_in_both(bare_shop, then=kill_billing_after_main)
    answer = await bare_shop.post("/orders")
    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:stanch:problem:partial-commit"
    assert "retry-after" not in answer.headers


async def test_an_error_reply_stores_nothing_in_either(
    bare_shop: Shop, second: FreshDatabase, billing: Database[AsyncSession]
) -> None:
    async def refuse(_main: AsyncSession, _billing: AsyncSession) -> None:
        raise HTTPException(409)

    add_order_in_both(bare_shop, then=refuse)
    assert (await bare_shop.post("/orders")).status_code == 409
    assert (await bare_shop.orders(), await _orders(second)) == ([], [])


async def test_a_reader_of_one_database_beside_a_writer_of_the_other(
    bare_shop: Shop, second: FreshDatabase, billing: Database[AsyncSession]
) -> None:
    @bare_shop.app.post("/orders", status_code=201)
    async def place(
        main: ReaderDep,
        billing: BillingDep,
    ) -> dict[str, bool]:
        await main.execute(text("SELECT count(*) FROM orders"))
        await write_order(billing, 1)
        return {"ok": True}

    assert (await bare_shop.post("/orders")).status_code == 201
    assert (await bare_shop.orders(), await _orders(second)) == ([], [1])


# Refusals -------------------------------------------------------------------------------------------------


async def test_a_session_in_a_def_endpoint_is_refused(shop: Shop) -> None:
    """Its calls would not be awaited: nothing stored, and a 200."""

    @shop.app.post("/plain")
    def plain(session: SessionDep) -> dict[str, bool]:
        session.add(Order(id=1, item="tea"))
        return {"ok": True}

    @shop.app.post("/reader")
    def reader(session: ReaderDep) -> dict[str, bool]:
        return {"ok": True}

    @shop.app.post("/provided")
    def provided(session: ManualDep) -> dict[str, bool]:
        return {"ok": True}

    for path in ("/plain", "/reader", "/provided"):
        reply = await call(shop.app, path)
        assert reply.starts == [500]
        assert isinstance(reply.error, AsyncSessionInSyncEndpoint)
        assert f"async def {path[1:]}(...)" in str(reply.error)
    assert await shop.orders() == []


async def test_a_sqlmodel_session_in_a_def_endpoint_is_refused_too(shop: Shop) -> None:
    @shop.app.post("/plain")
    def plain(session: SQLModelSessionDep) -> dict[str, bool]:
        return {"ok": True}

    reply = await call(shop.app, "/plain")
    assert isinstance(reply.error, AsyncSessionInSyncEndpoint)


async def test_a_def_endpoint_may_depend_on_what_an_async_dependency_has_read(shop: Shop) -> None:
    await shop.judge.execute("INSERT INTO users VALUES (1, 'ada')")

    @shop.app.get("/me")
    def me(user: UserDep) -> dict[str, str]:
        return {"name": user.name}

    assert (await shop.get("/me")).json() == {"name": "ada"}


async def test_without_install_a_session_says_what_to_write() -> None:
    app = FastAPI()

    @app.post("/orders")
    async def place(session: SessionDep) -> None: ...

    reply = await call(app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, NotInstalled)
    assert "install(app, db)" in str(reply.error)


@pytest.mark.parametrize("how", ["name", "value"])
async def test_a_database_that_is_not_installed_is_refused_and_named(shop: Shop, how: str) -> None:
    stranger = shop.database(name="billing")

    @shop.app.post("/orders")
    async def place(
        session: Any = Depends(provide_session("billing" if how == "name" else stranger)),  # noqa: B008  # as above
    ) -> None:
        await write_order(session, 1)

    reply = await call(shop.app, "/orders")
    await stranger.close()
    assert reply.starts == [500]
    assert isinstance(reply.error, NotInstalled)
    assert "'billing'" in reply.error.what
    assert "'main'" in reply.error.what
    assert await shop.orders() == []


# SQLModel -------------------------------------------------------------------------------------------------


async def test_sqlmodels_session_keeps_its_exec(each_shop: Shop) -> None:
    db = Database(
        each_shop.judge.url(each_shop.driver), session_class=SQLModelSession, pool_size=2, max_overflow=0
    )
    app = FastAPI()
    install(app, db)

    @app.post("/orders", status_code=201)
    async def place(reader: SQLModelReaderDep, session: SQLModelSessionDep) -> dict[str, Any]:
        session.add(Order(id=1, item="tea"))
        return {"same": reader is session, "orders": list(await session.exec(select(Order.id)))}

    async with db, each_shop.client(app) as client:
        answer = await client.post("/orders")
        assert (answer.status_code, answer.json()) == (201, {"same": True, "orders": [1]})
        assert await each_shop.orders() == [1]
        await assert_nothing_left(each_shop.judge, db)


async def test_sqlmodels_dependency_on_a_plain_database_says_what_to_write(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def place(session: SQLModelSessionDep) -> None: ...

    reply = await call(shop.app, "/orders")
    assert isinstance(reply.error, ConfigError)
    assert "session_class=AsyncSession" in str(reply.error)


async def test_overriding_the_plain_get_session_replaces_sqlmodels_too(each_shop: Shop) -> None:
    db = Database(
        each_shop.judge.url(each_shop.driver), session_class=SQLModelSession, pool_size=2, max_overflow=0
    )
    app = FastAPI()
    install(app, db)

    @app.post("/orders")
    async def place(session: SQLModelSessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    async with db:
        async with db.session() as mine:
            app.dependency_overrides[get_session] = lambda: mine
            async with each_shop.client(app) as client:
                assert (await client.post("/orders")).json() == {"ok": True}
            await mine.rollback()
        assert await each_shop.orders() == []


async def test_a_failed_commit_of_an_overridden_session_is_its_owners_business(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def place(session: SessionDep) -> dict[str, bool]:
        await doom(session)
        return {"ok": True}

    with pytest.raises(IntegrityError):
        async with shop.db.transaction() as mine:
            shop.app.dependency_overrides[get_session] = lambda: mine
            assert (await shop.post("/orders")).status_code == 200
    assert await shop.children() == 0


async def _orders(judge: FreshDatabase) -> list[int]:
    return [row["id"] for row in await judge.fetch("SELECT id FROM orders ORDER BY id")]
