"""``install`` and the life of the app: what opens when, what it refuses, and test clients without a lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypedDict

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from stanch import Database
from stanch.errors import ConfigError, DatabaseUnavailable, SecondEventLoop
from stanch.fastapi import ReaderDep, SessionDep, add_exception_handlers, install, provide_session
from tests.requests.shop import Shop, call, doom, write_order
from tests.support.judge import assert_nothing_left
from tests.support.uvicorn_server import StartupFailed, serve

pytestmark = pytest.mark.anyio


OtherDep = Annotated[AsyncSession, Depends(provide_session("other"))]


class State(TypedDict):
    colour: str


def add_endpoints(app: FastAPI) -> None:
    @app.post("/orders/{number}", status_code=201)
    async def place(number: int, session: SessionDep) -> dict[str, int]:
        await write_order(session, number)
        return {"id": number}

    @app.get("/orders")
    async def count(session: ReaderDep) -> dict[str, int]:
        found: int = (await session.execute(text("SELECT count(*) FROM orders"))).scalar_one()
        return {"orders": found}


# The lifespan ---------------------------------------------------------------------------------------------


async def test_the_databases_open_before_the_app_and_close_after_it(bare_shop: Shop) -> None:
    """Its own lifespan can use them on the way up and on the way down, and its state is kept."""
    steps: list[str] = []
    db = bare_shop.db

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[State]:
        steps.append(f"app up: {db!r}")
        async with db.transaction() as session:
            await write_order(session, 1)
        yield {"colour": "green"}
        async with db.transaction() as session:
            await write_order(session, 2)
        steps.append(f"app down: {db!r}")

    app = FastAPI(lifespan=lifespan)
    install(app, db)

    @app.get("/colour")
    async def colour(request: Request) -> dict[str, str]:
        return {"colour": request.state.colour}

    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/colour")).json() == {"colour": "green"}
    assert steps == ["app up: <Database 'main', open>", "app down: <Database 'main', open>"]
    assert repr(db) == "<Database 'main', closed>"
    assert await bare_shop.orders() == [1, 2]
    await bare_shop.assert_disconnected()


async def test_a_router_with_a_lifespan_may_be_included_after_install(shop: Shop) -> None:
    steps: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncGenerator[None]:
        steps.append(f"up: {shop.db!r}")
        yield
        steps.append(f"down: {shop.db!r}")

    shop.app.include_router(APIRouter(lifespan=lifespan))
    async with serve(shop.app):
        pass
    assert steps == ["up: <Database 'main', open>", "down: <Database 'main', open>"]
    assert repr(shop.db) == "<Database 'main', closed>"


async def test_several_databases_open_in_order_and_close_in_reverse(bare_shop: Shop) -> None:
    steps: list[str] = []

    class Watched(Database[AsyncSession]):
        async def open(self, *, wait: float = 0.0) -> Any:
            steps.append(f"open {self.name}")
            return await super().open(wait=wait)

        async def close(self) -> None:
            steps.append(f"close {self.name}")
            await super().close()

    first, second = (Watched(bare_shop.judge.url("asyncpg"), name=name) for name in ("first", "second"))
    install(bare_shop.app, first, second)
    async with serve(bare_shop.app):
        assert steps == ["open first", "open second"]
    assert steps[2:] == ["close second", "close first"]


async def test_a_database_that_does_not_answer_stops_the_start_and_closes_the_others(bare_shop: Shop) -> None:
    down = Database(
        "postgresql+asyncpg://nobody:secret-word@127.0.0.1:1/none", name="down", connect_timeout=2
    )
    install(bare_shop.app, bare_shop.db, down)
    with pytest.raises(StartupFailed) as failed:
        async with serve(bare_shop.app):
            pass
    assert isinstance(failed.value.__cause__, DatabaseUnavailable)
    assert "secret-word" not in repr(failed.value.__cause__)
    assert repr(bare_shop.db) == "<Database 'main', closed>"
    await bare_shop.assert_disconnected()


async def test_an_app_whose_own_lifespan_fails_leaves_nothing_open(bare_shop: Shop) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        app.state.quotient = 1 / 0
        yield

    app = FastAPI(lifespan=lifespan)
    install(app, bare_shop.db)
    with pytest.raises(StartupFailed) as failed:
        async with serve(app):
            pass
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert repr(bare_shop.db) == "<Database 'main', closed>"
    await bare_shop.assert_disconnected()


async def test_an_app_can_be_started_again(shop: Shop) -> None:
    add_endpoints(shop.app)
    for number in (1, 2):
        async with serve(shop.app) as url, httpx.AsyncClient(base_url=url) as client:
            assert (await client.post(f"/orders/{number}")).status_code == 201
    assert await shop.orders() == [1, 2]


async def test_after_the_app_has_ended_the_database_refuses_as_unavailable(shop: Shop) -> None:
    add_endpoints(shop.app)
    async with serve(shop.app):
        pass
    answer = await shop.post("/orders/1")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert await shop.orders() == []


# install --------------------------------------------------------------------------------------------------


async def test_a_second_install_adds_its_databases(bare_shop: Shop) -> None:
    other = bare_shop.database(name="other")
    install(bare_shop.app, bare_shop.db)
    install(bare_shop.app, other)

    @bare_shop.app.post("/orders")
    async def place(main: SessionDep, second: OtherDep) -> dict[str, bool]:
        await write_order(main, 1)
        await write_order(second, 2)
        return {"different": main is not second}

    async with serve(bare_shop.app) as url, httpx.AsyncClient(base_url=url) as client:
        assert repr(other) == "<Database 'other', open>"
        assert (await client.post("/orders")).json() == {"different": True}
    assert await bare_shop.orders() == [1, 2]
    assert repr(other) == "<Database 'other', closed>"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            {},
            {"commit_mode": "manual"},
            "commit_mode='manual', but this app was installed with commit_mode='auto'",
        ),
        ({"unsaved": "raise"}, {"unsaved": "ignore"}, "unsaved='ignore', but .* with unsaved='raise'"),
    ],
)
async def test_a_second_install_with_other_words_is_refused_and_changes_nothing(
    bare_shop: Shop, first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    """They would silently hold for nobody: the middleware is there already."""
    install(bare_shop.app, bare_shop.db, **first)
    add_endpoints(bare_shop.app)
    other = bare_shop.database(name="other")
    with pytest.raises(ConfigError, match=said) as refused:
        install(bare_shop.app, other, **second)
    assert refused.value.remedies
    async with serve(bare_shop.app) as url, httpx.AsyncClient(base_url=url) as client:
        assert repr(other) == "<Database 'other', not opened yet>"
        assert (await client.post("/orders/1")).status_code == 201
    assert await bare_shop.orders() == [1]


async def test_installing_the_same_database_twice_is_as_once(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db)
    install(bare_shop.app, bare_shop.db)
    add_endpoints(bare_shop.app)
    async with serve(bare_shop.app) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/orders/1")).status_code == 201
    assert repr(bare_shop.db) == "<Database 'main', closed>"
    assert await bare_shop.orders() == [1]


async def test_two_databases_of_one_name_are_refused_also_over_two_installs(bare_shop: Shop) -> None:
    """A name that means two databases would silently mean the first."""
    namesake = bare_shop.database()
    with pytest.raises(ConfigError, match="two databases are called 'main'"):
        install(bare_shop.app, bare_shop.db, namesake)
    install(bare_shop.app, bare_shop.db)
    with pytest.raises(ConfigError, match="two databases are called 'main'"):
        install(bare_shop.app, namesake)


async def test_install_is_refused_once_the_app_has_served(shop: Shop) -> None:
    add_endpoints(shop.app)
    assert (await shop.get("/orders")).status_code == 200
    with pytest.raises(ConfigError, match="already started"):
        install(shop.app, shop.db)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((), {}, "no database given"),
        (("postgresql+asyncpg://app@localhost/shop",), {}, "expected a stanch Database, got str"),
        (None, {"commit_mode": "autocommit"}, "commit_mode: got 'autocommit'"),
        (None, {"unsaved": "shout"}, "unsaved: got 'shout'"),
    ],
)
def test_a_wrong_argument_is_refused_where_it_is_written(
    arguments: tuple[Any, ...] | None, options: dict[str, Any], said: str
) -> None:
    chosen = (Database("postgresql+asyncpg://app@localhost/shop"),) if arguments is None else arguments
    with pytest.raises(ConfigError, match=said) as refused:
        install(FastAPI(), *chosen, **options)
    assert refused.value.remedies


async def test_a_refused_install_leaves_the_app_as_it_was(bare_shop: Shop) -> None:
    options: dict[str, Any] = {"commit_mode": "autocommit"}
    with pytest.raises(ConfigError):
        install(bare_shop.app, bare_shop.db, **options)
    install(bare_shop.app, bare_shop.db)
    add_endpoints(bare_shop.app)
    assert (await bare_shop.post("/orders/1")).status_code == 201


async def test_each_part_of_install_can_be_left_out_and_done_by_hand(bare_shop: Shop) -> None:
    app = FastAPI(lifespan=bare_shop.db.lifespan)
    install(app, bare_shop.db, lifespan=False, exception_handlers=False)
    add_endpoints(app)

    @app.post("/doomed")
    async def doomed(session: SessionDep) -> None:
        await doom(session)

    add_exception_handlers(app)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        assert repr(bare_shop.db) == "<Database 'main', open>"
        assert (await client.post("/orders/1")).status_code == 201
        assert (await client.post("/doomed")).status_code == 409
    assert repr(bare_shop.db) == "<Database 'main', closed>"


async def test_handlers_of_the_app_stay_whether_they_came_before_install_or_after(bare_shop: Shop) -> None:
    async def mine(_request: Request, _error: Exception) -> PlainTextResponse:
        return PlainTextResponse("mine", 418)

    before, after = FastAPI(), FastAPI()
    before.add_exception_handler(SQLAlchemyError, mine)
    for app in (before, after):
        install(app, bare_shop.db)

        @app.post("/doomed")
        async def doomed(session: SessionDep) -> None:
            await doom(session)

    after.add_exception_handler(SQLAlchemyError, mine)
    for app in (before, after):
        assert (await call(app, "/doomed")).starts == [418]


# Clients that run no lifespan, and several event loops ------------------------------------------------------


async def test_a_client_without_lifespan_opens_the_database_lazily(each_shop: Shop) -> None:
    add_endpoints(each_shop.app)
    assert (await each_shop.post("/orders/1")).status_code == 201
    assert (await each_shop.get("/orders")).json() == {"orders": 1}


async def test_a_bare_test_client_gives_every_request_another_loop_and_all_succeed(each_shop: Shop) -> None:
    """Every other pool hands out a connection that is *attached to a different loop*."""
    add_endpoints(each_shop.app)

    def use() -> list[int]:
        client = TestClient(each_shop.app)
        return [client.post(f"/orders/{number}").status_code for number in range(4)]

    assert await asyncio.to_thread(use) == [201] * 4
    assert await each_shop.orders() == [0, 1, 2, 3]
    await _closed_from_here(each_shop)


async def test_a_test_client_with_its_lifespan_opens_and_closes(each_shop: Shop) -> None:
    add_endpoints(each_shop.app)

    def use() -> list[int]:
        with TestClient(each_shop.app) as client:
            return [client.post(f"/orders/{number}").status_code for number in range(4)]

    assert await asyncio.to_thread(use) == [201] * 4
    assert await each_shop.orders() == [0, 1, 2, 3]
    assert repr(each_shop.db) == "<Database 'main', closed>"
    await each_shop.assert_disconnected()


async def test_two_test_clients_one_after_the_other_are_two_loops(each_shop: Shop) -> None:
    add_endpoints(each_shop.app)

    def use(number: int) -> int:
        with TestClient(each_shop.app) as client:
            client.get("/orders")
            return client.post(f"/orders/{number}").status_code

    assert [await asyncio.to_thread(use, number) for number in (1, 2)] == [201, 201]
    assert await each_shop.orders() == [1, 2]
    await each_shop.assert_disconnected()


async def test_a_second_test_client_beside_the_first_is_told_that_the_connections_are_not_its(
    each_shop: Shop,
) -> None:
    add_endpoints(each_shop.app)

    def use() -> list[int]:
        with TestClient(each_shop.app) as one:
            with pytest.raises(SecondEventLoop, match="'main' is in use on another event loop"):
                TestClient(each_shop.app).post("/orders/0")
            return [one.post(f"/orders/{number}").status_code for number in (1, 2)]

    assert await asyncio.to_thread(use) == [201] * 2
    assert await each_shop.orders() == [1, 2]


async def test_a_failed_commit_is_a_reply_to_a_test_client_too(shop: Shop) -> None:
    @shop.app.post("/doomed", status_code=201)
    async def doomed(session: SessionDep) -> dict[str, bool]:
        await doom(session)
        return {"ok": True}

    def use() -> int:
        with TestClient(shop.app) as client:
            return client.post("/doomed").status_code

    assert await asyncio.to_thread(use) == 409


async def test_what_we_do_not_answer_is_raised_by_a_test_client_as_without_us(shop: Shop) -> None:
    @shop.app.get("/broken")
    async def broken(session: ReaderDep) -> None:
        await session.execute(text("SELECT * FROM no_such_table"))

    def use() -> str:
        with TestClient(shop.app) as client, pytest.raises(Exception, match="no_such_table") as raised:
            client.get("/broken")
        return raised.type.__name__

    assert await asyncio.to_thread(use) == "ProgrammingError"


async def _closed_from_here(shop: Shop) -> None:
    """The loops of a bare TestClient are gone; what they left open must not be held against this one."""
    await shop.db.close()
    await assert_nothing_left(shop.judge, shop.db)
