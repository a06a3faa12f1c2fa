"""The bench's command keeps what was measured, whatever happens, and says what did not."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, cast

import pyte
import pytest
from rich.console import Console

from bench import command
from bench.cases.case import Ground, Scale
from bench.cases.rates import FULL, QUICK, Rounds, Scene, Slice
from bench.load import Answer, Load
from bench.progress import Progress
from bench.results import Figure, Results
from bench.shop import Kind
from bench.subjects import SUBJECTS
from bench.terminal import behind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.results import Better


def figure(subject: str, *rounds: float, case: str = "fake", better: Better = "more") -> Figure:
    return Figure(case, subject, {"clients": 1}, "requests", "1/s", better, rounds)


@dataclass
class Fake:
    """A case that measures what it is told to, and then goes on as it is told to."""

    name: str = "fake"
    then: BaseException | None = None
    lacks: str | None = None
    title = "A question"
    method = ""

    def needs(self) -> str | None:
        return self.lacks

    def seconds(self, ground: Ground) -> float:
        return 60.0

    def run(self, ground: Ground) -> Iterator[Figure]:
        ground.step("counting")
        yield figure("article", 100.0, 110.0, case=self.name)
        yield figure("stanch", 200.0, 231.0, case=self.name)
        if self.then is not None:
            raise self.then


GROUND = Ground(cast("Any", None), [SUBJECTS["article"], SUBJECTS["stanch"]], Scale.QUICK, lambda _: None)


def run(file: Path, *cases: Fake, terminal: bool = False) -> tuple[int, Results, str]:
    told = StringIO()
    console = Console(file=told, width=100, force_terminal=terminal)
    status = command.run(cases, GROUND, Results(machine={"cores": 2}), file, console)
    return status, Results.read(file), told.getvalue()


# The run ----------------------------------------------------------------------------------------------------


def test_what_was_measured_is_shown_and_stored(tmp_path: Path) -> None:
    status, stored, told = run(tmp_path / "results" / "latest.json", Fake())
    assert status == 0
    assert stored.figures == [figure("article", 100.0, 110.0), figure("stanch", 200.0, 231.0)]
    assert stored.machine == {"cores": 2}
    assert "1 min 0 s left   fake: counting" in told
    assert "2.05×" in told
    assert "2.00 to 2.10" in told
    assert "▸ stanch" in told


def test_a_case_that_fails_keeps_its_figures_and_the_others_are_run(tmp_path: Path) -> None:
    file = tmp_path / "latest.json"
    secret = "connection to db.internal refused"
    status, stored, told = run(file, Fake("first", RuntimeError(secret)), Fake("second"))
    assert status == 1
    assert [one.case for one in stored.figures] == ["first", "first", "second", "second"]
    assert stored.left_out == {"first": "it failed with RuntimeError"}
    assert secret in told
    assert secret not in file.read_text()


def test_ctrl_c_stores_what_was_measured_until_then(tmp_path: Path) -> None:
    cases = Fake("first"), Fake("second", KeyboardInterrupt()), Fake("third")
    status, stored, told = run(tmp_path / "latest.json", *cases)
    assert status == 130
    assert [one.case for one in stored.figures] == ["first", "first", "second", "second"]
    assert stored.left_out.keys() == {"second", "third"}
    assert "stopped; not run to the end: second, third" in told


def test_a_case_that_this_machine_cannot_run_is_left_out_by_name(tmp_path: Path) -> None:
    status, stored, told = run(
        tmp_path / "latest.json", Fake(), Fake("counted", lacks="there is no valgrind")
    )
    assert status == 0
    assert stored.left_out == {"counted": "there is no valgrind"}
    assert "left out: counted, because there is no valgrind" in told


def test_a_terminal_gets_one_line_that_is_rewritten_and_gone_at_the_end(tmp_path: Path) -> None:
    _, _, told = run(tmp_path / "latest.json", Fake(), terminal=True)
    before = told[: told.index("counting") + len("counting")]
    screen = pyte.Screen(100, 40)
    stream = pyte.Stream(screen)
    stream.feed(before.replace("\n", "\r\n"))
    assert [line for line in screen.display if "1 min 0 s left" in line and "fake: counting" in line]
    stream.feed(told.removeprefix(before).replace("\n", "\r\n"))
    assert not [line for line in screen.display if "counting" in line]
    assert [line for line in screen.display if "▸ stanch" in line]


def test_the_time_left_follows_what_the_cases_took() -> None:
    moment = 100.0
    progress = Progress({"first": 10.0, "second": 40.0}, None, clock=lambda: moment)
    assert progress.left == 50.0
    progress.begin("first")
    moment += 20.0
    progress.end()
    assert progress.left == 80.0  # twice as long as it was said to take: the other may, too
    progress.begin("second")
    moment += 300.0
    assert progress.left > 0


# The command ------------------------------------------------------------------------------------------------


def test_what_there_is_not_is_refused_with_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["no-such-case"]) == 2
    assert command.main(["--subjects", "stanch,no-such-subject"]) == 2
    cases, subjects = capsys.readouterr().err.splitlines()
    assert cases.startswith("no such case: no-such-case. There are: ")
    assert "rates" in cases
    assert subjects.startswith("no such subject: no-such-subject. There are: ")
    assert "stanch-reader" in subjects


def test_the_list_names_all_cases_and_subjects(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in ["rates", "workers", *SUBJECTS])


@pytest.mark.slow
def test_from_the_command_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = SUBJECTS["bare"]._replace(name="planted", package="no-such-package")
    monkeypatch.setattr(command, "CASES", (Fake(),))
    monkeypatch.setattr(command, "SUBJECTS", SUBJECTS | {"planted": planted})
    file = tmp_path / "mine.json"
    assert command.main(["fake", "--subjects", "planted,bare", "--results", str(file)]) == 0
    stored = Results.read(file)
    assert [one.subject for one in stored.figures] == ["article", "stanch"]
    assert stored.left_out == {"planted": "no-such-package is not installed"}
    assert stored.versions.keys() >= {"PostgreSQL", "fastapi", "sqlalchemy", "stanch"}
    assert stored.machine.keys() >= {"processor", "cores", "python", "load"}
    assert "left out: planted, because no-such-package is not installed" in capsys.readouterr().out
    assert str(tmp_path) not in file.read_text()


# What is said -----------------------------------------------------------------------------------------------


def test_where_stanch_is_behind_is_said_in_words_and_nowhere_else() -> None:
    assert list(behind([figure("article", 100.0, 102.0), figure("stanch", 90.0, 89.0)])) == [
        "stanch is behind article, requests, in 1 of 1; most of all 89.5/s beside 101/s"
    ]
    assert list(behind([figure("article", 100.0, 102.0), figure("stanch", 120.0, 119.0)])) == []
    slower = [figure("article", 3.0, better="less"), figure("stanch", 4.0, better="less")]
    assert len(list(behind(slower))) == 1


# Rates ------------------------------------------------------------------------------------------------------


def slice_of(good: int, failed: int = 0) -> Slice:
    answers = [Answer(200, (number + 1) / 1000) for number in range(good)] + [Answer(503, 0.0)] * failed
    return Slice(Load(answers, seconds=2.0), cpu=0.5)


def told_of(slices: dict[str, list[Slice]]) -> dict[tuple[str, str], tuple[float, ...]]:
    rounds = Rounds(Scene(Kind.READ, 0.5, 1, 10), slices)
    return {(one.subject, one.quantity): one.rounds for one in rounds.figures()}


def test_a_tail_is_told_only_of_as_many_requests_as_it_takes_to_have_one() -> None:
    told = told_of({"article": [slice_of(60), slice_of(60)], "stanch": [slice_of(150), slice_of(150)]})
    assert told["stanch", "p50"] == pytest.approx((75.0, 75.0))
    # the article has too few in each round: then both are told of all rounds together, or they would be no pair
    assert told["article", "p99"] == pytest.approx((60.0,))
    assert told["stanch", "p99"] == pytest.approx((149.0,), abs=1)
    assert ("stanch", "p99.9") not in told


def test_what_was_not_answered_with_200_is_told_and_no_request() -> None:
    told = told_of({"stanch": [slice_of(100, failed=7), slice_of(50)]})
    assert told["stanch", "requests"] == (50.0, 25.0)
    assert told["stanch", "failed"] == (7.0, 0.0)
    assert told["stanch", "cpu"] == pytest.approx((5000.0, 10000.0))


def test_a_subject_that_answers_nothing_rightly_has_a_rate_and_no_cost() -> None:
    told = told_of({"stanch": [slice_of(0, failed=3)]})
    assert told == {("stanch", "requests"): (0.0,), ("stanch", "failed"): (3.0,)}


def test_the_quick_run_has_what_the_goals_ask_for_and_the_full_one_has_all_of_it() -> None:
    read = {(scene.rtt, scene.clients, scene.pool) for scene in QUICK if scene.kind is Kind.READ}
    assert read >= {(0.5, 1, 10), (2.0, 1, 10), (0, 32, 10), (0, 32, 5), (0, 500, 10)}
    assert {scene.where["pool"] for scene in FULL} == {5, 10}
    assert set(QUICK) <= set(FULL)
