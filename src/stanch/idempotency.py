"""``IdempotencyKey``: a request that is repeated with its key has its effect once, and gets its first reply again.

The record of the reply is a row in the transaction of the work itself. So it is exactly as durable as the work:
after a crash, a failover or a lost answer to COMMIT either both are there or neither is.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, cast

from fastapi import Depends, Header
from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    delete,
    event,
    func,
    literal,
    select,
)
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.datastructures import UploadFile
from starlette.requests import Request

from stanch.asgi import record, unit_of
from stanch.database import Database
from stanch.errors import (
    ConfigError,
    IdempotencyInProgress,
    IdempotencyKeyInvalid,
    IdempotencyKeyReused,
    UnitConflict,
)
from stanch.fastapi import provide_session
from stanch.recording import Recording, Replay, Replayed, StoredReply
from stanch.sessions import GuardedSession, guard_of
from stanch.unit import Unit

__all__ = ["IdempotencyKey", "idempotency_table", "purge"]

HEADER: Final = "Idempotency-Key"
MAX_BODY: Final = 1 << 20
"""Bytes of a reply that are recorded, unless a route says otherwise."""

_LONGEST: Final = 255
_VISIBLE: Final = range(0x21, 0x7F)
_ANYBODY: Final = object()
_COLUMNS: Final = frozenset(
    {"scope", "caller", "key", "fingerprint", "status", "headers", "body", "created_at"}
)


# The table ------------------------------------------------------------------------------------------------


def idempotency_table(
    metadata: MetaData, name: str = "stanch_idempotency", *, schema: str | None = None
) -> Table:
    """The table of the records, in your own *metadata*: your migrations make it, stanch does not.

    One row for each key that was used with success, about the size of the reply. ``purge`` removes old ones.

    >>> idempotency_table(MetaData()).name
    'stanch_idempotency'
    """
    return Table(
        name,
        metadata,
        Column("scope", Text, primary_key=True),
        Column("caller", String(64), primary_key=True),
        Column("key", String(_LONGEST), primary_key=True),
        Column("fingerprint", String(64), nullable=False),
        Column("status", Integer, nullable=False),
        Column("headers", Text, nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now(), index=True),
        schema=schema,
    )


async def purge(where: AsyncSession | Database[Any], table: Table, *, older_than: timedelta) -> int:
    """Forget the keys that were used longer ago than *older_than*, by the server's clock; returns how many.

    In a transaction of its own on a ``Database``, in the caller's on a session. A client that repeats a forgotten
    key has its effect a second time, so keep them for longer than any client tries.
    """
    if older_than <= timedelta():
        raise ConfigError(
            f"purge: older_than must be a positive length of time, got {older_than}",
            remedies=["Write older_than=timedelta(days=2)."],
        )
    if isinstance(where, Database):
        async with where.transaction() as session:
            return await purge(session, table, older_than=older_than)
    now = cast("datetime", await where.scalar(select(func.now())))
    result = await where.execute(delete(table).where(table.c.created_at < now - older_than))
    return cast("CursorResult[Any]", result).rowcount


# The dependency -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A dependency that makes a route safe to repeat: ``dependencies=[Depends(IdempotencyKey(table))]``.

    The client sends a header ``Idempotency-Key``: 1 to 255 visible ASCII characters, new for each thing it wants
    done, the same when it tries that again. Guaranteed, in a unit with ``commit_mode="auto"``:

    - the work of the unit and the record of its reply are one transaction of one database;
    - the same request with the same key gets the recorded status and body and the header
      ``Idempotent-Replayed: true``; the endpoint and the dependencies after this one do not run;
    - another request under the same key is refused with 422, one that is still being worked on with 409 and
      ``Retry-After`` (on SQLite, where writers take turns, it waits instead);
    - of several at once with one key exactly one has its effect.

    A reply of 400 or more stores nothing, hence is not recorded either. A reply that is recorded is held back until
    it is whole: at most *max_body* bytes, no streams (``ReplyNotRecordable``, 500, nothing is stored). A commit by hand
    in the endpoint is refused (``UnitConflict``): it would part the work from its record.

    Keys belong to a route (its method and template). *caller*, a FastAPI dependency that returns a ``str`` or an
    ``int``, makes them belong to one user of it as well: without it whoever knows a key and the request that it was
    sent with is given the reply. It runs first, so it is also where a caller who may not ask is refused.

    With ``required=False`` a request without a key runs unrecorded, else it is refused with 400. The dependency
    gives the key, or None. *database* is one of those installed, or its name. Not covered is what the route does
    outside the unit: mails, other services, ``db.transaction()``.

    >>> keys = idempotency_table(MetaData())
    >>> IdempotencyKey(keys) == IdempotencyKey(keys)
    True
    """

    table: Table
    database: Database[Any] | str | None = None
    required: bool = True
    max_body: int = MAX_BODY
    caller: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not _is_table_of_keys(self.table):
            raise ConfigError(
                "IdempotencyKey: the first argument must be a table made by idempotency_table()",
                remedies=["Write keys = idempotency_table(Base.metadata), then IdempotencyKey(keys)."],
            )
        max_body: Any = self.max_body
        if not isinstance(max_body, int) or isinstance(max_body, bool) or max_body < 1:
            raise ConfigError(
                f"IdempotencyKey: max_body must be a number of bytes, got {max_body!r}",
                remedies=[f"The default is {MAX_BODY}."],
            )

    @property
    def __signature__(self) -> inspect.Signature:
        """What FastAPI reads: the header for the API's description, and the caller as a dependency that runs first."""
        described = Header(alias=HEADER, description="Repeat a request with the same key to be safe.")
        parameters = {"request": Request, "idempotency_key": Annotated[str | None, described]}
        if self.caller is not None:
            parameters["caller"] = Annotated[Any, Depends(self.caller)]
        return inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    annotation=kind,
                    default=None if name == "idempotency_key" else inspect.Parameter.empty,
                )
                for name, kind in parameters.items()
            ]
        )

    async def __call__(
        self, *, request: Request, caller: object = _ANYBODY, **_described: object
    ) -> str | None:
        """Claim the request's key, or raise what answers it."""
        key = _key_of(request, required=self.required)
        if key is None:
            return None
        session: AsyncSession = await provide_session(self.database)(request)
        unit = unit_of(request.scope)
        database = unit.database(self.database)
        _refuse_manual(unit, database)
        entry = _Entry(
            self.table, _scope_of(request, unit), _caller(caller), key, await _fingerprint(request), session
        )
        stored = await entry.claim()
        if stored is not None:
            # Also what dependencies before this one have done now: it was done the first time.
            guard_of(session).rollback_only = True
            record(request.scope, Replay(stored))
            raise Replayed(stored.status, "recorded")  # its own word: not every status has one

        async def save(reply: StoredReply) -> None:
            await unit.vacate(database)
            _refuse_several(unit, database)
            await entry.save(reply)

        bar = session.sync_session
        event.listen(bar, "before_commit", _refuse_commit)
        record(
            request.scope,
            Recording(
                route=unit.holder,
                max_body=self.max_body,
                save=save,
                unbar=lambda: _unbar(bar),
            ),
        )
        return key


@dataclass(frozen=True, slots=True, repr=False)
class _Entry:
    """One key of one caller on one route."""

    table: Table
    scope: str
    caller: str
    key: str
    fingerprint: str
    session: AsyncSession

    async def claim(self) -> StoredReply | None:
        """The recorded reply, or None and the right to do the work, which lasts as long as the transaction.

        Two statements on purpose: only one that begins after the lock was granted sees what its last holder has
        committed.
        """
        if self.session.get_bind().dialect.name == "postgresql":
            granted = await self.session.scalar(
                select(func.pg_try_advisory_xact_lock(literal(self._lock(), BigInteger)))
            )
            if not granted:
                raise _in_progress(self.scope)
        columns = self.table.c
        found = await self.session.execute(
            select(columns.fingerprint, columns.status, columns.headers, columns.body).where(
                columns.scope == self.scope, columns.caller == self.caller, columns.key == self.key
            )
        )
        row = found.one_or_none()
        if row is None:
            return None
        if row.fingerprint != self.fingerprint:
            raise IdempotencyKeyReused(
                f"{self.scope}: another request was made with this Idempotency-Key before",
                remedies=[
                    "The client makes a new key for each thing it wants done, a random UUID for instance.",
                    "The client sends the very same body again when it repeats a request.",
                ],
            )
        return StoredReply.from_row(row.status, row.headers, row.body)

    async def save(self, reply: StoredReply) -> None:
        """Add the record to the transaction of the work."""
        await self.session.flush()  # the work's own conflicts are not ours to name
        try:
            await self.session.execute(
                self.table.insert().values(
                    scope=self.scope,
                    caller=self.caller,
                    key=self.key,
                    fingerprint=self.fingerprint,
                    status=reply.status,
                    headers=reply.headers_as_text(),
                    body=reply.body,
                )
            )
        except IntegrityError:
            # An older snapshot, or a lock that ended with a rollback by hand: the primary key has the last word.
            raise _in_progress(self.scope) from None

    def _lock(self) -> int:
        name = f"{self.table.fullname}\0{self.scope}\0{self.caller}\0{self.key}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)


# Private --------------------------------------------------------------------------------------------------


def _is_table_of_keys(table: object) -> bool:
    return isinstance(table, Table) and {column.name for column in cast("Table", table).columns} >= _COLUMNS


def _key_of(request: Request, *, required: bool) -> str | None:
    values = request.headers.getlist(HEADER)
    if not values and not required:
        return None
    if len(values) == 1 and 1 <= len(values[0]) <= _LONGEST and all(ord(c) in _VISIBLE for c in values[0]):
        return values[0]
    found = f"{len(values)} of them" if len(values) != 1 else f"one of {len(values[0])} characters"
    raise IdempotencyKeyInvalid(
        f"{request.method}: expected one {HEADER} of 1 to {_LONGEST} visible ASCII characters, got {found}",
        remedies=[
            "The client makes a random UUID for each thing it wants done, and repeats it with a retry."
        ],
    )


def _scope_of(request: Request, unit: Unit) -> str:
    """Method and template of the route; of an app that is mounted, below the place where it is."""
    method, _, template = unit.holder.partition(" ")
    return f"{method} {request.scope.get('root_path', '')}{template}"


def _caller(identity: object) -> str:
    """Its digest: bounded, and no name or address of a person lies in the table."""
    if identity is _ANYBODY:
        return ""
    if isinstance(identity, (str, int)) and not isinstance(identity, bool) and identity != "":
        return hashlib.sha256(str(identity).encode()).hexdigest()
    raise ConfigError(
        f"IdempotencyKey: caller must give an int or a str that is not empty, got {type(identity).__name__}",
        remedies=["Return what names the user, such as user.id; refuse a caller who is nobody with a 401."],
    )


async def _fingerprint(request: Request) -> str:
    """What makes two requests the same: method, path, query and body."""
    scope = request.scope
    parts = [request.method.encode(), scope["path"].encode(), scope["query_string"]]
    try:
        parts.append(await request.body())
    except RuntimeError:  # FastAPI has read it as a form already, which it keeps
        for name, value in (await request.form()).multi_items():
            parts += [name.encode(), *await _parts_of_field(value)]
    # Each with its length, so that no two lists of parts look alike.
    return hashlib.sha256(b"".join(len(part).to_bytes(8) + part for part in parts)).hexdigest()


async def _parts_of_field(value: UploadFile | str) -> list[bytes]:
    if isinstance(value, str):
        return [value.encode()]
    content = await value.read()
    await value.seek(0)
    return [(value.filename or "").encode(), content]


def _in_progress(scope: str) -> IdempotencyInProgress:
    return IdempotencyInProgress(
        f"{scope}: a request with this Idempotency-Key is being worked on at this moment",
        remedies=["The client waits for Retry-After seconds and repeats the request with the same key."],
    )


def _refuse_manual(unit: Unit, database: Database[Any]) -> None:
    if not unit.will_commit(database):
        raise UnitConflict(
            f"{unit.holder} has an IdempotencyKey, but commit_mode 'manual'",
            remedies=[
                "Put @unit(commit_mode='auto') on the endpoint: the record is committed with the work."
            ],
        )


def _refuse_several(unit: Unit, database: Database[Any]) -> None:
    others = [name for name in unit.committing() if name != database.name]
    if others:
        raise UnitConflict(
            f"{unit.holder} has an IdempotencyKey in database {database.name!r}, but has also written to"
            f" {', '.join(map(repr, others))}",
            remedies=["Write to one database under a key: two cannot commit as one."],
        )


def _refuse_commit(session: Session) -> None:
    if session.in_nested_transaction():
        return  # a savepoint
    assert isinstance(session, GuardedSession)
    raise UnitConflict(
        f"{session.guard.holder} has an IdempotencyKey, but commits by hand",
        remedies=[
            "Leave the commit to the unit: it stores the record of the reply with the work.",
            "Use async with atomic(session) for a part that may fail.",
        ],
    )


def _unbar(session: Session) -> None:
    if event.contains(session, "before_commit", _refuse_commit):
        event.remove(session, "before_commit", _refuse_commit)
