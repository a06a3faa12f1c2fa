"""A connection that only the garbage collector gave back is a leak, whatever else the test says."""

from __future__ import annotations

import logging
from typing import Self

TELLTALE = "garbage collector is trying to clean up"
"""How SQLAlchemy's pool begins its complaint about a connection that nobody checked in."""


class AbandonedConnections(logging.Handler):
    """Keeps what SQLAlchemy's pools, under whatever name they log, say about abandoned connections."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.complaints: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if TELLTALE in (message := record.getMessage()):
            self.complaints.append(f"{record.name}: {message}")

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_exc: object) -> None:
        logging.getLogger().removeHandler(self)
