"""Writes the page: what was measured, what came of it, and what is missing."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from bench.report.charts import charts_of
from bench.report.compare import (
    NEGLIGIBLE,
    Comparison,
    Group,
    Judged,
    Verdict,
    against,
    against_best,
    against_limits,
    grouped,
    is_limit,
    is_ours,
    judge,
    varied_in,
)
from bench.report.svg import MARK, draw
from bench.report.tables import markdown, plain_table, tables_of
from bench.report.words import Measure, as_difference, setting, times, with_quartiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from bench.report.compare import Goal
    from bench.results import Results

SHOWN_LIMITS: Final = ("asyncpg", "orm-floor")


class Told(Protocol):
    """What the page tells of a case; a ``bench.cases.case.Case`` is one."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def title(self) -> str:
        """Its heading."""
        ...

    @property
    def method(self) -> str:
        """What is counted or timed, and what is not, in Markdown."""
        ...


@dataclass(frozen=True, slots=True)
class Suite:
    """What the page knows besides the results."""

    cases: Sequence[Told]
    """All that there are, in the order of the page."""
    subjects: Mapping[str, str]
    """Names and titles, in the order of the tables."""
    baseline: str
    goals: Sequence[Goal] = ()

    def title(self, case: str) -> str:
        """Of a case, known or not."""
        return next((known.title for known in self.cases if known.name == case), case)


def publish(results: Results, suite: Suite, page: Path, charts: Path) -> None:
    """Write the page and its charts; a chart of an earlier page that is no longer made is removed."""
    charts.mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    text, drawn = make(results, suite, os.path.relpath(charts, page.parent).replace(os.sep, "/"))
    for stale in sorted(charts.glob("*.svg")):
        if stale.name not in drawn and MARK in stale.read_text():
            stale.unlink()
    for name, svg in drawn.items():
        (charts / name).write_text(svg)
    page.write_text(text)


def make(results: Results, suite: Suite, folder: str) -> tuple[str, dict[str, str]]:
    """The page, and the charts by the names of their files; *folder* leads from the page to them."""
    drawn: dict[str, str] = {}
    parts = [
        _introduction(results),
        _summary(results, suite),
        _goals(judge(results, suite.goals)),
        _reading(suite.baseline),
        _subjects(results, suite),
    ]
    names = [case.name for case in suite.cases]
    measured = list(dict.fromkeys(figure.case for figure in results.figures))
    shown = [name for name in [*names, *(name for name in measured if name not in names)] if name in measured]
    parts += [_case(name, results, suite, folder, drawn) for name in shown]
    parts += [_limit(results, suite), _machine(results), _left_out(results, suite, measured)]
    return "\n\n".join(text for part in parts if (text := "\n".join(part))) + "\n", drawn


# The parts ---------------------------------------------------------------------------------------------------


def _introduction(results: Results) -> Iterator[str]:
    yield "# Benchmarks"
    yield ""
    yield f"<!-- {MARK}; what is changed here is lost. -->"
    yield ""
    yield (
        "One app, served by each of several session layers on the same PostgreSQL, and what each of them costs. No"
        " figure and no comparison on this page is written by hand: all come from one run, and so does what is said of"
        " them."
    )
    yield ""
    yield "```console"
    yield "$ make bench                  # all cases, less than ten minutes"
    yield "$ make bench-full             # as thorough as it gets"
    yield '$ make bench ARGS="fairness"  # one case, by its name'
    yield "```"
    yield ""
    yield f"Scale of this run: {markdown(results.scale)}. It needs Python 3.11, make and the package index."
    yield "Run it where your app runs: ratios travel, figures do not."


def _summary(results: Results, suite: Suite) -> Iterator[str]:
    base = suite.baseline
    yield "## In short"
    yield ""
    compared = against(results, base)
    if not compared:
        yield f"This run has nothing that compares stanch with `{base}`."
        return
    yield f"Beside the pattern as most apps have it (`{base}`), at the same setting, in the same run:"
    yield ""
    for subject in dict.fromkeys(one.figure.subject for one in compared):
        yield f"- `{subject}`: {_counted([one for one in compared if one.figure.subject == subject])}."
    yield ""
    yield "### Better than the article's pattern"
    yield ""
    yield from _groups(grouped(compared, Verdict.BETTER), results, suite)
    yield ""
    yield "### Worse than the article's pattern"
    yield ""
    yield from _groups(grouped(compared, Verdict.WORSE), results, suite)
    yield ""
    yield "### Neither"
    yield ""
    yield from _even(grouped(compared, Verdict.EVEN), suite)
    yield ""
    yield "### Another session layer is ahead"
    yield ""
    best = against_best(results)
    yield (
        "stanch's better way beside the best of all others that do the same work, whichever that is at each setting:"
        f" {_counted(best)}."
    )
    yield ""
    yield from _groups(grouped(best, Verdict.WORSE), results, suite, names_other=True)


def _counted(compared: Sequence[Comparison]) -> str:
    number = Counter(one.verdict for one in compared)
    return (
        f"better in {number[Verdict.BETTER]} of {len(compared)} comparisons, worse in {number[Verdict.WORSE]},"
        f" even in {number[Verdict.EVEN]}"
    )


def _groups(
    groups: Sequence[Group], results: Results, suite: Suite, *, names_other: bool = False
) -> Iterator[str]:
    """As a list, for a table of it is too wide for a telephone."""
    if not groups:
        yield "Nowhere in this run."
    for group in groups:
        case = group.first.figure.case
        varied = varied_in(results.of(case))
        told = _compared(group.first, varied, names_other=names_other)
        if len(group.comparisons) > 1:
            told += f"; the smallest difference: {_compared(group.last, varied, names_other=names_other)}"
        quantity = markdown(group.first.figure.quantity)
        number = f"{len(group.comparisons)} of {group.of}" if group.of > 1 else "the only one"
        yield f"- {markdown(suite.title(case))}, *{quantity}*: {told} ({number})."


def _even(groups: Sequence[Group], suite: Suite) -> Iterator[str]:
    if not groups:
        yield "Nowhere in this run."
    by_case: dict[str, list[str]] = {}
    for group in groups:
        figure = group.first.figure
        told = f"*{markdown(figure.quantity)}* ({len(group.comparisons)} of {group.of})"
        by_case.setdefault(figure.case, []).append(told)
    for case, told_of in by_case.items():
        yield f"- {markdown(suite.title(case))}, {', '.join(told_of)}."


def _compared(one: Comparison, varied: Sequence[str], *, names_other: bool) -> str:
    values = [one.figure.spread.median, one.other.spread.median]
    measure = Measure.of(one.figure.unit, values)
    ours, theirs = (measure.text(value) for value in values)
    told = f"{ours} beside {theirs}" + (f" of `{one.other.subject}`" if names_other else "")
    if one.ratio is not None:
        told = f"{as_difference(one.ratio)}, {told}"
    where = setting({key: value for key, value in one.figure.where.items() if key in varied})
    return f"{told}, `{one.figure.subject}`" + (f" with {markdown(where)}" if where else "")


def _goals(judged: Sequence[Judged]) -> Iterator[str]:
    if not judged:
        return
    number = Counter(one.is_met for one in judged)
    yield "## Goals"
    yield ""
    yield f"{number[True]} met, {number[False]} missed, {number[None]} not measured in this run."
    yield ""
    words = {False: "**missed**", None: "**not measured**", True: "met"}
    for verdict, word in words.items():
        for one in judged:
            if one.is_met is verdict:
                told = f"wanted of `{one.goal.subject}`: {_bound(one)}{_measured(one)}"
                yield f"- {word}: {one.goal.says.rstrip('.')} ({told})"


def _bound(one: Judged) -> str:
    goal, unit = one.goal, one.worst[0].unit if one.worst else ""
    bounds = [("at least", goal.ratio_at_least), ("at most", goal.ratio_at_most)]
    known = [(word, bound) for word, bound in bounds if bound is not None]
    if goal.than is not None:
        return f"{' and '.join(f'{word} {times(bound)}' for word, bound in known)} of `{goal.than}`"
    return " and ".join(f"{word} {Measure.of(unit, [bound]).text(bound)}" for word, bound in known)


def _measured(one: Judged) -> str:
    """Where it is furthest from the goal."""
    if one.worst is None:
        return ""
    figure, spread = one.worst
    told = Measure.of(figure.unit, [spread.median]).text(spread.median)
    if one.goal.than is not None:
        told = with_quartiles(spread)
    where = markdown(setting(figure.where))
    return f"; measured: {told}" + (f", furthest from it with {where}" if where else "")


def _reading(baseline: str) -> Iterator[str]:
    yield "## How to read this"
    yield ""
    yield (
        f"- **Ratios** are to `{baseline}`: 2.00× is twice as much, which is good of requests and bad of milliseconds."
        " All subjects take turns in each round, and a ratio is of two that ran in the same round, so that what else"
        " the machine did met both. Shown is the median of the rounds, with the quartiles in parentheses; what was"
        " counted has neither rounds nor quartiles."
    )
    yield (
        f"- **Even** is what is less than {NEGLIGIBLE * 100:g} % apart, or whose quartiles lie on both sides of 1."
        " What is nothing on both sides, as failures are as a rule, is not counted as a comparison."
    )
    yield (
        "- In the tables **bold** is the best figure of a column and *italic* the worst, each with those that its"
        " quartiles do not tell it from. Where the best and the worst overlap, neither is marked. What does less than a"
        " session layer (the outlined bars) is not judged."
    )
    yield (
        "- stanch's bars are green and its names bold. Bars begin at zero; where ratios are further apart than that can"
        " show, a dot stands on a logarithmic scale, at the end of a line from 1×."
    )


def _subjects(results: Results, suite: Suite) -> Iterator[str]:
    present = {figure.subject for figure in results.figures}
    yield "## Who is compared"
    yield ""
    rows = [
        [f"`{name}`", markdown(title), _role(name, suite.baseline)]
        for name, title in suite.subjects.items()
        if name in present
    ]
    yield from plain_table(["name", "what it is", ""], rows)


def _role(name: str, baseline: str) -> str:
    if is_ours(name):
        return "stanch"
    if name == baseline:
        return "what ratios are to"
    return "does less: a limit" if is_limit(name) else ""


def _case(name: str, results: Results, suite: Suite, folder: str, drawn: dict[str, str]) -> Iterator[str]:
    known = next((case for case in suite.cases if case.name == name), None)
    title = suite.title(name)
    yield f"## {markdown(title)}"
    yield ""
    if known:
        yield known.method.strip()
        yield ""
    yield f'By itself: `make bench ARGS="{name}"`.'
    for one in charts_of(name, title, results, suite.baseline):
        file = f"{one.name}.svg"
        drawn[file] = draw(one.chart)
        yield ""
        yield f'<img src="{folder}/{file}" width="100%" alt="{_attribute(title)}; all figures are in the tables below">'
        reasons = [(one.even, "because all are the same there"), (one.more, "for want of room")]
        if told := " and ".join(f"{number} {why}" for number, why in reasons if number):
            yield ""
            yield f"Settings that are not drawn: {told}. The tables have all."
    tables = tables_of(results.of(name), list(suite.subjects), suite.baseline)
    yield ""
    yield '<details markdown="1">'
    yield f"<summary>All figures{f', in {len(tables)} tables' if len(tables) > 1 else ''}</summary>"
    for table in tables:
        yield ""
        if table.title:
            yield f"**{markdown(table.title)}**"
            yield ""
        yield from table.lines
    yield ""
    yield "</details>"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def _limit(results: Results, suite: Suite) -> Iterator[str]:
    compared = [one for one in against_limits(results) if one.other.subject in SHOWN_LIMITS and one.ratio]
    if not compared:
        return
    limits = [name for name in SHOWN_LIMITS if any(one.other.subject == name for one in compared)]
    yield "## The limit"
    yield ""
    named = " and ".join(f"`{name}` ({markdown(suite.subjects.get(name, name))})" for name in limits)
    yield (
        f"How far stanch's better way is from what none can go below: {named}. Of each quantity the ratio that is"
        " nearest and the one that is furthest, over all settings."
    )
    yield ""
    places = dict.fromkeys((one.figure.case, one.figure.quantity) for one in compared)
    rows = [
        [
            f"{markdown(suite.title(case))}: {markdown(quantity)}",
            *(
                _range(
                    one
                    for one in compared
                    if (one.figure.case, one.figure.quantity, one.other.subject) == (case, quantity, name)
                )
                for name in limits
            ),
        ]
        for case, quantity in places
    ]
    yield from plain_table(["", *(f"times `{name}`" for name in limits)], rows)


def _range(compared: Iterable[Comparison]) -> str:
    """Of the better way at each setting."""
    best: dict[frozenset[tuple[str, str | float]], Comparison] = {}
    for one in compared:
        where = frozenset(one.figure.where.items())
        if where not in best or one.gain > best[where].gain:
            best[where] = one
    ordered = sorted(best.values(), key=lambda one: -one.gain)
    ratios = [times(one.ratio.median) for one in ordered if one.ratio is not None]
    return " to ".join(dict.fromkeys(ratios[:: max(1, len(ratios) - 1)]))


def _machine(results: Results) -> Iterator[str]:
    yield "## Machine and versions"
    yield ""
    told = {**results.machine, **results.versions}
    if not told:
        yield "The results do not say."
        return
    for key, value in told.items():
        yield f"- {markdown(str(key).replace('_', ' '))}: {markdown(_value(value))}"


def _value(value: Any) -> str:
    match value:
        case dict():
            return ", ".join(f"{key} {_value(inner)}" for key, inner in cast("dict[str, Any]", value).items())
        case list() | tuple():
            return ", ".join(map(_value, cast("list[Any]", value)))
        case float():
            return f"{value:,g}"
        case _:
            return str(value)


def _left_out(results: Results, suite: Suite, measured: Sequence[str]) -> Iterator[str]:
    yield "## What is missing"
    yield ""
    reasons = dict(results.left_out)
    for case in suite.cases:
        if case.name not in measured:
            reasons.setdefault(case.name, "not part of this run")
    if not reasons:
        yield "Nothing: every case and every subject was measured."
        return
    for name, why in reasons.items():
        yield f"- `{name}`: {markdown(why)}"
