"""The page of the benchmarks says what the figures say, and its charts can be read; no figure here was measured."""

from __future__ import annotations

import base64
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, strategies as st

from bench.report.__main__ import main
from bench.report.charts import charts_of
from bench.report.compare import Comparison, Verdict, against, against_best, grouped, judge
from bench.report.page import Suite, make, publish
from bench.report.svg import NARROWEST, Scale, draw, width_of
from bench.report.tables import tables_of
from bench.report.words import Measure
from bench.results import Results, Spread
from bench.shop import Kind
from tests.support.browser import browsing, visiting
from tests.support.invented_results import CASES, MACHINE, TITLES, InventedCase, figure, invented_results
from tests.support.pages import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from bench.results import Better, Figure

SVG = "{http://www.w3.org/2000/svg}"
SUITE = Suite(CASES, TITLES, "article")
INVENTED = invented_results()


def page_of(*figures: Figure, suite: Suite = SUITE, left_out: dict[str, str] | None = None) -> str:
    return make(Results(figures=list(figures), left_out=left_out or {}), suite, "charts")[0]


def section(page: str, title: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    return re.split(r"^#+ ", page.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


BETTER, WORSE, AHEAD = (
    "Better than the article's pattern",
    "Worse than the article's pattern",
    "Another session layer is ahead",
)


# What the figures say ----------------------------------------------------------------------------------------


def test_where_stanch_is_slower_the_summary_says_so_with_median_and_quartiles() -> None:
    rounds = (13.0, 14.0, 15.0, 16.0, 17.0)
    page = page_of(
        figure("rates", "article", {"rtt_ms": 2}, "p50", *[10.0] * 5),
        figure("rates", "stanch", {"rtt_ms": 2}, "p50", *rounds),
    )

    assert "**50 % more**, 1.50× (1.40 to 1.60), 15.0 ms beside 10.0 ms, `stanch`" in section(page, WORSE)
    assert "Nowhere in this run." in section(page, BETTER)
    assert "better in 0 of 1 comparisons, worse in 1, even in 0" in section(page, "In short")


@pytest.mark.parametrize(
    ("better", "ours", "verdict"),
    [
        ("more", 120.0, Verdict.BETTER),
        ("more", 80.0, Verdict.WORSE),
        ("less", 80.0, Verdict.BETTER),
        ("less", 120.0, Verdict.WORSE),
        ("less", 100.5, Verdict.EVEN),
    ],
)
def test_what_is_better_depends_on_what_is_hoped_for(better: Better, ours: float, verdict: Verdict) -> None:
    values = {"article": 100.0, "stanch": ours}
    told = [figure("rates", name, {}, "q", value, better=better) for name, value in values.items()]

    (compared,) = against(Results(figures=told), "article")

    assert compared.verdict is verdict


def test_a_ratio_is_of_two_that_ran_in_the_same_round() -> None:
    """The medians are 20 and 10; but in each round stanch took as long as the article, within one part in ten."""
    told = [
        figure("rates", "article", {}, "p50", 5.0, 10.0, 40.0),
        figure("rates", "stanch", {}, "p50", 5.5, 20.0 / 2, 36.0),
    ]

    (compared,) = against(Results(figures=told), "article")

    assert compared.ratio == pytest.approx(Spread(1.0, 0.9, 1.1), rel=0.06)
    assert compared.verdict is Verdict.EVEN


def test_a_failure_where_the_article_has_none_is_worse_though_it_has_no_ratio() -> None:
    page = page_of(
        figure("overload", "article", {}, "failed", 0, 0, 0, unit="%"),
        figure("overload", "stanch", {}, "failed", 2, 3, 4, unit="%"),
    )

    assert "3 % beside 0 %" in section(page, WORSE)


def test_the_greatest_difference_comes_first_and_every_worse_figure_is_counted() -> None:
    told = [
        figure("rates", name, {"clients": clients}, quantity, value)
        for quantity, values in {"p50": (11, 12, 9), "p99": (30, 8, 8)}.items()
        for clients, ours in enumerate(values)
        for name, value in (("article", 10), ("stanch", ours))
    ]

    groups = grouped(against(Results(figures=told), "article"), Verdict.WORSE)

    counted = [(one.first.figure.quantity, len(one.comparisons), one.of) for one in groups]
    assert counted == [("p99", 1, 3), ("p50", 2, 3)]
    assert [one.first.gain for one in groups] == pytest.approx([1 / 3, 1 / 1.2])


def test_the_best_other_layer_is_named_where_it_is_ahead_and_a_limit_is_no_rival() -> None:
    values = {"article": 10, "stanch": 9, "stanch-reader": 8, "context-async": 7, "asyncpg": 1, "core": 2}
    told = [figure("rates", name, {}, "p50", value) for name, value in values.items()]

    (compared,) = against_best(Results(figures=told))

    assert (compared.figure.subject, compared.other.subject) == ("stanch-reader", "context-async")
    assert "8.00 ms beside 7.00 ms of `context-async`" in section(page_of(*told), AHEAD)


def test_what_is_neither_better_nor_worse_is_not_judged() -> None:
    told = [
        figure("overload", name, {}, "refused", value, better="neither")
        for name, value in (("article", 1), ("stanch", 9))
    ]

    assert against(Results(figures=told), "article") == []


# Tables ------------------------------------------------------------------------------------------------------


def cells(lines: list[str]) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].strip("*"): row[1:] for row in [rows[0], *rows[2:]]}


def test_the_best_and_the_worst_are_marked_with_whatever_cannot_be_told_from_them() -> None:
    rounds = {
        "asyncpg": (1, 1, 1),  # a limit is not judged
        "article": (10, 10, 10),
        "stanch": (8, 8.1, 8.2),
        "context-async": (8.1, 8.2, 8.3),
        "sqlmodel": (19, 20, 21),
    }
    (table,) = tables_of(
        [figure("rates", name, {}, "p50", *values) for name, values in rounds.items()],
        list(TITLES),
        "article",
    )

    marked = {name: row[0].split("<br>")[0] for name, row in cells(table.lines).items() if name}
    assert marked == {
        "asyncpg": "1.00 ms",
        "article": "10.0 ms",
        "stanch": "**8.10 ms**",
        "context-async": "**8.20 ms**",
        "sqlmodel": "*20.0 ms*",
    }
    assert cells(table.lines)["sqlmodel"][0].endswith("<br>2.00× (1.90 to 2.10)")


def test_every_figure_is_in_exactly_one_cell() -> None:
    for case in CASES:
        figures = list(INVENTED.of(case.name))
        tables = tables_of(figures, list(TITLES), "article")
        filled = sum(
            bool(cell) for table in tables for name, row in cells(table.lines).items() if name for cell in row
        )

        assert filled == len(figures)
        assert all(line.count("|") == tables[0].lines[0].count("|") for line in tables[0].lines)


def test_figures_beside_each_other_have_the_same_unit() -> None:
    measure = Measure.of("ms", [0.05, 70.0, 4000.0])

    assert [measure.text(value) for value in (0.05, 70.0, 4000.0)] == ["50.0 µs", "70,000 µs", "4,000,000 µs"]


# Goals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedGoal:
    says: str
    ratio_at_least: float | None = None
    ratio_at_most: float | None = None
    where: Mapping[str, str | float] = field(default_factory=dict[str, "str | float"])
    quantity: str = "requests"
    case: str = "rates"
    subject: str = "stanch"
    than: str | None = "article"


def test_a_goal_is_met_only_if_it_is_met_at_every_setting_it_is_about() -> None:
    told = [
        figure(
            "rates", name, {"rtt_ms": rtt, "driver": "asyncpg"}, "requests", value, better="more", unit="1/s"
        )
        for rtt, ours in ((0, 130), (2, 210))
        for name, value in (("article", 100), ("stanch", ours))
    ]
    goals = [
        PlannedGoal("twice at 2 ms", 2.0, where={"rtt_ms": 2}),
        PlannedGoal("twice everywhere", 2.0),
        PlannedGoal("not too fast", ratio_at_most=2.2),
        PlannedGoal("never measured", 2.0, quantity="p50"),
        PlannedGoal("by itself", 200.0, than=None),
    ]

    verdicts = {one.goal.says: one.is_met for one in judge(Results(figures=told), goals)}
    page = page_of(*told, suite=Suite(CASES, TITLES, "article", goals))

    assert verdicts == {
        "twice at 2 ms": True,
        "twice everywhere": False,
        "not too fast": True,
        "never measured": None,
        "by itself": False,
    }
    assert "2 met, 2 missed, 1 not measured" in page
    wanted = "at least 2.00× of `article`; measured: 1.30×, furthest from it with round trip of 0 ms"
    assert f"- **missed**: twice everywhere (wanted of `stanch`: {wanted}" in page
    assert "by itself (wanted of `stanch`: at least 200/s; measured: 130/s, furthest" in page


# The page ----------------------------------------------------------------------------------------------------


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    INVENTED.write(file)

    assert make(INVENTED, SUITE, "charts") == make(Results.read(file), SUITE, "charts")


def test_a_case_that_was_not_run_is_named_with_its_reason() -> None:
    missing = section(
        page_of(
            figure("rates", "article", {}, "p50", 1), left_out={"instructions": "valgrind is not installed"}
        ),
        "What is missing",
    )

    assert "- `instructions`: valgrind is not installed\n" in missing
    assert all(
        f"- `{case.name}`: not part of this run" in missing
        for case in CASES
        if case.name not in ("rates", "instructions")
    )
    assert "`rates`" not in missing


def test_a_case_that_the_suite_does_not_know_is_shown_all_the_same() -> None:
    page = page_of(figure("yesterday", "article", {}, "p50", 1), figure("yesterday", "stanch", {}, "p50", 2))

    assert "## yesterday" in page
    assert "**2.00 times as much**" in section(page, WORSE)


def test_the_limit_is_told_of_stanchs_better_way() -> None:
    values = {"asyncpg": 10, "orm-floor": 20, "article": 50, "stanch": 40, "stanch-reader": 30}
    told = [figure("rates", name, {}, "p50", value) for name, value in values.items()]

    assert "p50 | 3.00× | 1.50× |" in section(page_of(*told), "The limit")


def test_the_method_of_a_case_is_told_and_how_to_run_it() -> None:
    told = section(page_of(figure("rates", "article", {}, "p50", 1)), CASES[2].title)

    assert CASES[2].method in told
    assert '`make bench ARGS="rates"`' in told


def test_machine_and_versions_are_told() -> None:
    told = section(make(INVENTED, SUITE, "charts")[0], "Machine and versions")

    assert all(str(key) in told for key in MACHINE)
    assert "- sqlalchemy: 0.0 (invented)" in told


def test_no_name_breaks_the_page_or_a_chart() -> None:
    name = 'a|b `<c>` & "d" *e*'
    title = '<script>alert(1)</script> | & "quoted"'
    results = Results(
        {"processor": name},
        {},
        "quick",
        [
            figure("odd", subject, {"what": name}, name, value)
            for subject, value in (("article", 2), ("stanch", 3), (name, 4))
        ],
        {"x": name},
    )

    page, drawn = make(results, Suite([InventedCase("odd", title)], {name: name}, "article"), "charts")

    assert "<script" not in page
    (chart,) = drawn.values()
    root = ET.fromstring(chart)
    assert root.find(f"{SVG}title").text == title  # type: ignore[union-attr]
    assert name in [text.text for text in root.iter(f"{SVG}text")]
    assert not [element for element in root.iter() if element.tag == f"{SVG}script"]
    widths = [
        len(re.split(r"(?<!\\)\|", line)) for line in page.splitlines() if line.startswith("| **stanch**")
    ]
    assert set(widths) == {4}, "a cell in each table for the name, and one for the figure"


def test_what_is_shown_in_blocks_is_run_by_people_only() -> None:
    (block,) = blocks_of(make(INVENTED, SUITE, "charts")[0])

    assert block.language == "console"
    assert all(line.startswith("$ make ") for line in block.body.splitlines())


def test_charts_of_an_earlier_page_are_removed_and_no_other_picture_is(tmp_path: Path) -> None:
    charts = tmp_path / "docs" / "assets" / "benchmarks"
    page = tmp_path / "docs" / "benchmarks.md"
    publish(INVENTED, SUITE, page, charts)
    (charts / "of-somebody-else.svg").write_text("<svg/>")
    before = {file.name for file in charts.glob("*.svg")}

    publish(Results(figures=list(INVENTED.of("imports"))), SUITE, page, charts)

    assert {"imports.svg", "growth.svg"} <= before
    assert {file.name for file in charts.glob("*.svg")} == {"imports.svg", "of-somebody-else.svg"}
    assert '<img src="assets/benchmarks/imports.svg"' in page.read_text()


# The command -------------------------------------------------------------------------------------------------


def test_the_command_makes_the_page_of_a_results_file(tmp_path: Path) -> None:
    file, page, charts = tmp_path / "results.json", tmp_path / "page.md", tmp_path / "charts"
    INVENTED.write(file)

    assert main([str(file), "--page", str(page), "--charts", str(charts)]) == 0

    assert page.read_text().startswith("# Benchmarks\n")
    assert all(ET.fromstring(chart.read_text()) is not None for chart in charts.glob("*.svg"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (json.dumps({"format": 0, "figures": []}), "another format"),
        ("{", "no results file"),
        (json.dumps({"format": 1, "figures": [{"case": "rates"}]}), "no results file"),
        (json.dumps({"format": 1, "figures": []}), "has no figures"),
    ],
)
def test_a_file_that_is_no_results_of_today_is_refused(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "old.json", tmp_path / "page.md"
    file.write_text(text)

    with pytest.raises(SystemExit) as stopped:
        main([str(file), "--page", str(page), "--charts", str(tmp_path / "charts")])

    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
    assert not page.exists()


# Charts ------------------------------------------------------------------------------------------------------

DRAWN = make(INVENTED, SUITE, "charts")[1]


class Placed(NamedTuple):
    """A text in the narrowest chart, in pixels."""

    text: str
    left: float
    right: float
    y: float


def placed_in(svg: str) -> Iterator[Placed]:
    inside = ET.fromstring(svg).find(f"{SVG}svg")
    assert inside is not None
    width = NARROWEST * float(inside.attrib["width"].rstrip("%")) / 100
    for element in inside.iter(f"{SVG}text"):
        kinds = element.attrib["class"].split()
        size = {"title": 15, "panel": 13, "tick": 11}.get(kinds[0], 12)
        is_bold = bool({"title", "panel", "strong"} & set(kinds))
        x = float(element.attrib["x"].rstrip("%")) / 100 * width + float(element.attrib.get("dx", 0))
        long = width_of(element.text or "", size, is_bold=is_bold)
        left = x - long if "end" in kinds else x - long / 2 if "middle" in kinds else x
        yield Placed(element.text or "", left, left + long, float(element.attrib["y"]))


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_leaves_the_narrowest_chart_or_meets_another(name: str) -> None:
    root = ET.fromstring(DRAWN[name])
    placed = list(placed_in(DRAWN[name]))

    assert len(placed) > 20
    for one in placed:
        assert one.left >= -1, one
        assert one.right <= NARROWEST * 0.96 + 1, one
        assert 0 < one.y < float(root.attrib["height"]), one
    for one, other in itertools.combinations(placed, 2):
        assert abs(one.y - other.y) >= 11 or one.right <= other.left or other.right <= one.left, (one, other)


@pytest.mark.parametrize("name", DRAWN)
def test_a_chart_can_be_read_out_and_asks_for_nothing_from_elsewhere(name: str) -> None:
    root = ET.fromstring(DRAWN[name])
    title, story = root.find(f"{SVG}title"), root.find(f"{SVG}desc")

    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "title story"
    assert title is not None
    assert title.text
    assert story is not None
    assert "stanch" in (story.text or "")
    assert not re.search(r"url\(|href|@import|script", DRAWN[name])


def test_ratios_far_apart_are_drawn_on_a_logarithmic_scale_from_one() -> None:
    told = [
        figure("rates", name, {}, "p50", value)
        for name, value in (("article", 10), ("stanch", 9), ("asyncpg", 40))
    ]

    (one,) = charts_of("rates", "Rates", Results(figures=told), "article")
    (panel,) = one.chart.panels

    assert panel.scale.is_logarithmic
    assert panel.scale.origin == 1.0
    assert [bar.label for bar in panel.bars] == ["stanch", "article", "asyncpg"]
    assert [label for _, label in panel.scale.ticks()] == ["0.5×", "1×", "2×", "4×"]
    assert "logarithmic" in draw(one.chart)


def test_a_chart_draws_those_kinds_of_request_that_are_chosen() -> None:
    told = [
        figure(
            "rates",
            name,
            {"kind": each, "clients": 1, "pool": 10},
            "requests",
            value,
            better="more",
            unit="1/s",
        )
        for each in (Kind.READ.ask.title, Kind.FIVE.ask.title)
        for name, value in (("article", 100), ("stanch", 120))
    ]

    (one,) = charts_of("rates", "Rates", Results(figures=told), "article")

    assert [panel.title for panel in one.chart.panels] == ["one-row read, 1 client, pool of 10"]
    assert one.chart.notes[0] == "requests: more is better"


def test_a_chart_whose_choice_fits_nothing_any_more_shows_what_there_is() -> None:
    told = [figure("rates", name, {}, "renamed", value) for name, value in (("article", 1), ("stanch", 2))]

    (one,) = charts_of("rates", "Rates", Results(figures=told), "article")

    assert one.chart.notes[0] == "renamed: less is better"


def test_subjects_with_the_same_count_share_a_bar_and_stanch_shares_it_with_itself_only() -> None:
    values = {"article": 3, "context-async": 3, "sqlmodel": 3, "stanch": 3, "stanch-reader": 1}
    told = [figure("counts", name, {}, "round trips", value, unit="") for name, value in values.items()]

    (one,) = charts_of("counts", "Counts", Results(figures=told), "article")

    assert {bar.label for bar in one.chart.panels[0].bars} == {
        "article",
        "context-async, sqlmodel",
        "stanch",
        "stanch-reader",
    }


def test_a_setting_at_which_all_are_the_same_is_not_drawn_but_counted() -> None:
    told = [
        figure("counts", name, {"kind": kind}, "round trips", value, unit="")
        for kind, ours in (("READ", 1), ("ORDER", 5))
        for name, value in (("article", 3 if kind == "READ" else 5), ("stanch", ours))
    ]

    (one,) = charts_of("counts", "Counts", Results(figures=told), "article")

    assert len(one.chart.panels) == 1
    assert (one.even, one.more) == (1, 0)


ratios = st.floats(min_value=1e-4, max_value=1e4)


@given(st.lists(st.tuples(ratios, ratios, ratios), min_size=1, max_size=20))
def test_whatever_is_drawn_lies_on_the_scale(values: list[tuple[float, float, float]]) -> None:
    spreads = [Spread(middle, low, high) for low, middle, high in map(sorted, values)]
    ours = [Spread(spread.median - 1, spread.low - 1, spread.high - 1) for spread in spreads]

    for scale, drawn in ((Scale.of_ratios(spreads), spreads), (Scale.of_values(ours), ours)):
        ticks = [scale.at(value) for value, _ in scale.ticks()]
        assert all(-0.1 <= scale.at(value) <= 100.1 for spread in drawn for value in spread)
        assert -1e-6 <= scale.at(scale.origin) <= 100 + 1e-6
        assert ticks == pytest.approx([100 * each / (len(ticks) - 1) for each in range(len(ticks))], abs=1e-6)
        assert 2 <= len(ticks) <= 7


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_and_bars_stand_out_in_light_and_dark(scheme: str) -> None:
    light, dark = re.findall(r"svg \{([^}]*)\}", DRAWN["rates.svg"])
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light if scheme == "light" else dark))

    assert all(contrast(colours[name], colours["paper"]) >= 4.5 for name in ("ink", "soft"))
    for name in ("ours", "peer", "base", "line"):
        assert contrast(colours[name], colours["paper"]) >= 3, name
    for name in ("ours", "peer", "base"):
        assert contrast(colours[name], colours["track"]) >= 3, name


MEASURE = """
() => [...document.querySelectorAll("text")].map(text => {
  const box = text.getBoundingClientRect();
  return [text.textContent, box.left, box.right, box.top, box.bottom];
})
"""
PIXEL = """
async source => {
  const image = new Image(600, 300);
  image.src = source;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [600, 300];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [...context.getImageData(300, 6, 1, 1).data];
}
"""


@pytest.mark.anyio
@pytest.mark.chromium
@pytest.mark.long
async def test_a_browser_draws_every_text_inside_and_apart_at_every_width(tmp_path: Path) -> None:
    async with browsing() as browser:
        for width, (name, svg) in itertools.product((NARROWEST, 800), DRAWN.items()):
            (tmp_path / name).write_text(svg)
            async with visiting(
                browser, (tmp_path / name).as_uri(), viewport={"width": width, "height": 600}
            ) as visit:
                boxes = await visit.page.evaluate(MEASURE)
                assert len(boxes) > 20
                for text, left, right, *_ in boxes:
                    assert 0 <= left < right <= width, (name, width, text, left, right)
                for one, other in itertools.combinations(boxes, 2):
                    across = min(one[2], other[2]) - max(one[1], other[1])
                    down = min(one[4], other[4]) - max(one[3], other[3])
                    assert across <= 0 or down <= 4, (name, width, one, other)
                visit.assert_calm()


@pytest.mark.anyio
@pytest.mark.chromium
@pytest.mark.slow
async def test_one_file_is_light_and_dark_also_as_an_image_of_a_page() -> None:
    source = "data:image/svg+xml;base64," + base64.b64encode(DRAWN["imports.svg"].encode()).decode()
    async with browsing() as browser:
        for scheme, paper in (("light", [255, 255, 255, 255]), ("dark", [20, 25, 31, 255])):
            async with visiting(browser, "about:blank", color_scheme=scheme) as visit:
                assert await visit.page.evaluate(PIXEL, source) == paper


def test_a_comparison_with_nothing_is_neither_better_nor_worse() -> None:
    """Both failed not once."""
    nothing = figure("rates", "stanch", {}, "failed", 0, 0)

    assert Comparison(nothing, nothing, nothing.ratio(nothing)).verdict is Verdict.EVEN
