"""CPU instructions that one request costs the app, counted by valgrind's callgrind: nearly free of noise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, Self

from bench.cases.case import Scale
from bench.cases.rounds import FIRST, chosen
from bench.driven import FEW, MANY
from bench.results import Figure
from bench.shop import Kind
from bench.subjects import BASELINE, OURS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from bench.cases.case import Ground
    from bench.subjects import Subject

QUICK: Final = frozenset({Kind.READ, Kind.WRITE})
WITHOUT: Final = frozenset({Kind.BARE, Kind.UNUSED})
"""A quick run counts them of stanch, and of what it is compared with there."""
DRIVER: Final = "asyncpg"
AT_ONCE: Final = 2
"""Processes of valgrind; each takes a core."""
TIMEOUT: Final = 600
"""Seconds for one subject; it takes a quarter of a minute on a machine that does nothing else."""
IMPORTING, COUNTING = 5.0, 2.5
"""Seconds for a subject, and for each of its kinds, by valgrind on a machine that does nothing else."""

ROOT: Final = Path(__file__).parent.parent.parent
ENVIRONMENT: Final = {
    **{name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ},
    "PYTHONHASHSEED": "0",
}
"""Nothing else: where Python's objects lie in memory, and so how its caches collide, depends on every variable."""


def in_place() -> tuple[str, ...]:
    """What starts a program at the same addresses every time, or nothing where that is not to be had.

    Chance in them is chance in what collides, and 1 % of a request. Docker does not permit to turn it off.
    """
    fixed = ("setarch", "-R")
    if shutil.which(fixed[0]) is None:
        return ()
    tried = subprocess.run([*fixed, "true"], capture_output=True, check=False)  # noqa: S603  # from PATH, as the others
    return fixed if tried.returncode == 0 else ()


def _read(dumps: Path) -> dict[tuple[Kind, int], int]:
    """The totals by kind and number of requests."""
    totals: dict[tuple[Kind, int], int] = {}
    for dump in dumps.iterdir():
        text = dump.read_text()
        named = re.search(r"^desc: Trigger: dump (\w+)-(\d+)", text, re.MULTILINE)
        counted = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if named and counted:
            totals[Kind[named[1]], int(named[2])] = int(counted[1])
    return totals


class Valgrinds:
    """Counts subjects, some at once. Leaving the ``with`` block ends those that still run."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._valgrind = (*in_place(), "valgrind")
        self._running: set[subprocess.Popen[str]] = set()
        self._pool = ThreadPoolExecutor(AT_ONCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.kill()
        self._pool.shutdown()

    def count(self, wanted: Mapping[str, Collection[Kind]]) -> Iterator[tuple[str, dict[Kind, float]]]:
        """Instructions of one request by kind, subject by subject in the order given.

        ``RuntimeError`` where a subject fails: with the end of what it said.
        """
        futures = [(name, self._pool.submit(self._one, name, kinds)) for name, kinds in wanted.items()]
        for name, future in futures:
            yield name, future.result()

    def _one(self, subject: str, kinds: Collection[Kind]) -> dict[Kind, float]:
        named = [kind.name for kind in Kind if kind in kinds]
        with TemporaryDirectory() as folder:
            self._run(
                "--tool=callgrind",
                "--instr-atstart=no",
                "--trace-children=yes",  # else a fork does not listen to vgdb
                "--trace-children-skip=*",  # vgdb itself is none of ours
                f"--callgrind-out-file={folder}/calls.%p",
                *(sys.executable, "-m", "bench.driven", subject, self._url, *named),
            )
            totals = _read(Path(folder))
        return {
            kind: (totals[kind, MANY] - totals[kind, FEW]) / (MANY - FEW)
            for kind in (Kind[name] for name in named)
        }

    def _run(self, *arguments: str) -> None:
        process = subprocess.Popen(  # noqa: S603  # what it runs is this suite
            [*self._valgrind, *arguments],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._running.add(process)
        try:
            _, said = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
            self._running.remove(process)
        if process.returncode != 0:
            raise RuntimeError(f"valgrind ended with {process.returncode}: {said[-2000:]}")


class Instructions:
    """The case."""

    name = "instructions"
    title = "CPU instructions per request"
    method = (
        "Instructions of the app's process in user space, all its threads, by valgrind's *callgrind*: requests are "
        "made by calling the app as a server would (no socket to a client, no HTTP parser), one after the other on a "
        f"pool of one connection ({DRIVER}; SQLModel's template: psycopg). Each kind of request has a process of its "
        f"own, is warm, and is counted as the difference of {MANY} and {FEW} requests. Repeats agree within 1 %. "
        "System calls, waiting and cache misses are not in it."
    )

    def needs(self) -> str | None:
        """Valgrind."""
        missing = [program for program in ("valgrind", "vgdb") if shutil.which(program) is None]
        return f"{' and '.join(missing)} not installed (apt install valgrind)" if missing else None

    def seconds(self, ground: Ground) -> float:
        """Most of it is valgrind's start."""
        wanted = self._wanted(ground)
        kinds = sum(len(kinds) for kinds in wanted.values())
        return (IMPORTING * len(wanted) + COUNTING * kinds) / min(AT_ONCE, os.cpu_count() or 1)

    def run(self, ground: Ground) -> Iterator[Figure]:
        """Count."""
        wanted = self._wanted(ground)
        titles = {subject.name: subject.title for subject in ground.subjects}
        with Valgrinds(ground.server.url(DRIVER)) as valgrinds:
            ground.step(", ".join(list(titles.values())[:AT_ONCE]))
            for subject, counted in valgrinds.count(wanted):
                for kind, instructions in counted.items():
                    where = {"kind": kind.ask.title}
                    yield Figure(self.name, subject, where, "instructions", "1", "less", (instructions,))
                ground.step(f"{titles[subject]} counted")

    @staticmethod
    def _wanted(ground: Ground) -> dict[str, frozenset[Kind]]:
        subjects = chosen(ground, FIRST)
        return {subject.name: kinds_of(subject, ground.scale) for subject in subjects}


def kinds_of(subject: Subject, scale: Scale) -> frozenset[Kind]:
    """What is counted of a subject."""
    if scale is Scale.FULL:
        return subject.kinds
    return subject.kinds & (QUICK | WITHOUT if subject.name in {"bare", BASELINE, *OURS} else QUICK)


CASE: Final = Instructions()
