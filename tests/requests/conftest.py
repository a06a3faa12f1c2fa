"""The shop, on one driver or on each."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from stanch.fastapi import install
from tests.requests.shop import SCHEMA, Shop
from tests.support import cleaned

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.support.judge import FreshDatabase

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database


@pytest.fixture
async def bare_shop(fresh_database: FreshDatabase) -> AsyncGenerator[Shop]:
    """The shop with nothing installed yet."""
    async with _opened(fresh_database, "asyncpg") as shop:
        yield shop


@pytest.fixture
async def shop(bare_shop: Shop) -> Shop:
    """The shop with stanch installed as the README says."""
    install(bare_shop.app, bare_shop.db)
    return bare_shop


@pytest.fixture
async def each_shop(fresh_database: FreshDatabase, driver: str) -> AsyncGenerator[Shop]:
    """As ``shop``, once on each driver."""
    async with _opened(fresh_database, driver) as shop:
        install(shop.app, shop.db)
        yield shop


@asynccontextmanager
async def _opened(judge: FreshDatabase, driver: str) -> AsyncGenerator[Shop]:
    await judge.execute(SCHEMA)
    shop = Shop(judge, driver=driver)
    try:
        yield shop
        await shop.assert_clean()
    finally:
        await shop.db.close()
