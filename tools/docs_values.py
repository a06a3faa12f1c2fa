"""An extension of griffe, which reads the code for the reference: a kind of `stanch.values.Value` shows its fields.

As griffe itself does for dataclasses: a class whose ``__init__`` is made of its annotations is given one to read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from griffe import Class, Extension, Function, Parameter, ParameterKind, Parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from griffe import Attribute, Module

VALUE: Final = "stanch.values.Value"


class Values(Extension):
    """Gives each kind of value the ``__init__`` that it has in effect."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Once all of the package has been read, so that the bases of a class are known."""
        for kind in _kinds(pkg):
            in_order = ParameterKind.positional_or_keyword
            each = ParameterKind.keyword_only if kind.keywords.get("kw_only") == "True" else in_order
            parameters = Parameters(Parameter("self", kind=in_order), *_fields(kind, each))
            kind.set_member(
                "__init__", Function("__init__", parameters=parameters, returns="None", parent=kind)
            )


def _kinds(where: Module | Class) -> Iterator[Class]:
    for member in list(where.members.values()):
        if member.is_alias or not (member.is_module or member.is_class):
            continue
        if isinstance(member, Class) and VALUE in (base.path for base in member.mro()):
            yield member
        yield from _kinds(cast("Module | Class", member))


def _fields(kind: Class, each: ParameterKind) -> Iterator[Parameter]:
    fields: dict[str, Attribute] = {}
    for base in (*reversed(kind.mro()), kind):
        own = (member for member in base.members.values() if member.is_attribute and not member.is_alias)
        fields |= {field.name: cast("Attribute", field) for field in own}
    for name, field in fields.items():
        of_the_class = (
            "class-attribute" in field.labels and "instance-attribute" not in field.labels
        )  # a ClassVar
        if field.annotation is not None and not of_the_class and "property" not in field.labels:
            yield Parameter(name, annotation=field.annotation, kind=each, default=field.value)
