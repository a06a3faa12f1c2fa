"""What is said of a COMMIT whose answer was lost where nobody asks the server: *unknown*.

``stanch.verdict`` asks; it is loaded where ``verify_commits`` is on, and costs nobody else anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Never, Protocol

from stanch.errors import CommitUnknown

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import Pool

CLEAN_KEY: Final = "stanch.clean"
"""In a pooled connection's ``info``, set just before COMMIT: this transaction cannot have written, and is not
SERIALIZABLE. Taken out again by its COMMIT or ROLLBACK."""


class Verifier(Protocol):
    """Before COMMIT it takes down what to ask for; after a loss it asks."""

    def attach(self, pool: Pool) -> None:
        """Meet every new connection of *pool*."""
        ...

    def stake(self, connection: DBAPIConnection) -> Any:
        """What will be asked if the coming COMMIT is lost, or what is known already. At most one round trip."""
        ...

    def rolled_back(self, connection: DBAPIConnection) -> None:
        """There will be no COMMIT: forget what was said of it."""
        ...

    def settle(self, stake: Any, error: Exception) -> None:
        """COMMIT was lost in *error*: return if the work is stored, else raise ``CommitLost`` or ``CommitUnknown``."""
        ...


class Unverified:
    """Asks nothing: a lost COMMIT is unknown."""

    def attach(self, pool: Pool) -> None:
        """Meet nobody."""

    def stake(self, connection: DBAPIConnection) -> None:
        """Take nothing down."""

    def rolled_back(self, connection: DBAPIConnection) -> None:
        """Forget nothing."""

    def settle(self, stake: object, error: Exception) -> Never:  # noqa: ARG002  # the null object's
        """Raise ``CommitUnknown``."""
        raise commit_unknown("") from error


def commit_unknown(why: str) -> CommitUnknown:
    """The error for a COMMIT of which nobody here knows whether it is stored; *why* not, where somebody asked."""
    return CommitUnknown(
        "the connection was lost while COMMIT was on its way: the work may or may not be stored"
        + (f"; {why}" if why else ""),
        remedies=[
            "Do not repeat the work blindly: look first whether it is there.",
            "Give the work a key of the client's choosing, unique in its table; then repeating it is harmless.",
        ],
    )
