"""The files of the page: its own, all of them, as strict as a browser can be told."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from stanch import dashboard
from tests.dashboard.fed import PATH, Fed, app_of, page_of, visitor

pytestmark = pytest.mark.anyio

FILES = Path(dashboard.__file__).parent / "page"


def every_file() -> list[str]:
    return sorted(dashboard._PAGE)  # pyright: ignore[reportPrivateUsage]  # the table of all there is


async def test_every_part_is_served_with_the_strictest_words() -> None:
    async with visitor(app_of(page_of(Fed()))) as client:
        for part in [*every_file(), "snapshot", "nothing"]:
            reply = await client.get(f"{PATH}/{part}")
            assert reply.status_code == (404 if part == "nothing" else 200), part
            said = reply.headers
            assert said["content-security-policy"].startswith("default-src 'none'; script-src 'self';"), part
            assert "unsafe" not in said["content-security-policy"]
            assert "frame-ancestors 'none'" in said["content-security-policy"]
            assert (said["cache-control"], said["referrer-policy"]) == ("no-store", "no-referrer")
            assert (said["x-content-type-options"], said["x-frame-options"]) == ("nosniff", "DENY")
            assert "set-cookie" not in said
            assert "access-control-allow-origin" not in said


async def test_the_page_is_found_behind_any_prefix() -> None:
    """Whatever a proxy has put before the path: the page names its parts relative to itself."""
    async with visitor(app_of(page_of(Fed()))) as client:
        reply = await client.get(PATH)
    assert (reply.status_code, reply.headers["location"]) == (307, "_stanch/")


MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\son\w+=")
"""How a text becomes code, or an element."""

ELSEWHERE = re.compile(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", re.IGNORECASE)
NAMED = re.compile(r"""(?:src|href)="([^"#]+)"|from "\./([^"]+)\"""")


def test_the_page_names_its_own_files_and_nothing_that_lies_elsewhere() -> None:
    named: set[str] = set()
    for file in FILES.glob("*.*"):
        text = file.read_text()
        assert MARKUP.search(text) is None, file
        assert set(ELSEWHERE.findall(text)) <= {"http://www.w3.org"}, file
        named |= {one or other for one, other in NAMED.findall(text)}
    assert named - {"snapshot"} == set(every_file()) - {""}


def test_the_vendored_chart_is_what_its_note_says() -> None:
    vendored = FILES / "vendor" / "uplot"
    note = (vendored / "README.md").read_text()
    recorded = dict(re.findall(r"\| `([\w.]+)` \| `([0-9a-f]{64})` \|", note))
    assert recorded.keys() == {file.name for file in vendored.iterdir()} - {"README.md"}
    for name, digest in recorded.items():
        assert hashlib.sha256((vendored / name).read_bytes()).hexdigest() == digest, name
    assert "Copyright (c) 2022 Leon Sorokin" in (vendored / "LICENSE").read_text()
    version = re.match(r"# uPlot ([\d.]+)\n", note)
    assert version is not None
    assert version[1] in (vendored / "uPlot.iife.min.js").read_text()[:200]
