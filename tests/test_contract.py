"""The private names of other libraries that stanch stands on still are what we rely on.

Runs, with all the other tests, on the oldest and on the newest SQLAlchemy, Starlette and drivers we support. A name
that moved fails here by name, before anything else fails in a riddle.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import ast
import asyncio
import inspect
import threading
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool, base
from sqlalchemy.util import await_only, greenlet_spawn

import stanch
from stanch import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = Path(stanch.__file__).parent


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def positional(function: Callable[..., Any]) -> list[str]:
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return [name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds]


def calls(function: Callable[..., Any]) -> set[str]:
    """The names of attributes that *function* uses."""
    tree = ast.parse(dedent(inspect.getsource(function)))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def has_events(engine: Any) -> bool:
    return bool(engine._has_events)


# pool.py ----------------------------------------------------------------------------------------------------


def test_a_record_refers_weakly_to_what_it_has_lent_until_that_is_returned() -> None:
    """Ours replaces the attribute by a property, which sees whether that was dead when it is taken back."""
    assert (
        "fairy_ref" in vars(base._ConnectionRecord) or "fairy_ref" in base._ConnectionRecord.__annotations__
    )
    assert "fairy_ref" in calls(base._ConnectionRecord.checkin)
    assert "fairy_ref" in calls(base._ConnectionFairy.detach)
    engine = create_engine("sqlite://", poolclass=QueuePool)
    with engine.connect() as connection:
        record: Any = connection.connection._connection_record
        assert record.fairy_ref() is connection.connection
    assert record.fairy_ref is None
    engine.dispose()


def test_pool_has_the_doors_that_ours_replaces() -> None:
    assert parameters(Pool._do_get) == ["self"]
    assert parameters(Pool._do_return_conn) == ["self", "record"]
    assert parameters(Pool._invalidate) == ["self", "connection", "exception", "_checkin"]
    assert parameters(Pool._close_connection) == ["self", "connection", "terminate"]
    assert parameters(Pool.recreate) == parameters(Pool.dispose) == parameters(Pool.status) == ["self"]
    assert {"creator", "pre_ping", "reset_on_return", "dialect", "_dispatch"} <= set(
        parameters(Pool.__init__)
    )


def test_pool_has_the_attributes_that_ours_takes_over() -> None:
    pool = QueuePool(lambda: None, pool_size=3, max_overflow=4, timeout=5, recycle=6, pre_ping=True)  # type: ignore[arg-type]  # never called
    names = [
        "_creator",
        "_invoke_creator",
        "_dialect",
        "_reset_on_return",
        "_recycle",
        "_pre_ping",
        "_timeout",
        "_max_overflow",
    ]
    assert [name for name in names if not hasattr(pool, name)] == []
    assert (pool._recycle, pool._pre_ping, pool._timeout, pool._max_overflow) == (6, True, 5, 4)
    assert (pool.size(), pool.checkedin(), pool.checkedout()) == (3, 0, 0)
    assert {each.name for each in base.ResetStyle} >= {"reset_none", "reset_rollback"}
    assert issubclass(AsyncAdaptedQueuePool, QueuePool)
    assert not issubclass(NullPool, QueuePool)


def test_connection_record_can_be_made_unconnected_and_connects_when_asked() -> None:
    opened: list[str] = []

    class Fake:
        def close(self) -> None:
            opened.append("closed")

    def connect() -> Any:
        opened.append("opened")
        return Fake()

    record = base._ConnectionRecord(NullPool(connect), connect=False)
    assert opened == []
    assert record.dbapi_connection is None
    record.close()
    assert opened == [], "closing what was never open is nothing"
    assert isinstance(record.get_connection(), Fake)
    assert isinstance(record.driver_connection, Fake)
    assert opened == ["opened"]
    record.info["left"] = 1
    record.close()
    assert opened == ["opened", "closed"]
    assert record.dbapi_connection is None


def test_engine_pool_is_an_attribute_and_dispose_asks_recreate() -> None:
    engine = create_engine("sqlite://")
    asked: list[str] = []

    class Ours(NullPool):
        def recreate(self) -> NullPool:
            asked.append("recreate")
            return self

        def dispose(self) -> None:
            asked.append("dispose")

    ours = Ours(engine.pool._creator, _dispatch=engine.pool.dispatch)
    engine.pool = ours
    engine.dispose()
    assert asked == ["dispose", "recreate"]
    assert engine.pool is ours
    engine.dispose(close=False)
    assert asked == ["dispose", "recreate", "recreate"]


def test_async_engine_is_of_one_kind_with_any_pool() -> None:
    assert create_async_engine("sqlite+aiosqlite://", poolclass=NullPool).sync_engine.dialect.is_async


# seams.py ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["do_commit", "do_rollback"])
def test_dialect_ends_transactions_by_a_method_of_one_argument(name: str) -> None:
    assert len(positional(getattr(DefaultDialect, name))) == 2
    assert hasattr(Dialect, name)


def test_dialect_pings_by_a_method_of_one_argument() -> None:
    assert len(positional(DefaultDialect.do_ping)) == 2


def test_every_end_passes_the_dialect_of_the_instance() -> None:
    engine = create_engine("sqlite://")
    seen: list[str] = []
    commit, rollback = engine.dialect.do_commit, engine.dialect.do_rollback

    def do_commit(connection: Any) -> None:
        seen.append("commit")
        commit(connection)

    def do_rollback(connection: Any) -> None:
        seen.append("rollback")
        rollback(connection)

    dialect: Any = engine.dialect
    dialect.do_commit, dialect.do_rollback = do_commit, do_rollback  # what seams.py does
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
        seen.clear()  # the first connection of an engine is looked at, and rolled back
    assert seen[0] == "commit"
    with Session(engine) as session:
        for end in (session.commit, session.rollback):
            session.execute(text("SELECT 1"))
            seen.clear()
            end()
            assert seen[0] == end.__name__
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        seen.clear()
    assert "rollback" in seen
    assert not has_events(engine), "replacing them sets no events"


def test_handle_error_costs_no_events_and_knows_what_we_ask() -> None:
    engine = create_engine("sqlite://")
    event.listen(engine, "handle_error", lambda *_args: None)
    event.listen(engine, "do_connect", lambda *_args: None)
    assert not has_events(engine)
    event.listen(engine, "before_cursor_execute", lambda *_args: None)
    assert has_events(engine), "a statement listener would"
    known = set(ExceptionContext.__annotations__)
    assert {
        "connection", "is_disconnect", "invalidate_pool_on_disconnect", "original_exception", "sqlalchemy_exception"
    } <= known  # fmt: skip


# sessions.py ------------------------------------------------------------------------------------------------


def test_session_has_the_funnels_that_ours_guards() -> None:
    assert parameters(Session._autobegin_t) == ["self", "begin"]
    assert positional(Session._execute_internal)[:3] == ["self", "statement", "params"]
    assert parameters(Session._flush) == ["self", "objects"]
    assert parameters(Session._connection_for_bind)[:3] == ["self", "engine", "execution_options"]
    assert parameters(SessionTransaction._connection_for_bind) == ["self", "bind", "execution_options"]
    assert parameters(Session._bulk_save_mappings)[:3] == ["self", "mapper", "mappings"]
    assert parameters(Session._is_clean) == parameters(Session._autoflush) == ["self"]
    assert "_is_clean" in calls(Session.flush)
    assert calls(Session._is_clean) == {"identity_map", "check_modified", "_deleted", "_new"}
    assert calls(type(Session().identity_map).check_modified) - {"bool"} == {"_modified"}
    assert calls(Session.in_transaction) == {"_transaction"}
    assert {"autobegin", "close_resets_only"} <= set(parameters(Session.__init__))
    assert "sync_session_class" in parameters(AsyncSession.__init__)


@pytest.mark.parametrize("way", ["execute", "scalar", "scalars"])
def test_every_statement_passes_execute_internal(way: str) -> None:
    assert "_execute_internal" in calls(getattr(Session, way))


@pytest.mark.parametrize("way", ["bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"])
def test_every_bulk_write_passes_bulk_save_mappings(way: str) -> None:
    assert "_bulk_save_mappings" in calls(getattr(Session, way))


def test_statement_takes_its_connection_by_connection_for_bind() -> None:
    assert "_connection_for_bind" in calls(Session._execute_internal)
    assert "_connection_for_bind" in calls(Session.connection) | calls(Session._connection_for_bind)
    assert "_flush" in calls(Session.flush)


def test_session_transaction_knows_what_it_holds() -> None:
    engine = create_engine("sqlite://")
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        transaction = session.get_transaction()
        assert isinstance(transaction, SessionTransaction)
        assert transaction.parent is None
        for entry in transaction._connections.values():
            connection, _, _, autoclose = entry
            assert isinstance(connection, Connection)
            assert autoclose is True, "the fourth says whether the session opened it"
    with engine.connect() as own, Session(own) as session:
        session.execute(text("SELECT 1"))
        transaction = session.get_transaction()
        assert transaction is not None
        assert {entry[3] for entry in transaction._connections.values()} == {False}


def test_a_connection_that_may_begin_nothing_by_itself_begins_nothing() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        connection._allow_autobegin = False
        assert connection.scalar(text("SELECT 1")) == 1
        assert not connection.in_transaction()
        with connection.begin():
            assert connection.in_transaction(), "whoever begins one has it"
    with engine.connect() as connection:
        connection.scalar(text("SELECT 1"))
        assert connection.in_transaction()


def test_a_transaction_is_prepared_while_its_commit_is_sent() -> None:
    engine = create_engine("sqlite://")
    states: list[object] = []
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        transaction = session.get_transaction()
        assert transaction is not None

        def look(_connection: Connection) -> None:
            states.append(transaction._state)

        event.listen(engine, "commit", look)
        states.append(transaction._state)
        session.commit()
    assert states == [SessionTransactionState.ACTIVE, SessionTransactionState.PREPARED]


def test_a_transaction_is_committed_when_its_commit_closes_it_and_at_no_other_time() -> None:
    engine = create_engine("sqlite://")
    states: list[object] = []

    class Ours(SessionTransaction):
        def close(self, invalidate: bool = False) -> None:
            states.append(self._state)
            super().close(invalidate)

    with Session(engine) as session:
        for end in (session.commit, session.rollback, session.close):
            session.execute(text("SELECT 1"))
            transaction = session.get_transaction()
            assert transaction is not None
            transaction.__class__ = Ours
            end()
    assert states[0] is SessionTransactionState.COMMITTED
    assert SessionTransactionState.COMMITTED not in states[1:]
    assert len(states) == 3


def test_end_of_the_root_is_told_after_the_connection_is_back() -> None:
    engine = create_engine("sqlite://")
    ends: list[tuple[bool, bool]] = []

    class Ours(Session):
        pass

    @event.listens_for(Ours, "after_transaction_end", propagate=True)
    def ended(_session: Session, transaction: SessionTransaction) -> None:
        ends.append((transaction.parent is None, transaction.is_active))

    with Ours(engine) as session:
        with session.begin_nested():
            session.execute(text("SELECT 1"))
        session.commit()
    assert [root for root, _ in ends][-1] is True
    assert [root for root, _ in ends].count(True) == 1
    assert not has_events(engine)


# Concurrency ------------------------------------------------------------------------------------------------


def test_greenlets_are_told_apart_from_plain_code() -> None:
    from sqlalchemy.util.concurrency import in_greenlet

    async def main() -> tuple[bool, bool, int]:
        inside = await greenlet_spawn(in_greenlet)
        answer = await greenlet_spawn(lambda: await_only(asyncio.sleep(0, 42)))
        return in_greenlet(), inside, answer

    assert asyncio.run(main()) == (False, True, 42)


def test_stack_of_a_greenlet_ends_and_goes_on_in_its_parent() -> None:
    from greenlet import getcurrent  # type: ignore[import-untyped]  # its stubs are a package of their own

    def inside() -> list[str]:
        frame = inspect.currentframe()
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
        parent = getcurrent().parent
        assert parent is not None
        outer = parent.gr_frame
        names: list[str] = []
        while outer is not None:
            names.append(outer.f_code.co_name)
            outer = outer.f_back
        return names

    async def the_task() -> list[str]:
        return await greenlet_spawn(inside)

    assert "the_task" in asyncio.run(the_task())


# completion.py ----------------------------------------------------------------------------------------------


def test_anyio_tells_whether_a_scope_is_open_around_a_task() -> None:
    import anyio.lowlevel

    backend: Any = import_module("anyio._backends._asyncio")
    found: dict[str, bool] = {}

    def look(where: str) -> None:
        state = backend._task_states.get(asyncio.current_task())
        found[where] = state is not None and state.cancel_scope is not None

    async def child() -> None:
        look("in a child")
        await anyio.lowlevel.checkpoint()
        look("in a child that has waited")

    async def stranger() -> None:
        look("in a task of asyncio's own")

    async def tour() -> None:
        look("before")
        with anyio.CancelScope():
            look("in a scope")
            with anyio.CancelScope():
                await anyio.lowlevel.checkpoint()
            look("in the outer of two")
            await asyncio.create_task(stranger())
        look("after")
        async with anyio.create_task_group() as group:
            group.start_soon(child)
            look("in a group")
        with anyio.move_on_after(10):
            look("with a timeout")
            await anyio.lowlevel.checkpoint()
        look("in the end")

    asyncio.run(tour())
    assert found == {
        "before": False,
        "in a scope": True,
        "in the outer of two": True,
        "in a task of asyncio's own": False,
        "after": False,
        "in a child": True,
        "in a child that has waited": True,
        "in a group": True,
        "with a timeout": True,
        "in the end": False,
    }


# asgi.py ----------------------------------------------------------------------------------------------------


def test_starlette_wraps_an_app_with_the_handlers_of_its_scope() -> None:
    from starlette._exception_handler import wrap_app_handling_exceptions
    from starlette.applications import Starlette
    from starlette.middleware.exceptions import ExceptionMiddleware

    assert len(positional(wrap_app_handling_exceptions)) == 2
    assert "starlette.exception_handlers" in inspect.getsource(ExceptionMiddleware.__call__)
    app = Starlette()
    assert app.middleware_stack is None, "not built before the first request"
    assert isinstance(app.user_middleware, list)
    assert hasattr(app.router, "lifespan_context")


# asyncpg, psycopg, aiosqlite --------------------------------------------------------------------------------


def test_asyncpg_has_what_our_probe_and_severing_use() -> None:
    protocol: Any = import_module("asyncpg.protocol.protocol")
    assert callable(protocol.PreparedStatementState.attach)
    assert callable(protocol.BaseProtocol.close_statement)
    asyncpg: Any = import_module("asyncpg")
    assert parameters(asyncpg.Connection._cancel_current_command)[:2] == ["self", "waiter"]
    slots = {"_transport", "_protocol", "_top_xact", "_addr", "_params", "_config"}
    assert slots <= set(asyncpg.Connection.__slots__)
    assert "command_timeout" in asyncpg.connect_utils._ClientConfiguration._fields
    connect = import_module("asyncpg.connect_utils")
    import_module("stanch.drivers.asyncpg")
    asks = inspect.getsource(connect._create_ssl_connection)
    assert "TLSUpgradeProto(" in asks
    assert "await pr.on_data" in asks
    theirs = connect.TLSUpgradeProto.__base__
    assert theirs.__module__ == connect.__name__, "ours is put in the place of theirs"
    assert "self.on_data.set_exception(exc)" in inspect.getsource(theirs.connection_lost)
    told = ["loop", "addr", "params", "backend_pid", "backend_secret"]
    assert parameters(asyncpg.connect_utils._cancel) == told
    assert {"backend_pid", "backend_secret"} <= calls(asyncpg.Connection._cancel)
    transaction = inspect.getsource(import_module("asyncpg.transaction"))
    assert "COMMIT;" in transaction
    assert "con._top_xact = self" in transaction
    assert "query = 'BEGIN'" in transaction


@pytest.mark.psycopg
def test_psycopg_has_what_our_severing_uses() -> None:
    import psycopg
    from psycopg import waiting

    assert isinstance(inspect.getattr_static(psycopg.AsyncConnection, "closed"), property)
    assert callable(psycopg.AsyncConnection.fileno)
    assert "self.lock" in inspect.getsource(psycopg.AsyncConnection.__init__)
    assert callable(psycopg.pq.PGconn.finish)
    assert callable(psycopg.pq.PGconn.get_cancel)
    assert {"cancel_conn", "start", "cancel"} <= calls(psycopg.AsyncConnection._cancel_gen)
    assert parameters(waiting.wait_conn_async)[:2] == ["gen", "interval"]


@pytest.mark.psycopg
def test_psycopg_switches_autocommit_by_an_attribute_of_an_idle_connection() -> None:
    import psycopg

    assert {"_check_intrans_gen", "_autocommit"} == calls(psycopg.AsyncConnection._set_autocommit_gen) - {
        "bool"
    }
    assert "_autocommit" in calls(psycopg.AsyncConnection._start_query)
    assert "_pipeline" in calls(psycopg.AsyncConnection._check_intrans_gen)


def test_asyncpg_prepares_every_statement_where_ours_listens_and_counts_what_it_executes() -> None:
    asyncpg: Any = import_module("asyncpg")
    connection = asyncpg.Connection
    assert inspect.iscoroutinefunction(connection._get_statement)
    source = inspect.getsource(connection)
    within = inspect.getsource(connection._get_statement)
    assert 0 < source.count("_protocol.prepare(") == within.count("_protocol.prepare(")
    assert (
        type(import_module("asyncpg.protocol.protocol").BaseProtocol.queries_count).__name__
        == "getset_descriptor"
    )


def test_asyncpgs_adapter_begins_nothing_where_its_level_says_so() -> None:
    adapter: Any = import_module("sqlalchemy.dialects.postgresql.asyncpg").AsyncAdapt_asyncpg_connection
    assert calls(adapter.set_isolation_level) >= {"rollback", "isolation_level"}
    assert "isolation_level" in calls(adapter._start_transaction)


def test_a_record_judges_its_age_by_the_names_that_ours_sets() -> None:
    assert {"_recycle", "_invalidate_time", "_soft_invalidate_time", "starttime"} <= calls(
        base._ConnectionRecord.get_connection
    )


@pytest.mark.psycopg
def test_psycopg_waits_for_everything_where_ours_does() -> None:
    import psycopg
    from psycopg import waiting

    assert parameters(psycopg.AsyncConnection.wait)[:3] == ["self", "gen", "interval"]
    assert parameters(waiting.wait_async)[:3] == ["gen", "fileno", "interval"]
    assert "wait_async" in calls(psycopg.AsyncConnection.wait)
    looks = inspect.signature(waiting.wait_async).parameters["interval"].default
    assert looks is None or "wait_for" not in waiting.wait_async.__code__.co_names
    assert {"wait"} <= calls(psycopg.AsyncCursor.execute) & calls(psycopg.AsyncConnection.commit)
    assert parameters(psycopg.AsyncConnection.cancel_safe) == ["self", "timeout"]
    assert int(waiting.Ready.NONE) == 0


@pytest.mark.psycopg
def test_psycopgs_pipeline_is_entered_and_left_as_ours_expects() -> None:
    import psycopg

    pipeline = psycopg.AsyncPipeline
    assert {"_enter_gen"} <= calls(pipeline.__aenter__)
    assert {"_exit_gen", "_exit"} <= calls(pipeline.__aexit__)
    assert {"level", "enter_pipeline_mode"} <= calls(pipeline._enter_gen)
    assert {"_enqueue_sync", "_communicate_gen", "_fetch_gen"} == calls(pipeline._exit_gen)


def test_asyncpg_sends_many_through_the_one_method_that_ours_overrides() -> None:
    connection: Any = import_module("asyncpg").Connection
    assert inspect.iscoroutinefunction(connection._executemany)
    assert "_executemany" in calls(connection.executemany)
    assert "_executemany" in calls(connection.fetchmany)


def test_psycopg_sends_begin_as_our_riders_expect() -> None:
    import psycopg
    from psycopg import generators

    assert positional(psycopg.AsyncConnection._exec_command)[:2] == ["self", "command"]
    assert {"_exec_command", "_get_tx_start_command"} <= calls(psycopg.AsyncConnection._start_query)
    assert "_pipeline" in calls(psycopg.AsyncConnection._exec_command)
    assert callable(psycopg.errors.error_from_result)
    assert callable(generators.execute)


def test_asyncpg_sends_begin_as_our_riders_expect() -> None:
    source = inspect.getsource(import_module("asyncpg.transaction"))
    assert "query = 'BEGIN'" in source
    assert "query += ';'" in source
    assert "await self._connection.execute(query)" in source


@pytest.mark.sqlite
def test_aiosqlite_has_what_ours_overrides() -> None:
    import aiosqlite

    execute: Any = vars(aiosqlite.Connection)["_execute"]
    assert positional(execute)[:2] == ["self", "fn"]
    database = aiosqlite.connect(":memory:")
    assert isinstance(database, threading.Thread) or hasattr(database, "_thread")


# routes.py --------------------------------------------------------------------------------------------------


def test_a_mount_says_that_it_was_passed() -> None:
    from starlette.routing import Mount

    mount = Mount("/tenants/{tenant}", app=lambda *_arguments: None)  # type: ignore[arg-type]  # never called
    scope = {"type": "http", "path": "/tenants/7/orders", "root_path": "", "method": "GET"}
    _, inside = mount.matches(scope)
    assert "app_root_path" in inside
    match = mount.path_regex.match("/tenants/7/orders")
    assert match is not None
    assert match["path"] == "orders"


# And nothing else -------------------------------------------------------------------------------------------


def foreign_private_imports() -> Iterator[tuple[str, str]]:
    """(module of ours, private name it imports from elsewhere)."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("stanch"):
                for alias in node.names:
                    dotted = f"{node.module}.{alias.name}"
                    if any(part.startswith("_") and not part.startswith("__") for part in dotted.split(".")):
                        yield str(path.relative_to(SOURCE)), dotted


def test_private_names_are_imported_where_the_docstrings_say() -> None:
    assert sorted(foreign_private_imports()) == [
        ("asgi.py", "starlette._exception_handler.wrap_app_handling_exceptions"),
        ("pool.py", "sqlalchemy.pool.base._ConnectionRecord"),
    ]


def test_supported_sqlalchemy_is_the_one_that_is_installed() -> None:
    version = tuple(int(part) for part in sqlalchemy.__version__.split(".")[:3])
    assert (2, 0, 55) <= version < (2, 2, 0)
    assert not (2, 1, 0) <= version <= (2, 1, 4)
    assert Database.__module__ == "stanch.database"
