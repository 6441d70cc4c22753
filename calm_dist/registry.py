"""Parts that other installed packages add, each by an entry point in the group of its kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Any, Protocol, TypeVar

from pydantic_core import PydanticCustomError

from calm_dist.errors import RecipeError


class Described(Protocol):
    """A description of a part, known by its ``kind``."""

    @property
    def kind(self) -> str: ...


T = TypeVar("T", bound=Described)


def with_installed(own: Mapping[str, T], group: str, described: Any, what: str) -> dict[str, T]:
    """``own`` and the descriptions of installed packages, by kind, this package's first.

    Args:
        group: of the entry points.
        described: their type, which may be abstract.
        what: such a part is called, in messages.

    Raises:
        RecipeError: an installed package registers what is no such part, or a name that is taken.
    """
    found = dict(own)
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        found[point.name] = _load(point, found, group, described, what)
    return found


def known_kind(kind: str, known: Collection[str], group: str, what: str) -> str:
    """``kind``, for a validator of a recipe's field.

    Raises:
        PydanticCustomError: nothing of this name is known.
    """
    if kind not in known:
        message = (
            f"use one of {', '.join(known)}; {what} of another package must be installed, with an "
            f"entry point {group}"
        )
        raise PydanticCustomError("unknown_kind", "{message}", {"message": message})
    return kind


def load_module_part(name: str, field: str, kind: str, what: str) -> Any:
    """What a description names as ``package.module:attribute``.

    Args:
        field: of the recipe that chose ``kind``, for the message.
        what: the description calls it.

    Raises:
        RecipeError: the package that registers the description does not hold it.
    """
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"{field}: {kind}, whose {what} {name} cannot be loaded ({error}); mend the package "
            "that registers it"
        ) from error


def _load(point: EntryPoint, known: Mapping[str, T], group: str, described: Any, what: str) -> T:
    package = f" of {point.dist.name}" if point.dist is not None else ""
    where = f"entry point {group} {point.name} = {point.value}{package}"
    try:
        spec = point.load()
    except Exception as error:
        raise RecipeError(
            f"{where}: cannot be loaded ({type(error).__name__}: {error}); mend or uninstall that "
            "package"
        ) from error
    if not isinstance(spec, described) or spec.kind != point.name:
        raise RecipeError(
            f"{where}: is not a {described.__name__} instance of kind {point.name!r}; mend that "
            "package"
        )
    if point.name in known:
        raise RecipeError(f"{where}: a {what} of this name exists already; rename it")
    return spec
