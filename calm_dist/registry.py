"""Parts that other installed packages register through entry points, one group per kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Any, Protocol, TypeVar

from pydantic_core import PydanticCustomError

from calm_dist.errors import RecipeError


class Described(Protocol):
    """A description of a part, identified by its ``kind``."""

    @property
    def kind(self) -> str: ...


T = TypeVar("T", bound=Described)


def with_installed(own: Mapping[str, T], group: str, described: Any, what: str) -> dict[str, T]:
    """``own`` and the descriptions from installed packages, by kind, this package's first.

    Args:
        group: group of the entry points.
        described: type of the descriptions, which may be abstract.
        what: what messages call such a part.

    Raises:
        RecipeError: an installed package registers something that is not such a part, or a name
            that is taken.
    """
    found = dict(own)
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        found[point.name] = _load(point, found, group, described, what)
    return found


def known_kind(kind: str, known: Collection[str], group: str, what: str) -> str:
    """Return ``kind``; for the validator of a recipe field.

    Raises:
        PydanticCustomError: ``kind`` is not known.
    """
    if kind not in known:
        message = (
            f"use one of {', '.join(known)}; {what} of another package must be installed, with an "
            f"entry point in the group {group}"
        )
        raise PydanticCustomError("unknown_kind", "{message}", {"message": message})
    return kind


def load_module_part(name: str, field: str, kind: str, what: str) -> Any:
    """The object that a description names as ``package.module:attribute``.

    Args:
        field: the recipe field that chose ``kind``, for the message.
        what: the description's attribute that holds the name, for the message.

    Raises:
        RecipeError: the package that registers the description does not hold the object.
    """
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"{field}: {kind}, whose {what} {name} cannot be loaded ({error}); fix the package "
            "that registers it"
        ) from error


def _load(point: EntryPoint, known: Mapping[str, T], group: str, described: Any, what: str) -> T:
    package = f" of {point.dist.name}" if point.dist is not None else ""
    where = f"entry point {group} {point.name} = {point.value}{package}"
    try:
        spec = point.load()
    except Exception as error:
        raise RecipeError(
            f"{where}: cannot be loaded ({type(error).__name__}: {error}); fix or uninstall that "
            "package"
        ) from error
    if not isinstance(spec, described) or spec.kind != point.name:
        raise RecipeError(
            f"{where}: is not a {described.__name__} instance of kind {point.name!r}; fix that "
            "package"
        )
    if point.name in known:
        raise RecipeError(f"{where}: a {what} of this name already exists; rename it")
    return spec
