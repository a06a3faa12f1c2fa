"""What every test can ask for: a real PostgreSQL, a database of its own, a judge, a driver."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("tests.support")

from stanch.embedded import EmbeddedPostgres  # noqa: E402  # assert rewriting comes first
from tests.support import optional  # noqa: E402  # assert rewriting comes first
from tests.support.abandoned import TELLTALE, AbandonedConnections  # noqa: E402  # assert rewriting comes first
from tests.support.judge import FreshDatabase  # noqa: E402  # assert rewriting comes first

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "abandons_connections: leaves connections to the garbage collector on purpose"
    )
    config.pluginmanager.register(optional.LeftOut(), "stanch-optional")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker("postgres")
        if item.get_closest_marker("abandons_connections") is not None:
            item.add_marker(pytest.mark.filterwarnings(f"ignore:.*{TELLTALE}:sqlalchemy.exc.SAWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deleted while still open:ResourceWarning"))


def pytest_collection_finish() -> None:
    # what was imported until here lives as long as the run: each test then collects only its own garbage
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """One server for the whole run. A test that stops, kills or freezes a server starts one of its own."""
    with EmbeddedPostgres(settings={"max_connections": 200}) as server:
        yield server


@pytest.fixture
def server_dsn(postgres: EmbeddedPostgres) -> Callable[[str | None], str]:
    """The URL of the server's own database, by driver; None gives libpq's form."""
    return postgres.url


@pytest.fixture
async def fresh_database(postgres: EmbeddedPostgres, anyio_backend: str) -> AsyncIterator[FreshDatabase]:
    """An empty database of this test's own, dropped at the end with whoever is still in it (about 80 ms)."""
    database = await FreshDatabase.create(postgres)
    try:
        yield database
    finally:
        await database.drop()


@pytest.fixture
def database_url(fresh_database: FreshDatabase) -> Callable[[str | None], str]:
    """The URL of the test's own database, by driver; None gives libpq's form."""
    return fresh_database.url


@pytest.fixture(params=["asyncpg", pytest.param("psycopg", marks=pytest.mark.psycopg)])
def driver(request: pytest.FixtureRequest) -> str:
    """Runs the test once on each PostgreSQL driver."""
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def _nothing_abandoned_by_its_module() -> Iterator[None]:
    yield
    gc.unfreeze()
    _fail_for(_abandoned_now())


@pytest.fixture(autouse=True)
def _nothing_abandoned(request: pytest.FixtureRequest) -> Iterator[None]:
    with AbandonedConnections() as abandoned:
        yield
    complaints = _abandoned_now()
    if request.node.get_closest_marker("abandons_connections") is None:
        _fail_for([*abandoned.complaints, *complaints])


def _abandoned_now() -> list[str]:
    """What is found to be left to the garbage collector, which then looks at nothing that is still in use.

    A test collects what is its own: to go through all that others keep each time took a tenth of the whole run.
    """
    with AbandonedConnections() as abandoned, warnings.catch_warnings(record=True, action="always") as warned:
        # recorded, because a warning raised inside the collector would be reported in the next test's name
        gc.collect()
    gc.freeze()
    return [*abandoned.complaints, *(str(warning.message) for warning in warned)]


def _fail_for(complaints: list[str]) -> None:
    if complaints:
        pytest.fail("left to the garbage collector:\n" + "\n".join(complaints))
