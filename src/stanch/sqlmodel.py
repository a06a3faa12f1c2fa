"""``SessionDep`` and ``ReaderDep`` typed for SQLModel: sessions with ``.exec``.

For a ``Database(url, session_class=AsyncSession)`` with SQLModel's ``AsyncSession``. SQLModel's own tutorial
calls a *sync* session ``SessionDep``; this one is async, for ``async def`` endpoints.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from sqlmodel.ext.asyncio.session import AsyncSession

from stanch.errors import ConfigError
from stanch.fastapi import ReaderDep as PlainReaderDep, SessionDep as PlainSessionDep, session_giver

__all__ = ["ReaderDep", "SessionDep", "get_reader", "get_session"]


@session_giver
async def get_session(session: PlainSessionDep) -> AsyncSession:
    """The unit's session as SQLModel's class; ``ConfigError`` if the database makes sessions of another class."""
    return _as_sqlmodel(session)


@session_giver
async def get_reader(session: PlainReaderDep) -> AsyncSession:
    """The same for reading."""
    return _as_sqlmodel(session)


SessionDep = Annotated[AsyncSession, Depends(get_session)]
"""The unit's session, with ``.exec``."""

ReaderDep = Annotated[AsyncSession, Depends(get_reader)]
"""The unit's session for reading, with ``.exec``."""


def _as_sqlmodel(session: object) -> AsyncSession:
    if isinstance(session, AsyncSession):
        return session
    raise ConfigError(
        f"stanch.sqlmodel: the database makes sessions of class {type(session).__name__}, which has no exec()",
        remedies=[
            "Write Database(url, session_class=AsyncSession) with sqlmodel.ext.asyncio.session.AsyncSession.",
            "Or import SessionDep from stanch.fastapi.",
        ],
    )
