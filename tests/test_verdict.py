"""What may be concluded from what a server says of a lost COMMIT: the table, whole; and where it is not to be had."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from stanch import CommitLost, CommitUnknown, ConfigError, Database, Kind, classify
from stanch.problems import problem_of
from stanch.verdict import Answer, Incarnation, Status, Ticket, Verdict, Witness, judge

THEN = Incarnation("7001", "00000001", 1_000)
CRASHED = replace(THEN, stats_reset=2_000)
PROMOTED = replace(THEN, timeline="00000002")
RESTORED_ELSEWHERE = replace(THEN, system="7002")
NOT_KNOWN = [replace(THEN, timeline=None), replace(THEN, stats_reset=None)]

UNKNOWN, ABORTED, COMMITTED = Verdict.UNKNOWN, Verdict.ABORTED, Verdict.COMMITTED
TABLE = {
    (Status.IN_PROGRESS, "same"): UNKNOWN,
    (Status.ABORTED, "same"): ABORTED,
    (Status.IN_THE_FUTURE, "same"): ABORTED,
    (Status.COMMITTED, "same"): COMMITTED,
    (Status.FORGOTTEN, "same"): UNKNOWN,
    (Status.IN_PROGRESS, "other"): UNKNOWN,
    (Status.ABORTED, "other"): ABORTED,
    (Status.IN_THE_FUTURE, "other"): ABORTED,
    (Status.COMMITTED, "other"): UNKNOWN,
    (Status.FORGOTTEN, "other"): UNKNOWN,
}


def verdict(
    status: Status, then: Incarnation, now: Incarnation, *, forced: bool = False, standbys: bool = False
) -> Verdict:
    ticket = Ticket(741, Witness(then, 10, 5, awaits_standbys=standbys))
    said = Answer(status, Witness(now, 11, 6, awaits_standbys=standbys), forced)
    return judge(ticket, said).verdict


@pytest.mark.parametrize("status", Status)
def test_the_table_of_verdicts(status: Status) -> None:
    """*Not committed* counts from every life of the server, *committed* only from the same."""
    assert verdict(status, THEN, THEN) is TABLE[status, "same"]
    for now in (CRASHED, PROMOTED):
        assert verdict(status, THEN, now) is TABLE[status, "other"]


@pytest.mark.parametrize("status", Status)
def test_another_cluster_proves_nothing(status: Status) -> None:
    """Its numbers have nothing to do with ours, also where the rows were copied (logical replication)."""
    assert verdict(status, THEN, RESTORED_ELSEWHERE) is UNKNOWN


def test_committed_is_believed_only_where_every_sign_is_known_and_equal() -> None:
    """All pairs of lives: one that lacks a sign is not even its own."""
    lives = [THEN, CRASHED, PROMOTED, *NOT_KNOWN]
    believed = {
        (then, now)
        for then, now in itertools.product(lives, lives)
        if verdict(Status.COMMITTED, then, now) is COMMITTED
    }
    assert believed == {(life, life) for life in (THEN, CRASHED, PROMOTED)}


def test_a_commit_that_was_cut_short_while_standbys_are_waited_for_is_not_called_stored() -> None:
    """The backend that we ended may have been about to wait: on this server only is not what was promised."""
    assert verdict(Status.COMMITTED, THEN, THEN, forced=True) is COMMITTED
    assert verdict(Status.COMMITTED, THEN, THEN, standbys=True) is COMMITTED
    assert verdict(Status.COMMITTED, THEN, THEN, forced=True, standbys=True) is UNKNOWN
    assert verdict(Status.ABORTED, THEN, THEN, forced=True, standbys=True) is ABORTED


def test_a_lost_commit_may_be_retried_and_an_unknown_one_may_not() -> None:
    lost, unknown = classify(CommitLost("x")), classify(CommitUnknown("x"))
    assert lost is not None
    assert unknown is not None
    assert (lost.kind, lost.retryable, lost.disconnect) == (Kind.UNAVAILABLE, True, True)
    assert (unknown.kind, unknown.retryable, unknown.disconnect) == (Kind.UNKNOWN_OUTCOME, False, True)
    replies = [problem_of(CommitLost("x")), problem_of(CommitUnknown("x"))]
    assert [(reply.status, reply.retry_after) for reply in replies if reply] == [(503, 2), (503, None)]


def test_verifying_through_pgbouncer_is_refused() -> None:
    """The process that was asked at connect is not the one that commits."""
    with pytest.raises(ConfigError, match="verify_commits=True cannot be kept through PgBouncer"):
        Database("postgresql+asyncpg://app@localhost/shop", verify_commits=True, pooler="pgbouncer")


def test_verifying_an_engine_that_is_left_alone_is_refused() -> None:
    engine = create_async_engine("postgresql+asyncpg://app@localhost/shop")
    with pytest.raises(ConfigError, match="verify_commits=True has no COMMIT to watch"):
        Database(engine, adopt=False, verify_commits=True)


@pytest.mark.anyio
@pytest.mark.sqlite
async def test_verifying_on_sqlite_has_nothing_to_act_on() -> None:
    """COMMIT is local there: the same settings may serve tests on SQLite and production on PostgreSQL."""
    async with (
        Database("sqlite+aiosqlite:///:memory:", verify_commits=True) as db,
        db.transaction() as session,
    ):
        assert session is not None
