"""One, two and four workers: what more processes are worth."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from bench.cases.case import Scale
from bench.cases.rates import Pace, Slice, one_slice
from bench.cases.rounds import chosen, rotated
from bench.load import requests_of, run
from bench.results import Figure
from bench.served import serving
from bench.shop import Kind
from bench.subjects import BASELINE, Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.cases.case import Ground
    from bench.served import Served
    from bench.subjects import Subject

WORKERS: Final = (1, 2, 4)
CLIENTS: Final = 32
POOL: Final = 10
"""Of each worker."""
START: Final = 1.1
"""Seconds until one process more is ready."""
WARMING: Final = 0.4
FEW: Final = frozenset({BASELINE, "stanch"})
"""Who is asked in a quick run: each runs in seven processes at the same time."""
MORE: Final = FEW | {"asyncpg", "stanch-reader"}


class Workers:
    """The case."""

    name = "workers"
    title = "Scale over workers"
    method = f"""\
uvicorn workers that share a listening socket, each with a pool of {POOL}; {CLIENTS} keep-alive clients read row after
row. All worker counts of all subjects run at the same time and are loaded in turns, as in *rates*. *requests*: answers
with 200 per second. *cpu*: processor time of all workers for each. *scale*: requests against one worker of the same
subject in the same round.

Clients and PostgreSQL share the processor with the workers: with fewer cores than workers and two more, the workers
cannot be that many times as fast, and what shows is what is lost by having them. Where more than {len(MORE)} subjects
are asked only the article's pattern, raw asyncpg and stanch are loaded (in a quick run without raw asyncpg, and stanch
by `SessionDep` only): the processes would not have room.
"""

    def needs(self) -> str | None:
        """Nothing."""
        return None

    def seconds(self, ground: Ground) -> float:
        """The slices, and the starts of the servers."""
        subjects, pace = len(_chosen(ground)), _pace(ground.scale)
        slices = WARMING + pace.rounds * (pace.seconds + 0.1)
        return subjects * (START * sum(WORKERS) + len(WORKERS) * slices)

    def run(self, ground: Ground) -> Iterator[Figure]:
        """All at once, in turns."""
        subjects = _chosen(ground)
        with ExitStack() as stack:
            served: dict[tuple[str, int], Served] = {}
            for workers in WORKERS:
                ground.step(f"starting {len(subjects)} subjects with {workers} workers each")
                setting = Setting(ground.server.url(), pool_size=POOL)
                started = stack.enter_context(serving(subjects, setting, workers=workers))
                served |= {(name, workers): one for name, one in started.items()}
            yield from _figures(_slices(served, ground))


def _chosen(ground: Ground) -> list[Subject]:
    able = chosen(ground, FEW, Kind.READ)
    return able if len(able) <= len(MORE) else [subject for subject in able if subject.name in MORE]


def _pace(scale: Scale) -> Pace:
    return Pace(7, 3.0) if scale is Scale.FULL else Pace(3, 0.6)


def _slices(served: dict[tuple[str, int], Served], ground: Ground) -> dict[tuple[str, int], list[Slice]]:
    requests = requests_of(Kind.READ.ask)
    pace = _pace(ground.scale)
    slices: dict[tuple[str, int], list[Slice]] = {each: [] for each in served}
    for name, one in served.items():
        ground.step(f"warming {name[0]}, workers {name[1]}")
        run(one_slice(one, requests, clients=CLIENTS, seconds=WARMING))
    for turn in range(pace.rounds):
        for name in rotated(list(served), turn):
            ground.step(f"round {turn + 1} of {pace.rounds}: {name[0]}, workers {name[1]}")
            load = one_slice(served[name], requests, clients=CLIENTS, seconds=pace.seconds)
            slices[name].append(run(load))
    return slices


def _figures(slices: dict[tuple[str, int], list[Slice]]) -> Iterator[Figure]:
    for (name, workers), rounds in slices.items():
        where = {"workers": workers, "clients": CLIENTS, "pool": POOL}
        rate = tuple(each.per_second for each in rounds)
        yield Figure(Workers.name, name, where, "requests", "1/s", "more", rate)
        if all(each.load.good for each in rounds):
            cost = tuple(each.cost for each in rounds)
            yield Figure(Workers.name, name, where, "cpu", "us", "less", cost)
        alone = [each.per_second for each in slices[name, 1]]
        if workers > 1 and all(alone):
            scale = tuple(many / one for many, one in zip(rate, alone, strict=True))
            yield Figure(Workers.name, name, where, "scale", "times", "more", scale)
        failed = tuple(float(each.failed) for each in rounds)
        yield Figure(Workers.name, name, where, "failed", "requests", "less", failed)


CASE: Final = Workers()
