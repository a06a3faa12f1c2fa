"""Two endpoints for whoever watches a shop from outside; they are no part of the shop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastapi import APIRouter
from sqlalchemy import func, select

from stanch.fastapi import SessionDep  # noqa: TC001  # FastAPI evaluates annotations at run time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HOLD: Final = "/demo/hold"
POOL: Final = "/demo/pool"


def make_router(counts: Callable[[], Mapping[str, int]]) -> APIRouter:
    """``/demo/pool`` says what *counts* says; ``/demo/hold`` keeps one connection busy for some seconds."""
    router = APIRouter(include_in_schema=False)

    @router.get(POOL)
    async def pool() -> Any:
        return counts()

    @router.get(HOLD)
    async def hold(session: SessionDep, seconds: float = 1.0) -> None:
        await session.execute(select(func.pg_sleep(seconds)))

    return router
