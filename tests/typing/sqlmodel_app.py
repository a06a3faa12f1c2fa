"""What a user of SQLModel writes, as a type checker sees it. Never run."""

from __future__ import annotations

from typing import assert_type

from fastapi import FastAPI
from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

from stanch import Database
from stanch.fastapi import install
from stanch.sqlmodel import ReaderDep, SessionDep, get_reader, get_session


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str


db = Database("postgresql+asyncpg://app@localhost/shop", session_class=AsyncSession)
app = FastAPI()
install(app, db)


@app.post("/heroes")
async def create(hero: Hero, session: SessionDep) -> Hero:
    assert_type(session, AsyncSession)
    session.add(hero)
    await session.flush()
    return hero


@app.get("/heroes")
async def heroes(session: ReaderDep) -> list[Hero]:
    return list(await session.exec(select(Hero)))


async def fake() -> AsyncSession:
    return db.session_factory()


app.dependency_overrides[get_session] = fake
app.dependency_overrides[get_reader] = fake
