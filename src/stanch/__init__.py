"""stanch: the database session layer for FastAPI and SQLAlchemy. Two lifetimes: the app's, the unit of work's."""

from stanch.atomic import after_rollback, atomic, on_commit, release, rollback_only
from stanch.attempts import attempt_of
from stanch.database import Database
from stanch.errors import (
    AsyncSessionInSyncEndpoint,
    CommitRefused,
    CommitUnknown,
    ConfigError,
    ConnectionCommitRefused,
    DatabaseClosed,
    DatabaseUnavailable,
    DeadlinePassed,
    DriverMissing,
    InsideTransaction,
    NotInstalled,
    PartialCommit,
    PoolExhausted,
    SavepointGone,
    SessionClosed,
    SessionOverlap,
    StanchError,
    TransactionAborted,
    UnitConflict,
    UnsavedWrites,
    WriteRefused,
)
from stanch.ledger import Stats
from stanch.retry import Attempt, Retry
from stanch.sqlstate import Failure, Kind, classify

__all__ = [
    "AsyncSessionInSyncEndpoint",
    "Attempt",
    "CommitRefused",
    "CommitUnknown",
    "ConfigError",
    "ConnectionCommitRefused",
    "Database",
    "DatabaseClosed",
    "DatabaseUnavailable",
    "DeadlinePassed",
    "DriverMissing",
    "Failure",
    "InsideTransaction",
    "Kind",
    "NotInstalled",
    "PartialCommit",
    "PoolExhausted",
    "Retry",
    "SavepointGone",
    "SessionClosed",
    "SessionOverlap",
    "StanchError",
    "Stats",
    "TransactionAborted",
    "UnitConflict",
    "UnsavedWrites",
    "WriteRefused",
    "after_rollback",
    "atomic",
    "attempt_of",
    "classify",
    "on_commit",
    "release",
    "rollback_only",
]
