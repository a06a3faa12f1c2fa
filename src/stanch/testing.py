"""For the tests of your app: what ``on_commit`` would run is collected, and looked at, instead."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Generator

    from stanch.database import Database
    from stanch.hooks import Hook, Runner
    from stanch.sessions import GuardedSession

__all__ = ["captured_hooks"]


@contextmanager
def captured_hooks(db: Database[Any], *, run: bool = False) -> Generator[list[Hook]]:
    """Collect every callback of ``on_commit`` and ``after_rollback`` whose time comes inside the block.

    They are not run (``run=True``: collected and run as ever), in the order in which they would be, from every session
    of *db*, whoever opened it. One whose transaction ends otherwise than it waits for is never collected. A collected
    ``Hook`` has ``call``, ``arguments``, ``keywords`` and ``place``, the line that gave it. Blocks nest: the innermost
    collects. Nothing else about commits is changed: the data is stored.
    """
    runner = _runner_of(db)
    captured: list[Hook] = []

    def take(hook: Hook) -> bool:
        captured.append(hook)
        return not run

    before, runner.instead = runner.instead, take
    try:
        yield captured
    finally:
        runner.instead = before


def _runner_of(db: Database[Any]) -> Runner:
    session_class = cast("type[GuardedSession]", db.session_factory.kw["sync_session_class"])
    return session_class.terms.hooks
