"""What a user writes in a FastAPI app, as a type checker sees it. Never run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, assert_type

from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import Database, rollback_only
from stanch.fastapi import (
    DatabaseDep,
    ReaderDep,
    SessionDep,
    UnitMiddleware,
    add_exception_handlers,
    get_database,
    get_reader,
    get_session,
    install,
    provide_session,
    unit,
)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


db = Database("postgresql+asyncpg://app@localhost/shop")
billing = Database("postgresql+psycopg://app@localhost/billing", name="billing")

app = FastAPI()
install(app, db, billing, commit_mode="manual", unsaved="raise", wait=30.0)

partly = FastAPI(lifespan=db.lifespan)
install(partly, db, lifespan=False, exception_handlers=False)
add_exception_handlers(partly)

bare = FastAPI()
bare.add_middleware(UnitMiddleware, databases=[db])

router = APIRouter()


async def current_user(session: ReaderDep) -> User:
    assert_type(session, AsyncSession)
    return (await session.scalars(select(User))).one()


CurrentUser = Annotated[User, Depends(current_user)]
BillingDep = Annotated[AsyncSession, Depends(provide_session("billing"))]
StrictDep = Annotated[
    AsyncSession, Depends(provide_session(billing, commit_mode="manual", isolation_level="SERIALIZABLE"))
]
OldDep = Annotated[AsyncSession, Depends(provide_session(read_only=True))]


@router.post("/users", status_code=201)
async def create(name: str, user: CurrentUser, session: SessionDep, bills: BillingDep) -> dict[str, int]:
    assert_type(session, AsyncSession)
    assert_type(bills, AsyncSession)
    assert_type(user, User)
    new = User(name=name)
    session.add(new)
    await session.flush()
    rollback_only(session)
    return {"id": new.id}


@router.get("/users")
@unit(commit_mode="auto", isolation_level="REPEATABLE READ", read_only=True)
async def show(session: ReaderDep, strict: StrictDep, old: OldDep) -> list[str]:
    assert_type(strict, AsyncSession)
    assert_type(old, AsyncSession)
    return list(await session.scalars(select(User.name)))


@router.get("/jobs")
async def job(database: DatabaseDep) -> int:
    assert_type(database, Database[AsyncSession])
    async with database.transaction() as session:
        return int(await session.scalar(text("SELECT 1")) or 0)


@router.get("/stream")
async def stream(session: SessionDep) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        async for name in await session.stream_scalars(select(User.name)):
            yield name

    return StreamingResponse(lines())


@router.websocket("/socket")
async def socket(websocket: WebSocket, session: SessionDep) -> None:
    assert_type(session, AsyncSession)
    await websocket.accept()
    async with session.begin():
        await session.execute(text("SELECT 1"))


@unit(commit_mode="manual")
async def by_hand(session: SessionDep, number: int) -> str:
    await session.commit()
    return str(number)


async def decorated_keeps_its_type(session: AsyncSession) -> None:
    assert_type(await by_hand(session, 1), str)


# Overrides, as in a test of the user's --------------------------------------------------------------------------


async def fake_session() -> AsyncIterator[AsyncSession]:
    async with db.session() as session:
        yield session


async def fake_database() -> Database[AsyncSession]:
    return db


app.dependency_overrides[get_session] = fake_session
app.dependency_overrides[get_reader] = fake_session
app.dependency_overrides[get_database] = fake_database
app.dependency_overrides[provide_session("billing")] = fake_session
app.include_router(router)


def mistakes() -> None:
    install(app, db, commit_mode="always")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # no such mode
    provide_session(commit_mode="never")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # likewise
    unit(comit_mode="auto")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]  # misspelt
