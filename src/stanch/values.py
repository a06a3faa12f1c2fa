"""Frozen values that cost nothing to define: like a frozen dataclass, without the six functions compiled for each.

Each ``@dataclass(frozen=True)`` adds 0.15 % to what importing FastAPI costs, one of many fields 0.5 %, and an app pays
that at every start. Values that are made rarely are made of this; those that are made often are a ``NamedTuple`` or a
plain class with ``__slots__``, which cost little to define and less to make.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Never, Self, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass_transform(frozen_default=True)
class Value:
    """The base: annotated names are fields, in order, those of a base first; a value given in the class is a default.

    >>> class Point(Value):
    ...     x: int
    ...     y: int = 0
    >>> Point(1), Point(1) == Point(x=1, y=0), Point(1) == Point(2)
    (Point(x=1, y=0), True, False)
    >>> Point(1).replaced(y=2)
    Point(x=1, y=2)
    >>> Point()
    Traceback (most recent call last):
    TypeError: Point() lacks x

    Where the fields are *kw_only*, each is given by its name:

    >>> class Size(Value, kw_only=True):
    ...     width: int
    >>> Size(1)
    Traceback (most recent call last):
    TypeError: Size() takes 0 arguments, got 1
    """

    _fields: ClassVar[tuple[str, ...]] = ()
    _in_order: ClassVar[tuple[str, ...]] = ()
    """Those that may be given without their names."""
    _defaults: ClassVar[Mapping[str, Any]] = {}
    _unshown: ClassVar[frozenset[str]] = frozenset()
    """Those that no ``repr`` shows."""

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        own = inspect.get_annotations(cls)
        fields = [name for name, kind in own.items() if not str(kind).startswith("ClassVar")]
        cls._defaults = {**cls._defaults, **{name: vars(cls)[name] for name in fields if name in vars(cls)}}
        cls._fields = (*cls._fields, *(name for name in fields if name not in cls._fields))
        cls._in_order = () if kw_only else cls._fields

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        if len(arguments) > len(self._in_order):
            raise TypeError(
                f"{type(self).__name__}() takes {len(self._in_order)} arguments, got {len(arguments)}"
            )
        given = dict(zip(self._in_order, arguments, strict=False))
        for name, value in keywords.items():
            if name in given or name not in self._fields:
                raise TypeError(f"{type(self).__name__}() cannot take {name} here")
            given[name] = value
        for name in self._fields:
            if name not in given and name not in self._defaults:
                raise TypeError(f"{type(self).__name__}() lacks {name}")
        self.__dict__.update({**self._defaults, **given})
        self.__post_init__()

    def __post_init__(self) -> None:
        """Judge what was given, or put it in order through ``__dict__``; by itself, anything goes."""

    def replaced(self, **changes: Any) -> Self:
        """The same value but for *changes*, judged anew."""
        return type(self)(**{name: getattr(self, name) for name in self._fields} | changes)

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of the fields, in order."""
        return cls._fields

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __delattr__(self, name: str) -> Never:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")

    def _facts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self._fields)

    def __eq__(self, other: object) -> bool:
        return self._facts() == other._facts() if isinstance(other, type(self)) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), self._facts()))

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name}={getattr(self, name)!r}" for name in self._fields if name not in self._unshown
        )
        return f"{type(self).__name__}({shown})"
