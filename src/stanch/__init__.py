"""stanch: the database session layer for FastAPI and SQLAlchemy. Two lifetimes: the app's, the unit of work's."""

from stanch.attempts import attempt_of
from stanch.database import Database, rollback_only
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
    SessionClosed,
    SessionOverlap,
    StanchError,
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
    "SessionClosed",
    "SessionOverlap",
    "StanchError",
    "Stats",
    "UnitConflict",
    "UnsavedWrites",
    "WriteRefused",
    "attempt_of",
    "classify",
    "rollback_only",
]
