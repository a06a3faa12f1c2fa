"""What the bench measures is checked before it is measured; the check itself is checked here on planted subjects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from bench import shop
from bench.shop import Kind, Reply
from bench.subjects import BASELINE, OURS, SUBJECTS, Setting, Subject
from bench.verify import verify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PEERS = {"advanced-alchemy", "context-async", "context-async-asgi", "fastapi-async", "fastapi-toolsets"}
"""They live in an environment of their own, where `make bench` checks them in the same way."""


@pytest.fixture
async def prepared(fresh_database: FreshDatabase) -> FreshDatabase:
    engine = create_async_engine(fresh_database.url("asyncpg"))
    async with engine.begin() as connection:
        await shop.prepare(connection)
    await engine.dispose()
    return fresh_database


def test_each_is_called_as_it_is_found_and_the_guarded_are_among_them() -> None:
    assert all(name == subject.name for name, subject in SUBJECTS.items())
    assert {BASELINE, *OURS} <= SUBJECTS.keys()


async def test_all_that_need_no_peer_do_what_they_are_measured_for(
    driver: str, prepared: FreshDatabase
) -> None:
    subjects = [subject for name, subject in SUBJECTS.items() if name not in PEERS]
    here = [subject for subject in subjects if subject.needs() is None]
    assert {BASELINE, *OURS} <= {subject.name for subject in here}
    assert await verify(here, Setting(prepared.url(driver), pool_size=2)) == {}


def test_a_peer_that_is_not_installed_is_named_by_its_package() -> None:
    assert Subject("x", "x", SUBJECTS["bare"].build, package="no-such-thing").needs() == (
        "no-such-thing is not installed"
    )
    older = Subject("x", "x", SUBJECTS["bare"].build, package="sqlalchemy", since=(9, 1)).needs()
    assert older is not None
    assert older.endswith("9.1 or newer is needed")
    assert Subject("x", "x", SUBJECTS["bare"].build, package="sqlalchemy", since=(2, 0)).needs() is None


@dataclass
class Bad:
    """A by-hand subject with one thing wrong."""

    commits: bool = True
    says: str | None = None
    status: int = 200

    def build(self, setting: Setting) -> FastAPI:
        engine = create_async_engine(setting.url, **setting.pool)
        factory = async_sessionmaker(engine)

        async def get_db() -> AsyncIterator[AsyncSession]:
            async with factory() as session:
                yield session

        app = FastAPI()

        @app.post("/items/{number}", status_code=self.status)
        async def write(number: int, session: AsyncSession = Depends(get_db)) -> Reply:  # noqa: B008, FAST002  # local
            reply = await shop.write(session, number)
            if self.commits:
                await session.commit()
            await session.close()
            await engine.dispose()
            return reply if self.says is None else {**reply, "name": self.says}

        return app


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (Bad(), None),
        (Bad(commits=False), "stored Stored(items=0"),
        (Bad(says="old"), "'old' in place of 'new'"),
        (Bad(status=201), "was answered 201"),
    ],
    ids=["none", "drops the write", "answers something else", "another status"],
)
async def test_what_is_wrong_with_a_subject_is_found(
    bad: Any, complaint: str | None, prepared: FreshDatabase
) -> None:
    subject = Subject("planted", "planted", bad.build, frozenset({Kind.WRITE}))
    found = await verify([subject], Setting(prepared.url("asyncpg")))
    if complaint is None:
        assert found == {}
    else:
        assert complaint in found["planted"]


async def test_what_a_subject_raises_is_told_and_the_next_is_looked_at(prepared: FreshDatabase) -> None:
    def broken(setting: Setting) -> FastAPI:
        raise LookupError("no such thing")

    subjects = [Subject("broken", "broken", broken), SUBJECTS["bare"]]
    found = await verify(subjects, Setting(prepared.url("asyncpg")))
    assert found == {"broken": "LookupError('no such thing')"}
