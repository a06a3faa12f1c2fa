"""The keyword arguments of ``Database`` as types, so that an editor and a type checker know them.

What they mean, their defaults and bounds are in ``Settings``; ``tests/test_settings.py`` holds the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.pool import Pool


class EngineOptions(TypedDict, total=False):
    """What is handed on to ``create_async_engine`` as it is (SQLAlchemy manual, *Engine Creation API*)."""

    connect_args: dict[str, Any]
    enable_from_linting: bool
    execution_options: Mapping[str, Any]
    hide_parameters: bool
    insertmanyvalues_page_size: int
    json_deserializer: Callable[[str], Any]
    json_serializer: Callable[[Any], str]
    label_length: int | None
    logging_name: str
    max_identifier_length: int | None
    native_inet_types: bool
    plugins: list[str]
    query_cache_size: int
    skip_autocommit_rollback: bool
    use_insertmanyvalues: bool
    use_native_hstore: bool


class Options(EngineOptions, total=False):
    """Every setting of ``Settings``, by name."""

    pool_size: int
    max_overflow: int
    reader_pool_size: int | None
    pool_timeout: float
    pool_recycle: float
    pool_pre_ping: bool
    ping_after: float
    poolclass: type[Pool] | None
    reset: Literal["flag", "strict"]
    track_holders: bool
    leak_after: float | None
    held_idle_after: float | None
    slow_statement: float | None
    repeated_statement: int | None
    echo: bool | Literal["debug"]
    isolation_level: Literal[
        "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"
    ]
    autoflush: bool
    expire_on_commit: bool
    connect_timeout: float
    close_timeout: float
    commit_timeout: float
    drain_timeout: float
    hook_timeout: float
    verify_commits: bool
    application_name: str | None
    statement_timeout: float | None
    lock_timeout: float | None
    idle_in_transaction_session_timeout: float | None
    pooler: Literal["pgbouncer"] | None
    engine_options: EngineOptions
