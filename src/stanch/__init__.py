"""stanch: the database session layer for FastAPI and SQLAlchemy. Two lifetimes: the app's, the unit of work's."""

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
    NotInstalled,
    PartialCommit,
    PoolExhausted,
    SessionClosed,
    SessionOverlap,
    SessionStateRefused,
    StanchError,
    UnitConflict,
    UnsavedWrites,
    WriteRefused,
)
from stanch.ledger import Stats
from stanch.sqlstate import Failure, Kind, classify

__all__ = [
    "AsyncSessionInSyncEndpoint",
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
    "Kind",
    "NotInstalled",
    "PartialCommit",
    "PoolExhausted",
    "SessionClosed",
    "SessionOverlap",
    "SessionStateRefused",
    "StanchError",
    "Stats",
    "UnitConflict",
    "UnsavedWrites",
    "WriteRefused",
    "classify",
    "rollback_only",
]
