"""Requests per second, what they cost the server, and how long they take: by distance, clients and pool."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.cases.case import Scale
from bench.cases.rounds import FIRST, chosen, rotated
from bench.load import Crowd, requests_of, run, share
from bench.results import Figure
from bench.served import serving
from bench.shop import Kind
from bench.subjects import Setting
from bench.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.cases.case import Ground
    from bench.load import Load
    from bench.results import Better
    from bench.served import Served
    from bench.subjects import Subject

POOL: Final = 10
CROWD: Final = 100
"""From so many clients on they are more than stanch would let wait by default."""
QUANTILES: Final = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


class Pace(NamedTuple):
    """How often, and for how long, each subject has its turn."""

    rounds: int
    seconds: float


class Place(NamedTuple):
    """What servers are started for; where it is equal they are used again."""

    is_far: bool
    """Beyond the wire."""
    pool: int
    lets_wait: bool


class Scene(NamedTuple):
    """One setting."""

    kind: Kind
    rtt: float
    """Milliseconds."""
    clients: int
    pool: int

    @property
    def place(self) -> Place:
        """Where it is played."""
        return Place(self.rtt > 0, self.pool, self.clients >= CROWD)

    @property
    def where(self) -> dict[str, str | float]:
        """As in the figures."""
        return {
            "kind": self.kind.ask.title,
            "rtt_ms": self.rtt,
            "clients": self.clients,
            "pool": self.pool,
        }

    def pace(self, scale: Scale) -> Pace:
        """A starved client waits as long as a slice lasts: where they must queue it is a long one."""
        if scale is Scale.FULL:
            return Pace(7, 2.0)
        return Pace(5, 0.2) if self.clients <= self.pool else Pace(3, 0.7)


QUICK: Final = (
    Scene(Kind.READ, 0.5, 1, 10),
    Scene(Kind.READ, 2.0, 1, 10),
    Scene(Kind.WRITE, 0.5, 1, 10),
    Scene(Kind.READ, 0, 32, 10),
    Scene(Kind.READ, 0, 32, 5),
    Scene(Kind.READ, 0, 500, 10),
)
FULL: Final = (
    *(Scene(Kind.BARE, 0, clients, 10) for clients in (1, 32, 500)),
    *itertools.starmap(
        Scene, itertools.product((Kind.READ, Kind.WRITE), (0, 0.5, 2.0), (1, 32, 500), (5, 10))
    ),
)

SOME: Final = frozenset({"asyncpg", "article", "article-ping", "stanch", "stanch-reader"})
"""Who has his turn in a quick run where the pool is smaller, or the crowd larger, than an app's is as a rule."""

START: Final = 1.0
"""Seconds until one server more is ready, where two cores start several side by side."""
WARMING: Final = 0.2
"""Seconds of load before what counts: connections, prepared statements, compiled caches."""


class Rates:
    """The case."""

    name = "rates"
    title = "Requests per second, processor time, and waiting"
    method = f"""\
Each subject is served by uvicorn in a process of its own, with PostgreSQL (without fsync) on the same machine. Clients
with keep-alive connections ask for row after row, each again as soon as it is answered, for a slice of time; then it is
the next subject's turn, in an order that rotates from round to round, while the other servers idle. Ratios are of the
slices of one round.

*requests*: those answered with 200, per second. *cpu*: processor time, user's and system's, of the server's process for
each of them; of the clients, the proxy and PostgreSQL nothing. *p50*, *p99*, *p99.9*: within how many milliseconds that
part of them was answered; of all rounds together where a slice has too few requests for that part, and not told where
all rounds have. A slice ends the wait of those who still wait, so the tails of subjects that starve their clients are
shown too short, never too long. *failed*: what was answered with anything else, or not at all.

The longer distances are a proxy's between server and PostgreSQL: what PostgreSQL says arrives so much later. It takes
10 to 40 microseconds of a core for each message, of which a round trip has two: on a machine with few cores, many
clients at a distance measure that as well. At 0 there is no proxy.

From {CROWD} clients on stanch is told to let all of them wait, as the others do (`queue_target=None`). By default it
refuses those whom it could not serve in time with 503; the case *overload* shows what that is good for.

A quick run has that crowd, and a pool smaller than {POOL}, of a few subjects only; and of two that are the same but for
an option the one that most will take.
"""

    def needs(self) -> str | None:
        """Nothing."""
        return None

    def seconds(self, ground: Ground) -> float:
        """The slices, and the starts of the servers."""
        total = 0.0
        for place, scenes in _by_place(ground.scale):
            present = _present(place, scenes, ground)
            total += START * len(present) + place.is_far
            for scene in scenes:
                pace = scene.pace(ground.scale)
                subjects = len(_able(present, scene.kind))
                total += subjects * (WARMING + pace.rounds * (pace.seconds + scene.clients / 1500 + 0.05))
        return total

    def run(self, ground: Ground) -> Iterator[Figure]:
        """Setting after setting."""
        for place, scenes in _by_place(ground.scale):
            with ExitStack() as stack:
                url = ground.server.url()
                wire = stack.enter_context(Wire(ground.server.port)) if place.is_far else None
                present = _present(place, scenes, ground)
                ground.step(f"starting {len(present)} servers, pool {place.pool}")
                setting = Setting(
                    wire.through(url) if wire else url,
                    pool_size=place.pool,
                    options={"queue_target": None} if place.lets_wait else {},
                )
                served = stack.enter_context(serving(present, setting))
                for scene in scenes:
                    if wire:
                        wire.delay(scene.rtt / 1000)
                    yield from _play(scene, present, ground, served)


def _by_place(scale: Scale) -> Iterator[tuple[Place, list[Scene]]]:
    scenes = QUICK if scale is Scale.QUICK else FULL
    places = dict.fromkeys(scene.place for scene in scenes)
    for place in places:
        yield place, [scene for scene in scenes if scene.place == place]


def _present(place: Place, scenes: Sequence[Scene], ground: Ground) -> list[Subject]:
    among = chosen(ground, SOME if place.pool < POOL or place.lets_wait else FIRST)
    return [subject for subject in among if any(scene.kind in subject.kinds for scene in scenes)]


def _able(subjects: Sequence[Subject], kind: Kind) -> list[Subject]:
    return [subject for subject in subjects if kind in subject.kinds]


# One setting ------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """What one subject did in one round."""

    load: Load
    cpu: float

    @property
    def per_second(self) -> float:
        """Good answers."""
        return len(self.load.good) / self.load.seconds

    @property
    def cost(self) -> float:
        """Microseconds of the server's processor for each good answer."""
        return self.cpu * 1e6 / len(self.load.good)

    @property
    def failed(self) -> int:
        """Answers that were no 200."""
        return len(self.load.answers) - len(self.load.good)


async def one_slice(served: Served, requests: Sequence[bytes], *, clients: int, seconds: float) -> Slice:
    """Load *served*; connecting is not part of it."""
    async with Crowd(served.port, clients) as crowd:
        before = served.cpu()
        load = await crowd.closed_loop(requests, seconds=seconds)
        return Slice(load, served.cpu() - before)


@dataclass(slots=True)
class Rounds:
    """What was measured in one setting, by subject."""

    scene: Scene
    slices: dict[str, list[Slice]] = field(default_factory=dict[str, list[Slice]])

    def figures(self) -> Iterator[Figure]:
        """All that can be told of them."""
        for subject, slices in self.slices.items():
            yield self._figure(subject, "requests", "1/s", "more", [each.per_second for each in slices])
            if all(each.load.good for each in slices):
                yield self._figure(subject, "cpu", "us", "less", [each.cost for each in slices])
        for name, part in QUANTILES.items():
            yield from self._quantile(name, part)
        for subject, slices in self.slices.items():
            yield self._figure(subject, "failed", "requests", "less", [each.failed for each in slices])

    def _quantile(self, name: str, part: float) -> Iterator[Figure]:
        """By round if each has enough in each; else, for all subjects alike, of all rounds together."""
        enough = round(1 / (1 - part))
        good = {subject: [each.load.good for each in slices] for subject, slices in self.slices.items()}
        if any(len(took) < enough for rounds in good.values() for took in rounds):
            good = {subject: [list(itertools.chain(*rounds))] for subject, rounds in good.items()}
        for subject, rounds in good.items():
            if all(len(took) >= enough for took in rounds):
                yield self._figure(subject, name, "ms", "less", [share(took, part) * 1000 for took in rounds])

    def _figure(
        self, subject: str, quantity: str, unit: str, better: Better, rounds: Sequence[float]
    ) -> Figure:
        return Figure(Rates.name, subject, self.scene.where, quantity, unit, better, tuple(rounds))


def _play(
    scene: Scene, present: Sequence[Subject], ground: Ground, served: dict[str, Served]
) -> Iterator[Figure]:
    requests = requests_of(scene.kind.ask)
    pace = scene.pace(ground.scale)
    rounds = Rounds(scene)
    names = [subject.name for subject in _able(present, scene.kind)]
    title = ", ".join(
        (scene.kind.ask.title, f"{scene.rtt:g} ms", f"clients {scene.clients}", f"pool {scene.pool}")
    )

    def slice_of(name: str, seconds: float) -> Slice:
        return run(one_slice(served[name], requests, clients=scene.clients, seconds=seconds))

    for name in names:
        ground.step(f"{title}: warming {name}")
        slice_of(name, WARMING)
    for turn in range(pace.rounds):
        for name in rotated(names, turn):
            ground.step(f"{title}: round {turn + 1} of {pace.rounds}, {name}")
            rounds.slices.setdefault(name, []).append(slice_of(name, pace.seconds))
    yield from rounds.figures()


CASE: Final = Rates()
