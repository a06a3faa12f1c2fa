"""More load than can be served: how much of the capacity is left for good answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from bench.arrivals import Arrived, arriving, by_chance
from bench.cases.case import Scale
from bench.cases.rounds import Gathered, lanes, rotated
from bench.load import closed_loop, run, share
from bench.refusals import tell_refusals
from bench.served import serving_subject
from bench.shop import ELSEWHERE, Kind
from bench.subjects import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.cases.case import Ground
    from bench.cases.rounds import Lane
    from bench.results import Figure

POOL: Final = 5
LOADS: Final = (1, 2, 4)
"""Times the capacity."""
PATIENCE: Final = 1.0
HOLD: Final = Kind.SLOW.ask.path_of(0)
WARMING: Final = 0.5
STARTING: Final = 1.0
SEED: Final = 20261126
HELD: Final = 1.5 * POOL / ELSEWHERE
"""Answers a second that nobody can give who keeps a connection for the whole of a request."""
FEW: Final = frozenset({"article", "stanch"})


class Length(NamedTuple):
    """Of a run."""

    rounds: int
    capacity: float
    """Seconds in which the capacity is measured."""
    load: float
    """Seconds of each load, after the first in which nobody's patience can be over."""


LENGTHS: Final = {Scale.QUICK: Length(1, 1.5, 2.5), Scale.FULL: Length(3, 4.0, 10.0)}


class Overload:
    """The case."""

    name = "overload"
    title = "Overload: one, two and four times the capacity"
    method = (
        f"A pool of {POOL}; each request reads a row and keeps its connection for another {ELSEWHERE * 1000:.0f} ms."
        f" The capacity of each subject is what it answers per second to {2 * POOL} clients who come again as soon as"
        " they are answered. Then clients come by (seeded) chance, one, two and four times as many as"
        f" that, whoever still waits, and each leaves after {PATIENCE:.0f} s. A good answer is a 200 that came before."
        f" The first {PATIENCE:.0f} s of each load, when nobody can have lost patience yet, do not count. *Refused* are"
        " answers with 503, *gone* those who left. *Told* is how long after the pool's decision to refuse the reply"
        " left. Who does not keep the connection for the whole request has no such limit and is left out."
        " Each load meets a server of its own, served by uvicorn: what waits in one must not be in the way of the next."
    )

    def needs(self) -> str | None:
        """Nothing."""
        return None

    def seconds(self, ground: Ground) -> float:
        """By the number of subjects."""
        rounds, capacity, load = LENGTHS[ground.scale]
        each = STARTING + WARMING + capacity + len(LOADS) * (STARTING + WARMING + 2 * PATIENCE + load)
        return len(lanes(ground, Kind.SLOW, quick=FEW)) * rounds * each

    def run(self, ground: Ground) -> Iterator[Figure]:
        """Load by load, in turns."""
        rounds, capacity_for, load_for = LENGTHS[ground.scale]
        gathered = Gathered(self.name)
        for number in range(rounds):
            capacities: dict[Lane, float] = {}
            for lane in rotated(lanes(ground, Kind.SLOW, quick=FEW), number):
                ground.step(f"capacity, round {number + 1} of {rounds}: {lane}")
                capacity = _capacity_of(lane, ground, capacity_for)
                if 0 < capacity < HELD:
                    capacities[lane] = capacity
            for load in LOADS:
                for lane, capacity in capacities.items():
                    ground.step(f"{load} times the capacity, round {number + 1} of {rounds}: {lane}")
                    arrived = _load(
                        lane, ground, by_chance(load * capacity, PATIENCE + load_for, SEED + number)
                    )
                    _add(gathered, lane, load, Outcome.of(arrived, capacity, load_for))
        yield from gathered.figures()


def _setting(lane: Lane, ground: Ground) -> Setting:
    return Setting(ground.server.url(lane.driver), POOL)


def _capacity_of(lane: Lane, ground: Ground, seconds: float) -> float:
    with serving_subject(lane.subject, _setting(lane, ground)) as served:
        run(closed_loop(served.port, HOLD, clients=2 * POOL, seconds=WARMING))
        answers = run(closed_loop(served.port, HOLD, clients=2 * POOL, seconds=seconds))
    return sum(answer.status == 200 for answer in answers) / seconds


def _load(lane: Lane, ground: Ground, moments: Iterator[float]) -> list[Arrived]:
    """Those who came when others could already have lost patience."""
    with serving_subject(lane.subject, _setting(lane, ground), prepared=tell_refusals) as served:
        run(closed_loop(served.port, HOLD, clients=POOL, seconds=WARMING))
        arrived = run(arriving(served.port, HOLD, moments, patience=PATIENCE))
    return [each for each in arrived if each.at >= PATIENCE]


class Outcome(NamedTuple):
    """What became of one load."""

    capacity: float
    good: float
    """Good answers a second."""
    p99: float
    """Of the good answers, in seconds; the whole patience where there were none."""
    refused: float
    """Part of all."""
    gone: float
    failed: float
    """Any other answer."""
    told: float | None
    """Seconds from the decision to refuse to the reply, of all but one in a hundred; None without any refusal."""

    @property
    def part(self) -> float:
        """Of the capacity that good answers are."""
        return self.good / self.capacity

    @classmethod
    def of(cls, arrived: Sequence[Arrived], capacity: float, seconds: float) -> Outcome:
        """Count those who came in so many *seconds*."""
        took = [each.answer.took for each in arrived if each.is_good]
        told = [each.answer.told_after for each in arrived if each.answer.told_after is not None]
        statuses = [each.answer.status for each in arrived]
        everybody = max(1, len(statuses))
        refused, gone = statuses.count(503) / everybody, statuses.count(0) / everybody
        return cls(
            capacity,
            len(took) / seconds,
            share(took, 0.99) if took else PATIENCE,
            refused,
            gone,
            sum(status not in {0, 200, 503} for status in statuses) / everybody,
            share(told, 0.99) if told else None,
        )


def _add(gathered: Gathered, lane: Lane, load: int, outcome: Outcome) -> None:
    of = gathered.of(lane.subject.name, driver=lane.driver, load=load, pool=POOL)
    of.more("good answers / capacity", "1", outcome.part)
    of.more("good answers", "1/s", outcome.good)
    of.less("p99 of good answers", "ms", outcome.p99 * 1000)
    of.neither("refused", "%", outcome.refused * 100)
    of.less("gone", "%", outcome.gone * 100)
    of.less("failed", "%", outcome.failed * 100)
    told = None if outcome.told is None else outcome.told * 1000
    of.less("told (p99)", "ms", told)
    of.neither("capacity", "1/s", outcome.capacity)


CASE: Final = Overload()
