"""Which route a request has taken, by its template: what stands in a path may be a secret.

FastAPI keeps included routers as they are written: it says in ``scope["fastapi"]["effective_route_context"]`` under
which path it has found one, and lists those of a router in ``effective_route_contexts()``. Starlette keeps no word of
the mounts that were passed, but for ``scope["app_root_path"]``. These names are used in this module only, and held by
tests on the oldest and the newest of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from starlette.routing import Host, Mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_OUTSIDE: Final = (Mount, Host)
_NOTHING: Final[Mapping[str, Any]] = {}


def template_of(scope: Mapping[str, Any], outermost: Callable[[], Sequence[Any]]) -> str:
    """The template of the path, with those of mounts and included routers; the endpoint's name where none is found.

    *outermost* gives the routes of the app that the unit of work belongs to; a mount around that app is not known.
    """
    path, is_mounted = _own_path(scope), "app_root_path" in scope  # set by mounts, and by nothing else
    if path is not None and not is_mounted:
        return path
    passed, routes = "", outermost()
    if is_mounted:
        passed, routes = _through_mounts(scope, routes)
    if path is None:  # older Starlettes name no route
        endpoint = scope.get("endpoint")
        path = next((route.path for route in routes if getattr(route, "endpoint", None) is endpoint), None)
    return getattr(scope.get("endpoint"), "__name__", "?") if path is None else passed + path


def _own_path(scope: Mapping[str, Any]) -> str | None:
    """The template of the innermost route, with the prefixes of the routers that include it."""
    route = scope.get("route")
    if isinstance(route, _OUTSIDE):
        route = None  # the one outside: whatever is inside has named none
    context = scope.get("fastapi", _NOTHING).get("effective_route_context")
    if context is not None and (route is None or route is context.original_route):
        route = context.starlette_route or context
    return getattr(route, "path", None)


def _through_mounts(scope: Mapping[str, Any], routes: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    """The templates of the mounts on the way to the route, in one, and the routes inside the last of them."""
    passed, rest = "", str(scope["path"]).removeprefix(str(scope["app_root_path"]))
    while not any(route is scope.get("route") for route in routes):
        for mount in _mounts_among(routes):
            if (found := mount.path_regex.match(rest)) is not None:
                break
        else:
            break
        passed, rest, routes = passed + mount.path, "/" + found["path"], mount.routes
    return passed, routes


def _mounts_among(routes: Sequence[Any]) -> Iterator[Mount]:
    for route in routes:
        if isinstance(route, Mount):
            yield route
        elif isinstance(route, Host):
            yield from _mounts_among(route.routes)
        elif (contexts := getattr(route, "effective_route_contexts", None)) is not None:
            yield from _mounts_among([context.starlette_route for context in contexts()])
