"""The command: runs cases on one ground, tells how far it is, and stores what came of it.

    python -m bench                                        # all of it
    python -m bench rates --subjects stanch,article        # one case, of some subjects

Exit status: 0 done, 1 a case failed, 2 asked for what there is not, 130 stopped by Ctrl-C. What was measured until then
is stored in any case.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from rich.console import Console
from rich.text import Text
from sqlalchemy.ext.asyncio import create_async_engine

from bench import machine, shop
from bench.cases import CASES
from bench.cases.case import Ground, Scale
from bench.progress import Progress, in_words
from bench.results import Results
from bench.subjects import BASELINE, SUBJECTS, Setting
from bench.terminal import show
from bench.verify import verify
from stanch.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bench.cases.case import Case
    from bench.results import Figure
    from bench.subjects import Subject

FOLDER: Final = Path(__file__).parent / "results"
WHOLE: Final = "latest.json"
PART: Final = "part.json"
"""Where a choice of cases or subjects goes: the page is made of whole runs."""

SERVER: Final[dict[str, str | int]] = {"max_connections": 500, "autovacuum": "off"}
"""Room for the pools of all subjects at once; and no work that falls into somebody's slice by chance."""
WIDTH: Final = 160
"""Columns of what is no terminal."""
STOPPED: Final = 130
"""The exit status of what was ended by Ctrl-C."""
BUSY: Final = 0.3
"""Processes that want to run, for each core, from which on the machine is not at rest."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the person at the terminal asked for."""

    cases: Sequence[Case]
    subjects: Sequence[Subject]
    """The baseline first."""
    scale: Scale
    file: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with *arguments* (default: those of the process) and return its exit status."""
    known = {case.name: case for case in CASES}
    asked = _parser().parse_args(arguments)
    try:
        wishes = Wishes(
            _chosen("case", asked.cases, known),
            _first_the_baseline(_chosen("subject", asked.subjects, SUBJECTS)),
            Scale.FULL if asked.full else Scale.QUICK,
            asked.results or FOLDER / (PART if asked.cases or asked.subjects else WHOLE),
        )
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    if asked.list:
        _list(known.values())
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    with suppress(KeyboardInterrupt), EmbeddedPostgres(settings=SERVER) as server:
        results = Results(machine=machine.machine(), scale=wishes.scale.value)
        subjects = _able(wishes.subjects, server, results, console)
        ground = Ground(server, subjects, wishes.scale, _say_nothing)
        return run(wishes.cases, ground, results, wishes.file, console)
    return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench", description="stanch beside every peer, in one run.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all where none is named")
    parser.add_argument("--full", action="store_true", help="as thorough as it gets, which takes hours")
    parser.add_argument(
        "--subjects",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        metavar="A,B",
        help=f"only these, and {BASELINE}, which the ratios are to",
    )
    parser.add_argument("--list", action="store_true", help="tell what there is, and end")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help=f"where to, instead of {WHOLE} or {PART}"
    )
    return parser


def _chosen(what: str, names: Sequence[str], known: Mapping[str, T]) -> list[T]:
    """Those of the *names*, in their own order; all where none is named."""
    if unknown := [name for name in names if name not in known]:
        raise LookupError(f"no such {what}: {', '.join(unknown)}. There are: {', '.join(known)}")
    return [one for name, one in known.items() if not names or name in names]


def _first_the_baseline(subjects: Iterable[Subject]) -> list[Subject]:
    baseline = SUBJECTS[BASELINE]
    return [baseline, *(subject for subject in subjects if subject.name != BASELINE)]


def _list(cases: Iterable[Case]) -> None:
    rows: Iterable[Case | Subject]
    for what, rows in (("cases", cases), ("subjects", SUBJECTS.values())):
        print(what)
        for row in rows:
            lacks = row.needs()
            print(f"  {row.name:20} {row.title}{f' (left out: {lacks})' if lacks else ''}")


def _able(
    subjects: Iterable[Subject], server: EmbeddedPostgres, results: Results, console: Console
) -> list[Subject]:
    """Those that can be built here, and that do what they are measured for; says who is left out, and why."""
    lacking = {subject.name: why for subject in subjects if (why := subject.needs())}
    here = [subject for subject in subjects if subject.name not in lacking]
    results.versions |= machine.versions(server, here)
    _greet(results, console)
    results.left_out |= lacking | asyncio.run(_verified(here, server))
    for name, why in results.left_out.items():
        console.print(Text(f"left out: {name}, because {why}", style="yellow"))
    return [subject for subject in here if subject.name not in results.left_out]


async def _verified(subjects: Iterable[Subject], server: EmbeddedPostgres) -> dict[str, str]:
    engine = create_async_engine(server.url())
    async with engine.begin() as connection:
        await shop.prepare(connection)
    await engine.dispose()
    return await verify(subjects, Setting(server.url()))


def _greet(results: Results, console: Console) -> None:
    told = results.machine
    console.print(
        f"{told['processor']}, cores {told['cores']}, {told['system']}, {told['python']},"
        f" PostgreSQL {results.versions['PostgreSQL']}, stanch {results.versions['stanch']}",
        highlight=False,
    )
    if (load := told["load"]) is not None and load > told["cores"] * BUSY:
        warning = f"load {load} on {told['cores']} cores: something else runs here, and times will be noisy"
        console.print(Text(warning, style="yellow"))


def _say_nothing(_what: str) -> None:
    """Before there is anybody to tell."""


# The run ----------------------------------------------------------------------------------------------------


def run(cases: Iterable[Case], ground: Ground, results: Results, file: Path, console: Console) -> int:
    """All *cases* on *ground*; what they measured is in *results* and stored in *file*. Gives the exit status."""
    able: list[Case] = []
    for case in cases:
        if lacks := case.needs():
            results.left_out[case.name] = lacks
            console.print(Text(f"left out: {case.name}, because {lacks}", style="yellow"))
        else:
            able.append(case)
    failed: list[str] = []
    with Progress({case.name: case.seconds(ground) for case in able}, console) as progress:
        console.print(f"about {in_words(progress.left)}", highlight=False)
        ground = replace(ground, step=progress.step)
        for case in able:
            progress.begin(case.name)
            try:
                if not _ran(case, ground, results, console):
                    failed.append(case.name)
            except KeyboardInterrupt:
                left = able[able.index(case) :]
                results.left_out |= {one.name: "it was stopped before its end" for one in left}
                console.print(f"stopped; not run to the end: {', '.join(one.name for one in left)}")
                return STOPPED
            finally:
                progress.end()
                _store(results, file)
    console.print(f"{len(results.figures)} figures in {file}", highlight=False, soft_wrap=True)
    if failed:
        console.print(Text(f"failed: {', '.join(failed)}", style="red"))
    return int(bool(failed))


def _ran(case: Case, ground: Ground, results: Results, console: Console) -> bool:
    """Whether it came to its end. What it has measured before something went wrong is kept."""
    measured: list[Figure] = []
    try:
        for figure in case.run(ground):
            measured.append(figure)
            results.figures.append(figure)
    except Exception as error:  # noqa: BLE001  # a case may fail in any way; the others are still run
        # The text of an error might name a host or a path, and the file is published.
        results.left_out[case.name] = f"it failed with {type(error).__name__}"
        console.print(Text(f"{case.name} failed:\n{traceback.format_exc()}", style="red"))
        return False
    finally:
        show(case.title, measured, console)
    return True


def _store(results: Results, file: Path) -> None:
    """After each case: a run that is killed has not been for nothing."""
    if results.figures:
        results.write(file)
