"""The feed of a dashboard over HTTP: server-sent events, and in words why there are none."""

from __future__ import annotations

import codecs
import re
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import httpx

from stanch.cli.top.readings import clean

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping

CONNECT_TIMEOUT: Final = 5.0
SILENCE: Final = 10.0
"""Seconds without a byte after which a feed, which speaks once a second, counts as lost."""

LONGEST: Final = 16_000_000
"""Bytes of one message, at most; a feed does not come near."""

HEADERS_VARIABLE: Final = "STANCH_TOP_HEADERS"
"""Holds headers, one a line: what stands there does not stand in the list of processes."""

_HEADER: Final = re.compile(r"(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(?P<value>[\t\x20-\x7e\x80-\xff]*)")
_ENDING: Final = re.compile(r"\r\n|\n|\r")


class Status(IntEnum):
    """The exit status of the command."""

    DONE = 0
    UNREACHABLE = 1
    MISUSED = 2
    REFUSED = 3
    NO_FEED = 4


class FeedError(Exception):
    """There is no feed; the text is for the person at the terminal, *status* for scripts."""

    def __init__(self, status: Status, what: str, *remedies: str) -> None:
        self.status = status
        self.what = what
        lines = [what, *(f"  {number}. {remedy}" for number, remedy in enumerate(remedies, 1))]
        super().__init__("\n".join(lines))


# The address and the headers ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """Where a feed is, and how that is told: without user, password and query."""

    url: httpx.URL

    @classmethod
    def of(cls, text: str) -> Address:
        """The feed that belongs to the page at *text*; the address of the feed itself will do.

        >>> str(Address.of("localhost:8000/_stanch/"))
        'http://localhost:8000/_stanch/feed'
        >>> str(Address.of("https://ops:secret@shop.example/_stanch/feed?key=secret"))
        'https://shop.example/_stanch/feed'
        """
        try:
            url = httpx.URL(text if "://" in text else f"http://{text}")
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in {"http", "https"} or not url.host:
            raise FeedError(
                Status.MISUSED,
                "that is no URL of a page",
                "Write it as the browser does: http://localhost:8000/_stanch, with the path of install(dashboard=...).",
            )
        path = url.path.rstrip("/")
        return cls(url.copy_with(path=path if path.endswith("/feed") else f"{path}/feed", fragment=None))

    @property
    def page(self) -> str:
        """The page, for people."""
        return str(self).removesuffix("/feed")

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine; a proxy of the environment has no business there."""
        return self.url.host in {"localhost", "127.0.0.1", "::1"}

    def __str__(self) -> str:
        return clean(str(self.url.copy_with(userinfo=b"", query=None)))


def headers_from(given: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The headers of the command line and of the environment, the former winning. Raises ``FeedError``.

    >>> headers_from(["X-Team: ops"], {"STANCH_TOP_HEADERS": "Authorization: Bearer abc"})
    {'Authorization': 'Bearer abc', 'X-Team': 'ops'}
    """
    headers: dict[str, str] = {}
    for line in (*environment.get(HEADERS_VARIABLE, "").splitlines(), *given):
        if not line.strip():
            continue
        match = _HEADER.fullmatch(line.strip())
        if match is None:
            raise FeedError(
                Status.MISUSED,  # without the line itself: it may hold a secret
                "a header is not written as a header",
                f'Write --header "Authorization: Bearer ...", or the same, one a line, in {HEADERS_VARIABLE}.',
            )
        headers[match["name"]] = match["value"]
    return headers


# The events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sent:
    """One event of the stream. *mark* is its id: who comes back with it is told only what is new."""

    kind: str
    data: str
    mark: str


class Decoder:
    r"""Takes a stream apart as the HTML standard says (section 9.2.6, *Interpreting an event stream*).

    >>> decoder = Decoder()
    >>> list(decoder.feed(b"event: snapshot\r\ndata: {\n")), list(decoder.feed(b"data: }\nid: 7\n\n: hello\n"))
    ([], [Sent(kind='snapshot', data='{\n}', mark='7')])
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""
        self._kind = ""
        self._data: list[str] = []
        self._mark = ""
        self._length = 0

    def feed(self, chunk: bytes) -> Iterator[Sent]:
        """The events that *chunk* completes. Raises ``FeedError`` where one has no end."""
        text = self._rest + self._decode(chunk)
        # a return at the very end may be half of an ending
        whole, half = (text[:-1], text[-1:]) if text.endswith("\r") else (text, "")
        *lines, rest = _ENDING.split(whole)
        self._rest = rest + half
        self._length += len(chunk)
        if self._length > LONGEST:
            raise FeedError(Status.NO_FEED, "the stream sends a message without an end")
        for line in lines:
            if line:
                self._take(line)
            else:
                yield from self._dispatch()

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._kind = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self._mark = value
            case _:
                pass  # a comment, or a field that is not for us

    def _dispatch(self) -> Iterator[Sent]:
        if self._data:
            yield Sent(self._kind or "message", "\n".join(self._data), self._mark)
        self._kind, self._length = "", 0
        self._data.clear()


@asynccontextmanager
async def connected(
    address: Address, headers: Mapping[str, str], *, mark: str = ""
) -> AsyncGenerator[AsyncGenerator[Sent]]:
    """The events of the feed at *address*, from *mark* on, until it ends. Raises ``FeedError``, also in between."""
    timeout = httpx.Timeout(CONNECT_TIMEOUT, read=SILENCE)
    client = httpx.AsyncClient(timeout=timeout, headers=dict(headers), trust_env=not address.is_here)
    asked = {"accept": "text/event-stream", "cache-control": "no-store"}
    if mark:
        asked["last-event-id"] = mark
    try:
        async with client, client.stream("GET", address.url, headers=asked) as reply:
            _judge(address, reply, await _words(reply))
            async with aclosing(_events(reply)) as events:
                yield events
    except httpx.HTTPError as error:
        raise FeedError(Status.UNREACHABLE, f"{address} {_in_words(error)}") from None


async def _events(reply: httpx.Response) -> AsyncGenerator[Sent]:
    decoder = Decoder()
    async for chunk in reply.aiter_bytes():
        for sent in decoder.feed(chunk):
            yield sent


async def _words(reply: httpx.Response) -> str:
    """What the other side says to people, if it is one line: a refusal may come with its reason."""
    if reply.status_code == 200 or not reply.headers.get("content-type", "").startswith("text/plain"):
        return ""
    async for text in reply.aiter_text(200):
        return clean(text.strip().partition("\n")[0])
    return ""


def _judge(address: Address, reply: httpx.Response, words: str) -> None:
    status = reply.status_code
    answered = f"{address} answered {status}" + (words and f": {words}")
    if status in {401, 403}:
        raise FeedError(
            Status.REFUSED,
            answered if words else f"{answered}: you are not let in",
            "Send what the app's dashboard_access asks for:"
            f' --header "Authorization: Bearer ...", or the same in {HEADERS_VARIABLE}.',
            'With dashboard_access="loopback" only the machine of the app is let in: ask from there, or by ssh -L.',
        )
    if reply.is_redirect:
        target = clean(reply.headers.get("location", "")).partition("?")[0]
        raise FeedError(
            Status.NO_FEED,
            f"{address} answered {status} and sends to {target}",
            "Give that address if it is the page's; a login page wants a header instead (--header).",
        )
    if status >= 500:
        raise FeedError(
            Status.UNREACHABLE,
            answered,
            "See the log of the app, or of what is before it.",
        )
    if status != 200:
        raise FeedError(
            Status.NO_FEED,
            answered,
            'Give the path that the app has in install(app, db, dashboard="/_stanch").',
            "A page may also hide from those who are not let in: see --header.",
        )
    kind = reply.headers.get("content-type", "").partition(";")[0]
    if kind != "text/event-stream":
        raise FeedError(
            Status.NO_FEED,
            f"{address} is not the feed of a stanch page: it is {clean(kind) or 'of no type'}",
            'Give the path that the app has in install(app, db, dashboard="/_stanch").',
        )


def _in_words(error: httpx.HTTPError) -> str:
    match error:
        case httpx.ConnectTimeout():
            return f"does not answer within {CONNECT_TIMEOUT:g} s"
        case httpx.ConnectError():
            return f"cannot be reached: {clean(str(error)) or 'refused'}"
        case httpx.ReadTimeout():
            return f"has been silent for {SILENCE:g} s"
        case _:
            return f"broke off: {clean(str(error)) or type(error).__name__}"
