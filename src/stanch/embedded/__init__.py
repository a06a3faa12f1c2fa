"""A real PostgreSQL of your own in one call, for tests and demos, that never outlives the process it serves."""

from __future__ import annotations

from stanch.embedded.errors import EmbeddedError, EmbeddedUnavailable
from stanch.embedded.server import EmbeddedPostgres

__all__ = ["EmbeddedError", "EmbeddedPostgres", "EmbeddedUnavailable"]
