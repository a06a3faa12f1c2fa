"""The same shop on the hand-written pattern: a dependency that yields a session and commits after the ``yield``.

The models and the handlers are the very same; only the session layer differs, and it is written with care:
one engine for the app, a rollback for every error, a pool of the same size, a ping before each use.

Since FastAPI 0.118 the code after the ``yield`` runs when the reply has left (before, from 0.106 on, it ran
earlier: then commits that fail are answered well, and only the errors that the pattern cannot see are lost).
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker

from stanch.demo import shop
from stanch.fastapi import get_database, get_reader, get_session

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession


def make_app(engine: AsyncEngine) -> FastAPI:
    """The shop, with stanch's session dependencies overridden by the pattern, and nothing of stanch installed."""
    factory = async_sessionmaker(engine, expire_on_commit=False)

    async def commit_after_yield() -> AsyncIterator[AsyncSession]:
        async with factory() as session:
            try:
                yield session
                await session.commit()
            except BaseException:
                await session.rollback()
                raise

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        await engine.dispose()

    app = FastAPI(title="The shop, on the hand-written pattern", lifespan=lifespan)
    app.include_router(shop.router)
    overrides: dict[Any, Any] = app.dependency_overrides
    overrides[get_session] = overrides[get_reader] = commit_after_yield
    overrides[get_database] = lambda: SimpleNamespace(session_factory=factory)
    return app
