"""One database for a whole module, emptied between its tests: a tenth of the price of a fresh one.

    fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

in a test module takes the place of the ``fresh_database`` of ``conftest.py``.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.judge import OTHERS, FreshDatabase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stanch.embedded import EmbeddedPostgres

FORGETS_A_FUTURE = tuple(int(part) for part in version("asyncpg").split(".")[:2]) < (0, 32)
"""asyncpg then leaves a future behind when its connect is cancelled: a line in the log, and nothing else."""

EMPTY = "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
SEND_AWAY = f"SELECT pg_terminate_backend(pid, 5000) FROM {OTHERS}"


@pytest.fixture(scope="module")
async def module_database(postgres: EmbeddedPostgres, anyio_backend: str) -> AsyncIterator[FreshDatabase]:
    database = await FreshDatabase.create(postgres)
    try:
        yield database
    finally:
        await database.drop()


@pytest.fixture
async def fresh_database(module_database: FreshDatabase) -> AsyncIterator[FreshDatabase]:
    yield module_database
    await module_database.fetch(SEND_AWAY)
    await module_database.execute(f'{EMPTY}; ALTER DATABASE "{module_database.name}" RESET ALL')


@pytest.fixture
async def forgetful_driver(anyio_backend: str) -> AsyncIterator[None]:
    """For tests that cancel connects: lets an older asyncpg forget its future, and only that."""
    loop = asyncio.get_running_loop()
    strict = loop.get_exception_handler()

    def lenient(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        kind = type(context.get("exception")).__name__
        if not (FORGETS_A_FUTURE and kind == "ConnectionDoesNotExistError") and strict is not None:
            strict(loop, context)

    loop.set_exception_handler(lenient)
    yield
    loop.set_exception_handler(strict)
