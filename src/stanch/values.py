"""Frozen values that cost nothing to define: like a frozen dataclass, without the six functions compiled for each.

Each ``@dataclass(frozen=True)`` adds 0.15 % to what importing FastAPI costs, and an app pays that at every start. Where
values are made rarely, and are many in kind, they are made of this.
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
    >>> Point()
    Traceback (most recent call last):
    TypeError: Point() lacks x
    """

    _fields: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        own = inspect.get_annotations(cls)
        fields = [name for name, kind in own.items() if not str(kind).startswith("ClassVar")]
        cls._defaults = {**cls._defaults, **{name: vars(cls)[name] for name in fields if name in vars(cls)}}
        cls._fields = (*cls._fields, *(name for name in fields if name not in cls._fields))

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        if len(arguments) > len(self._fields):
            raise TypeError(
                f"{type(self).__name__}() takes {len(self._fields)} arguments, got {len(arguments)}"
            )
        given = dict(zip(self._fields, arguments, strict=False))
        for name, value in keywords.items():
            if name in given or name not in self._fields:
                raise TypeError(f"{type(self).__name__}() cannot take {name} here")
            given[name] = value
        for name in self._fields:
            if name not in given and name not in self._defaults:
                raise TypeError(f"{type(self).__name__}() lacks {name}")
        self.__dict__.update({**self._defaults, **given})

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of the fields, in order."""
        return cls._fields

    def but(self, **changes: Any) -> Self:
        """The same value with other fields.

        >>> class Point(Value):
        ...     x: int
        ...     y: int = 0
        >>> Point(1).but(y=2)
        Point(x=1, y=2)
        """
        return type(self)(**{**{name: getattr(self, name) for name in self._fields}, **changes})

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
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({shown})"
